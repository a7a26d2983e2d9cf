"""Compiled libraries: the same bytes from the same input, for the right machine, and nothing else needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tvm
from tvm.ir import IRModule

import targets
from targets import linking
from targets.elf import ElfFile

pytestmark = pytest.mark.usefixtures("linker")


@pytest.mark.parametrize("name", ["x86-avx2", "arm64"])
def test_same_module_links_to_same_bytes(name: str, relax_module: IRModule, tmp_path: Path):
    target = targets.get(name)
    libraries = [tmp_path / "first.so", tmp_path / "elsewhere" / "second.so"]
    libraries[1].parent.mkdir()
    for library in libraries:
        linking.export_library(tvm.compile(relax_module, target=target.tvm_target()), target, library)
    assert libraries[0].read_bytes() == libraries[1].read_bytes()
    assert str(tmp_path).encode() not in libraries[0].read_bytes()


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512", "arm64", "arm64-sve2"])
def test_library_is_for_the_architecture_of_its_target(name: str, relax_module: IRModule, tmp_path: Path):
    target = targets.get(name)
    library = tmp_path / "lib.so"
    linking.export_library(tvm.compile(relax_module, target=target.tvm_target()), target, library)
    assert ElfFile(library.read_bytes()).architecture == target.architecture


def test_missing_linker_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(targets.ToolchainError, match="pip install ziglang"):
        linking.linker_executable()


def test_failed_link_is_one_line(tmp_path: Path):
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"not an object file")
    with pytest.raises(targets.ToolchainError) as caught:
        linking.link([broken], targets.get("x86-avx2"), tmp_path / "lib.so")
    assert "\n" not in str(caught.value)
    assert "lib.so for x86-avx2" in str(caught.value)


def test_unwritable_tool_cache_is_named_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    occupied = tmp_path / "file"
    occupied.touch()
    monkeypatch.setenv("OPTIMIZER_CACHE", str(occupied))
    with pytest.raises(targets.ToolchainError, match="OPTIMIZER_CACHE"):
        linking.link([], targets.get("x86-avx2"), tmp_path / "lib.so")


def test_importing_targets_loads_neither_tvm_nor_numpy():
    code = "import sys, targets, targets.linking, targets.emulator; print('tvm' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
