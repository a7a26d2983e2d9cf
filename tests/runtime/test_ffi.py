"""What becomes of torch where the runtime imports `tvm_ffi`, which would import it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.programs import run_python


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    """Return a folder with an empty module of that name."""
    (tmp_path / "torch.py").touch()
    return tmp_path


def printed(program: str, path: Path) -> str:
    """Return what a program prints that finds modules in `path`, too."""
    return run_python(program, PYTHONPATH=str(path)).strip()


def test_a_package_is_loaded_without_torch(torch: Path) -> None:
    program = "import sys, optimizer.runtime.model; print('torch' in sys.modules)"
    assert printed(program, torch) == "False"


def test_torch_can_be_imported_after_it(torch: Path) -> None:
    program = "import optimizer.runtime.model, torch; print(torch.__file__)"
    assert printed(program, torch) == str(torch / "torch.py")


def test_torch_that_is_there_is_found(torch: Path) -> None:
    program = """
from optimizer.runtime.ffi import without_torch
import torch
before = torch
with without_torch():
    import torch
print(torch is before)
"""
    assert printed(program, torch) == "True"


def test_other_threads_find_torch_meanwhile(torch: Path) -> None:
    program = """
import sys, threading
from importlib.util import find_spec
from optimizer.runtime.ffi import without_torch
found = []
with without_torch():
    thread = threading.Thread(target=lambda: found.append(find_spec("torch") is not None))
    thread.start()
    thread.join()
print(found, find_spec("torch") is not None)
"""
    assert printed(program, torch) == "[True] True"
