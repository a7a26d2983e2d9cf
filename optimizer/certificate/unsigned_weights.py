"""Models for onnxruntime whose sums of products of bytes are exact on every x86.

Without VNNI its kernels for unsigned activations and signed weights add pairs of products in 16 bits, which saturates
(onnxruntime, "Quantize ONNX models", section "When and why do I need to try U8U8?"). Its kernels for unsigned weights
do not, and a weight of w + 128 with a zero point of z + 128 is the same number as w with z.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from targets.base import VNNI
from targets.host import cpu_features

# Operators whose sums saturate (ConvInteger's do not), with the places among their inputs of the weights, and of the
# zero points of weights and activations. Sums of signed activations do not saturate.
_OPERATORS: Mapping[str, tuple[int, int, int | None]] = {
    "QLinearConv": (3, 5, 2),
    "QLinearMatMul": (3, 5, 2),
    "MatMulInteger": (1, 3, 2),
    "QGemm": (3, 5, 2),
    "QAttention": (1, 7, 6),
    "MatMulIntegerToFloat": (1, 5, 4),
    "DynamicQuantizeMatMul": (1, 3, None),
}
_OFFSET = 128
_SUFFIX = "_unsigned"


def saturates() -> bool:
    """Return whether onnxruntime's sums of products of unsigned by signed bytes saturate on this machine."""
    features = cpu_features()
    return "avx2" in features and VNNI.isdisjoint(features)


def with_unsigned_weights(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto | None:
    """Return the model with constant int8 weights and their zero points as uint8, None where it has none of them.

    `folder` is where data lie that the model keeps in files of their own.
    """
    signed = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    places = [
        (number, *_OPERATORS[node.op_type][:2])
        for number, node in enumerate(model.graph.node)
        if node.op_type in _OPERATORS and _is_changeable(node, signed)
    ]
    if not places:
        return None
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    added: dict[str, onnx.TensorProto] = {}
    for number, weights, zero_point in places:
        inputs = changed.graph.node[number].input
        inputs.extend([""] * (zero_point + 1 - len(inputs)))
        for place in (weights, zero_point):
            name = inputs[place] + _SUFFIX
            if name not in added:
                tensor = signed.get(inputs[place])
                values = np.zeros((), np.int8) if tensor is None else numpy_helper.to_array(tensor, str(folder or ""))
                added[name] = numpy_helper.from_array(np.asarray(values.astype(np.int16) + _OFFSET, np.uint8), name)
            inputs[place] = name
    changed.graph.initializer.extend(added.values())
    return changed


def _is_changeable(node: onnx.NodeProto, signed: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether a node's weights are constants of int8, their zero point, too, or left out, activations not."""
    weights, own, other = (
        "" if place is None or place >= len(node.input) else node.input[place] for place in _OPERATORS[node.op_type]
    )
    return weights in signed and (not own or own in signed) and other not in signed
