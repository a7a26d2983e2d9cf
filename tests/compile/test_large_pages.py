"""Code advises Linux to give large pages to large memory, at each allocation, before anything is written there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from onnx.parser import parse_model
from tvm import relax, tirx

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.large_pages import ADVICE, ask_for_large_pages
from optimizer.package.reader import open_package
from optimizer.runtime import load
from targets.cuda import CUDA

_LENGTH = tirx.Var("n", "int64")


def _allocating(*sizes: int | tvm.ir.Expr) -> tvm.IRModule:
    """Return a function (x: [n]) that allocates memory of these sizes, and writes nowhere."""
    builder = relax.BlockBuilder()
    parameter = relax.Var("x", relax.TensorType([_LENGTH], "float32"))
    with builder.function("main", [parameter]):
        for size in sizes:
            builder.emit(relax.op.memory.alloc_storage(relax.ShapeExpr([size]), 0, "global", "uint8"))
        builder.emit_func_output(parameter)
    return builder.get()


def _names(module: tvm.IRModule) -> list[str]:
    """Return what the function calls, in order."""
    calls = [binding.value for block in module["main"].body.blocks for binding in block.bindings]
    return [call.op.name if isinstance(call.op, tvm.ir.Op) else call.op.name_hint for call in calls]


def test_the_advice_follows_the_allocation_of_large_memory_alone() -> None:
    module = ask_for_large_pages(_allocating((4 << 20) - 1, 4 << 20, _LENGTH * 4), find_target("host"))
    allocates, views = "relax.memory.alloc_storage", "relax.memory.alloc_tensor"
    assert _names(module) == [allocates, allocates, views, ADVICE, allocates]


def test_a_module_without_large_memory_stays_as_it_is() -> None:
    module = _allocating(4096)
    assert ask_for_large_pages(module, find_target("host")) is module


def test_memory_of_a_gpu_is_not_advised() -> None:
    module = _allocating(64 << 20)
    assert ask_for_large_pages(module, CUDA) is module


@pytest.mark.parametrize(("rows", "advised"), [(1024, True), (256, False)])
def test_a_package_advises_by_itself(rows: int, advised: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[{rows}, 1024] x) => (float[{rows}, 1024] y) '
    onnx.save(parse_model(text + "{ y = Relu(x) }"), path)
    compile_model(path, tmp_path / "package", CompileOptions(find_target("host")), certify=False)
    package = open_package(tmp_path / "package")
    assert (b"madvise" in package.locations[package.manifest.library].read()) == advised
    values = np.random.default_rng(0).standard_normal((rows, 1024)).astype(np.float32)
    np.testing.assert_array_equal(load(tmp_path / "package")({"x": values})["y"], np.maximum(values, 0))
