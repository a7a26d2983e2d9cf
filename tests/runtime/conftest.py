"""Small Relax modules compiled once per session, and packages made of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from optimizer.package.entry_points import EntryPoint, SymbolRange, TensorSpec
from optimizer.package.writer import Weight, write_package
from targets.arm64 import ARM64
from targets.linking import export_library
from tests.manifests import draft_manifest

LINEAR = EntryPoint(
    "main",
    inputs=(TensorSpec("x.0/data", "float32", ("rows", 4)), TensorSpec("scale", "float32", ())),
    outputs=(
        TensorSpec("y", "float32", ("rows", 8)),
        TensorSpec("flat", "float32", ("rows * 4",)),
        TensorSpec("weight", "float32", (4, 8)),
    ),
    symbols=(SymbolRange("rows", 0, 64),),
)
CACHED = EntryPoint(
    "decode",
    inputs=(
        TensorSpec("past", "float32", (1, "past_length", 4)),
        TensorSpec("new", "float32", (1, "length", 4)),
        TensorSpec("mask", "int64", (1, "past_length + length")),
    ),
    outputs=(TensorSpec("present", "float32", (1, "past_length + length", 4)),),
    symbols=(SymbolRange("past_length", 0, None), SymbolRange("length", 1, None)),
)
DTYPES = ("bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float64")
ECHO = EntryPoint(
    "main",
    inputs=tuple(TensorSpec(f"in_{dtype}", dtype, ("n",)) for dtype in (*DTYPES, "int4")),
    outputs=tuple(TensorSpec(f"out_{dtype}", dtype, ("n",)) for dtype in (*DTYPES, "int4")),
    symbols=(SymbolRange("n", 0, None),),
)


def make_linear_weights(seed: int = 0) -> list[Weight]:
    """Return the weights of the linear model: a float32 matrix and a bfloat16 vector."""
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((4, 8)).astype(np.float32)
    return [Weight("matrix", matrix), Weight("bias", generator.standard_normal(8).astype(ml_dtypes.bfloat16))]


def _linear_module(factor: float) -> tvm.IRModule:
    """main: y = factor * scale * x @ matrix + bias, and x reshaped, and the matrix; decode: concatenate."""
    builder = relax.BlockBuilder()
    rows = tirx.Var("rows", "int64")
    x = relax.Var("x", relax.TensorType((rows, 4), "float32"))
    scale = relax.Var("scale", relax.TensorType((), "float32"))
    types = [relax.TensorType((4, 8), "float32"), relax.TensorType((8,), "bfloat16")]
    weights = relax.Var("weights", relax.TupleType(types))
    with builder.function("main", [x, scale, weights]):
        with builder.dataflow():
            matrix, bias = (builder.emit(relax.TupleGetItem(weights, index)) for index in range(2))
            product = builder.emit(relax.op.matmul(builder.emit(relax.op.multiply(x, scale)), matrix))
            product = builder.emit(relax.op.multiply(product, relax.const(factor, "float32")))
            y = builder.emit(relax.op.add(product, relax.op.astype(bias, "float32")))
            result = builder.emit_output(relax.Tuple([y, builder.emit(relax.op.reshape(x, (rows * 4,))), matrix]))
        builder.emit_func_output(result)
    past_length, length = tirx.Var("past_length", "int64"), tirx.Var("length", "int64")
    past = relax.Var("past", relax.TensorType((1, past_length, 4), "float32"))
    new = relax.Var("new", relax.TensorType((1, length, 4), "float32"))
    mask = relax.Var("mask", relax.TensorType((1, past_length + length), "int64"))
    unused = relax.Var("unused", relax.TupleType(types))
    with builder.function("decode", [past, new, mask, unused]):
        with builder.dataflow():
            present = builder.emit_output(relax.op.concat([past, new], axis=1))
        builder.emit_func_output(present)
    return builder.get()


def _echo_module() -> tvm.IRModule:
    """main: every input unchanged but computed (x + x - x, or not not x)."""
    builder = relax.BlockBuilder()
    n = tirx.Var("n", "int64")
    inputs = [relax.Var(f"x_{index}", relax.TensorType((n,), dtype)) for index, dtype in enumerate((*DTYPES, "int8"))]
    with builder.function("main", inputs):
        with builder.dataflow():
            results: list[object] = []
            for dtype, value in zip((*DTYPES, "int8"), inputs, strict=True):
                if dtype == "bool":
                    results.append(builder.emit(relax.op.logical_not(builder.emit(relax.op.logical_not(value)))))
                else:
                    doubled = builder.emit(relax.op.add(value, value))
                    results.append(builder.emit(relax.op.subtract(doubled, value)))
            result = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(result)
    return builder.get()


Build = Callable[[tvm.IRModule, str], Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile a module to a shared library in a new folder."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, and these tests link their own small libraries")

    def build_library(module: tvm.IRModule, name: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "model.so"
        tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(str(path))
        return path

    return build_library


@pytest.fixture(scope="session")
def linear_weights() -> list[Weight]:
    return make_linear_weights()


@pytest.fixture(scope="session")
def linear_library(build: Build) -> Path:
    return build(_linear_module(1.0), "linear")


@pytest.fixture(scope="session")
def doubling_library(build: Build) -> Path:
    return build(_linear_module(2.0), "doubling")


@pytest.fixture(scope="session")
def arm64_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arm64") / "model.so"
    export_library(tvm.compile(_linear_module(1.0), target=ARM64.tvm_target()), ARM64, path)
    return path


@pytest.fixture(scope="session")
def echo_library(build: Build) -> Path:
    return build(_echo_module(), "echo")


WritePackage = Callable[..., Path]


@pytest.fixture
def write_linear(tmp_path: Path, linear_library: Path) -> WritePackage:
    """Write the linear model as a package of the given name."""

    def write(name: str = "linear", library: Path = linear_library, seed: int = 0, **requirements: object) -> Path:
        path = tmp_path / name
        write_package(path, draft_manifest((LINEAR, CACHED), **requirements), library, make_linear_weights(seed))
        return path

    return write


@pytest.fixture
def write_echo(tmp_path: Path, echo_library: Path) -> WritePackage:
    """Write the model that returns its inputs, one per dtype."""

    def write(name: str = "echo", entry: EntryPoint = ECHO) -> Path:
        path = tmp_path / name
        write_package(path, draft_manifest((entry,)), echo_library, [])
        return path

    return write
