"""The C++ example gives what the Python runtime gives, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.runtime import load

WritePackage = Callable[..., Path]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cpp"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cpp") / "run_package"
    subprocess.run([EXAMPLE / "build.sh", path, sys.executable], check=True, timeout=300)
    return path


def run(program: Path, package: Path, folder: Path, inputs: dict[str, np.ndarray]) -> subprocess.CompletedProcess[str]:
    arguments: list[str] = []
    for index, (name, array) in enumerate(inputs.items()):
        file = folder / f"input-{index}"
        file.write_bytes(array.tobytes())
        arguments.append(f"{name}={'x'.join(map(str, array.shape))}={file}")
    command = [str(program), str(package), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_outputs_equal_those_of_python(program: Path, write_linear: WritePackage, tmp_path: Path) -> None:
    package = write_linear()
    x = np.random.default_rng(0).standard_normal((5, 4), np.float32)
    inputs = {"x.0/data": x, "scale": np.float32(2).reshape(())}
    done = run(program, package, tmp_path, inputs)
    assert done.returncode == 0, done.stderr
    for index, (name, expected) in enumerate(load(package)(inputs).items()):
        output = np.frombuffer((tmp_path / f"{index}.bin").read_bytes(), expected.dtype).reshape(expected.shape)
        np.testing.assert_array_equal(output, expected)
        assert f"{name}: float32[{', '.join(map(str, expected.shape))}]" in done.stdout


def test_missing_features_are_named(program: Path, write_linear: WritePackage, tmp_path: Path) -> None:
    done = run(program, write_linear(cpu_features=("avx9999",)), tmp_path, {})
    assert done.returncode == 1
    assert done.stderr == "error: this machine lacks the CPU features avx9999\n"


def test_missing_inputs_are_named(program: Path, write_linear: WritePackage, tmp_path: Path) -> None:
    done = run(program, write_linear(), tmp_path, {})
    assert done.returncode == 1
    assert done.stderr == "error: the input x.0/data is missing\n"
