"""What LLVM makes of the inner loops: tiles stay in registers, on every instruction set."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import targets
from benchmarks.arm64 import quantized_product
from benchmarks.inner_loops import multiplying_loops, save_and_compile
from benchmarks.integer_convolutions import byte_convolutions
from benchmarks.integer_products import byte_product

Shape = tuple[int, ...]


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
    "Winograd": convolution(64, 9, 3),
    "depthwise": convolution(64, 28, 3, group=64),
    "product of bytes": byte_product(128, 384, 384),
    "convolution 1x1 of bytes": byte_convolutions(1, (64, 64), 14, 1),
}


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2", "arm64"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_inner_loops_keep_their_tile_in_registers(kernel: str, target: str, tmp_path: Path) -> None:
    loops = multiplying_loops(save_and_compile(KERNELS[kernel], targets.get(target), tmp_path))
    assert loops
    for loop in loops:
        assert not loop.spills
        assert not loop.scalar_multiply_adds
        assert not loop.scalar_loads


def test_sums_of_heads_that_share_values_stay_in_registers(tmp_path: Path) -> None:
    shapes = {"q": (1, 9, 1, 64), "k": (1, 3, 600, 64), "v": (1, 3, 600, 64), "y": (1, 9, 1, 64)}
    tensors = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    graph = helper.make_graph([node], "kernel", tensors[:3], tensors[3:])
    decoding = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    loops = multiplying_loops(save_and_compile(decoding, targets.get("x86-avx512"), tmp_path))
    # Three heads by four vectors of 16 columns, of a key or of several.
    sums = [loop for loop in loops if loop.multiply_adds in (12, 24, 48)]
    assert sums
    spill = re.compile(r"vmov\w+\s+(\S*%zmm\d+, -?\d*\(%rsp\)|-?\d*\(%rsp\), %zmm\d+)")
    assert not any(loop.count(spill) for loop in sums)


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2"])
def test_rows_on_the_stack_are_aligned_to_vectors(target: str, tmp_path: Path) -> None:
    node = helper.make_node("Softmax", ["x"], ["y"])
    tensors = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (64, 1024)) for name in ("x", "y")]
    graph = helper.make_graph([node], "kernel", tensors[:1], tensors[1:])
    opset = [helper.make_opsetid("", 18)]
    assembly = save_and_compile(
        helper.make_model(graph, opset_imports=opset, ir_version=10), targets.get(target), tmp_path
    )
    vectors = re.findall(r"(vmov[au]ps)\s.*%[yz]mm\d+, \d+\(%rsp,", assembly)
    assert vectors
    assert set(vectors) == {"vmovaps"}


@pytest.mark.parametrize("bits", [4, 8])
def test_dot_products_for_arm_take_activations_out_of_whole_vectors(bits: int, tmp_path: Path) -> None:
    model = quantized_product(128, 768, 768, bits)
    loop = multiplying_loops(save_and_compile(model, targets.get("arm64"), tmp_path))[0]
    assert not loop.spills
    # Eight rows of eight dot products each, to which a group's scales add one multiply-add a row.
    assert loop.multiply_adds == 8 * 8 + 8
    # Single elements are a row's scale.
    assert loop.scalar_loads <= 8
