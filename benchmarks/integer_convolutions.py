"""Chains of convolutions of 8-bit integers as models in QDQ form: codes in, codes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# The scales of activations and of weights of about half their range, whose products are of the activations' size.
_SCALE = 1 / 64
_LARGEST = 127


def byte_convolutions(
    length: int, channels: Sequence[int], size: int, kernel: int, *, depthwise: bool = False
) -> onnx.ModelProto:
    """Return `length` convolutions whose channels take turns, with activations of uint8 and weights of int8."""
    generator = np.random.default_rng(0)
    constants = {"scale": np.array(_SCALE, np.float32), "zero": np.array(0, np.uint8)}
    nodes = []
    for index in range(length):
        inner, outer = channels[index % 2], channels[(index + 1) % 2]
        own = 1 if depthwise else inner
        codes = generator.integers(-_LARGEST, _LARGEST + 1, (outer, own, kernel, kernel)).astype(np.int8)
        # As uniform ones, the weights have a deviation of a quarter of their range over the root of 3/4.
        scales = np.full(outer, 3**0.5 / _LARGEST / (own * kernel**2) ** 0.5, np.float32)
        constants |= {f"w{index}": codes, f"s{index}": scales, f"z{index}": np.zeros(outer, np.int8)}
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{index}", f"s{index}", f"z{index}"], [f"f{index}"], axis=0),
            helper.make_node("DequantizeLinear", [f"q{index}", "scale", "zero"], [f"x{index}"]),
            helper.make_node(
                "Conv",
                [f"x{index}", f"f{index}"],
                [f"c{index}"],
                pads=[kernel // 2] * 4,
                group=inner if depthwise else 1,
            ),
            helper.make_node("QuantizeLinear", [f"c{index}", "scale", "zero"], [f"q{index + 1}"]),
        ]
    image = (1, channels[0], size, size)
    graph = helper.make_graph(
        nodes,
        "kernel",
        [helper.make_tensor_value_info("q0", TensorProto.UINT8, image)],
        [helper.make_tensor_value_info(f"q{length}", TensorProto.UINT8, (1, channels[length % 2], size, size))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
