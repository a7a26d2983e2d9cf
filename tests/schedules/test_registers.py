"""What LLVM makes of the inner loops: tiles stay in registers, on every instruction set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import targets
from optimizer.compile import CompileOptions, plan_model
from optimizer.lowering import build

Shape = tuple[int, ...]
MULTIPLY_ADD = re.compile(r"\s(vfn?m(add|sub)\d+ps|fml[as])\s")
SCALAR_MULTIPLY_ADD = re.compile(r"\s(vfn?m(add|sub)\d+ss|fn?m(add|sub))\s")
# A vector register stored to the stack or loaded from it.
SPILL = re.compile(r"mm\d+.*\(%rsp|\(%rsp.*mm\d|\bq\d+\b.*\[sp")


def matmul(rows: int, depth: int, columns: int) -> onnx.ModelProto:
    return model("MatMul", (rows, depth), (depth, columns), (rows, columns))


def convolution(channels: int, size: int, kernel: int, group: int = 1) -> onnx.ModelProto:
    weights = (channels, channels // group, kernel, kernel)
    image = (1, channels, size, size)
    return model("Conv", image, weights, image, pads=[kernel // 2] * 4, group=group)


def model(operator: str, shape: Shape, weights: Shape, output: Shape, **attributes: int | list[int]) -> onnx.ModelProto:
    node = onnx.NodeProto(op_type=operator, input=["x", "w"], output=["y"])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph(
        [node],
        "kernel",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.ones(weights, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


KERNELS = {
    "product": matmul(128, 96, 128),
    "product of odd sizes": matmul(61, 96, 67),
    "convolution 1x1": convolution(64, 14, 1),
    "convolution 5x5": convolution(64, 14, 5),
    "Winograd": convolution(64, 14, 3),
    "depthwise": convolution(64, 28, 3, group=64),
}
# For Arm, LLVM unrolls taps and channels of a direct convolution together and spills a tenth of what it multiplies.
CASES = [
    (kernel, target)
    for kernel in KERNELS
    for target in ("x86-avx512", "x86-avx2", "arm64")
    if (kernel, target) != ("convolution 5x5", "arm64")
]


@pytest.mark.parametrize(("kernel", "target"), CASES)
def test_inner_loops_keep_their_tile_in_registers(kernel: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(KERNELS[kernel], path)
    chosen = targets.get(target)
    _, plan = plan_model(path, CompileOptions(target=chosen))
    module = build(plan.lifted.module, chosen).mod
    assembly = "".join(each.inspect_source("asm") for each in module.imports if each.kind == "llvm")
    loops = [loop for loop in innermost_loops(assembly) if any(map(MULTIPLY_ADD.search, loop))]
    assert loops
    for loop in loops:
        assert not [line for line in loop if SPILL.search(line)]
        assert not [line for line in loop if SCALAR_MULTIPLY_ADD.search(line)]


def innermost_loops(assembly: str) -> Iterator[list[str]]:
    """Yield the lines between a label and a jump back to it, where no other label lies between."""
    label, lines = "", list[str]()
    for line in assembly.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            label, lines = match[1], []
        lines.append(line)
        if label and re.search(rf"\s(j\w+|b\S*|cbn?z|tbn?z)\s.*{re.escape(label)}$", line):
            yield list(lines)
