"""Products of 8-bit integers as models in QDQ form: codes in, codes out."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_SCALE, _ZERO = 1 / 64, 113


def byte_product(rows: int, columns: int, depth: int) -> onnx.ModelProto:
    """Return a product of uint8 activations with constant int8 weights, scaled for each column, in uint8."""
    generator = np.random.default_rng(0)
    scales = (generator.random(columns) + 0.5) / (128 * math.sqrt(depth))
    constants = {
        "codes": generator.integers(-127, 128, (depth, columns)).astype(np.int8),
        "w_scale": scales.astype(np.float32),
        "w_zero": np.zeros(columns, np.int8),
        "scale": np.array(_SCALE, np.float32),
        "zero": np.array(_ZERO, np.uint8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["floats"]),
        helper.make_node("DequantizeLinear", ["codes", "w_scale", "w_zero"], ["weights"], axis=1),
        helper.make_node("MatMul", ["floats", "weights"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "kernel",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, (rows, depth))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, (rows, columns))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def product_of_activations(images: int, rows: int, columns: int, depth: int) -> onnx.ModelProto:
    """Return `images` products of two uint8 activations, in uint8."""
    constants = {"zero": np.array(_ZERO, np.uint8), "middle": np.array(128, np.uint8)}
    constants |= {"scale": np.array(_SCALE, np.float32), "wide": np.array(_SCALE * math.sqrt(depth) * 8, np.float32)}
    operands = ["x", "scale", "zero", "w", "scale", "middle", "wide", "zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", operands, ["y"])],
        "kernel",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, (images, rows, depth)),
            helper.make_tensor_value_info("w", TensorProto.UINT8, (images, depth, columns)),
        ],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, (images, rows, columns))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
