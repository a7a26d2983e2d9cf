"""Compiling, linking and executing small modules for any target."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import IRModule

from targets import Target, ToolchainError, missing_features
from targets.emulator import Emulator
from targets.linking import export_library, linker_executable

_PROGRAM = Path(__file__).parent / "execute_library.py"

Execute = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def linker() -> None:
    try:
        linker_executable()
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture
def execute(tmp_path: Path, linker: None) -> Execute:  # noqa: ARG001
    """Compile for a target, execute natively or under the emulator, and return the (last) output."""

    def run(module: IRModule, target: Target, inputs: list[np.ndarray], kind: str = "kernel") -> np.ndarray:
        library, inputs_file, output_file = (tmp_path / name for name in ("lib.so", "inputs.npz", "output.npy"))
        export_library(tvm.compile(module, target=target.tvm_target()), target, library)
        np.savez(inputs_file, *inputs)
        arguments = [str(_PROGRAM), kind, str(library), str(inputs_file), str(output_file)]
        if missing_features(target):
            done = Emulator().run(arguments, target)
        else:
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return np.load(output_file)

    return run


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    emulator = Emulator()
    reason = emulator.available()
    if reason is not None:
        pytest.skip(reason)
    return emulator


@pytest.fixture(scope="session")
def relax_module() -> IRModule:
    """x [4, 8] float32 -> exp(x @ w) through bfloat16, which calls the C and the compiler's support library."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    weights = relax.const(np.linspace(-0.5, 0.5, 48, dtype="float32").reshape(8, 6))
    with builder.function("main", [x]):
        with builder.dataflow():
            product = builder.emit(relax.op.exp(relax.op.matmul(x, weights)))
            rounded = builder.emit(relax.op.astype(relax.op.astype(product, "bfloat16"), "float32"))
            output = builder.emit_output(rounded)
        builder.emit_func_output(output)
    return builder.get()
