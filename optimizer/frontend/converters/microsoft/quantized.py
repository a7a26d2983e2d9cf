"""Operators on quantized tensors of com.microsoft: dequantize, apply the standard operator, quantize again."""

from __future__ import annotations

import numpy as np

from optimizer.frontend.converters.microsoft.standard import Attribute, as_standard, standard
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter
from optimizer.frontend.scaled_dot_product import converted
from optimizer.frontend.value import Value

# The inputs at which the data of an operator's operands stand, each followed by its scale and zero point, and the
# input with the scale of the result, followed by its zero point.
_ONE_OPERAND = (0,), 3
_TWO_OPERANDS = (0, 3), 6


@converter("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(node: Node) -> Result:
    """Convert QuantizeLinear, which is per tensor unless an axis is given."""
    return as_standard(node, "QuantizeLinear", **_axis(node, node.input(1)))


@converter("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(node: Node) -> Result:
    """Convert DequantizeLinear, which is per tensor unless an axis is given."""
    return as_standard(node, "DequantizeLinear", **_axis(node, node.input(1)))


@converter("QLinearConcat", domain=MICROSOFT)
def concat(node: Node) -> Result:
    """Convert QLinearConcat: tensors, each with its scale and zero point, joined under the scale of the result."""
    parts = [_dequantized(node, index) for index in range(2, len(node.inputs), 3)]
    return _quantized(node, standard(node, "Concat", *parts, axis=node.integer("axis")), 0)


@converter("QLinearWhere", domain=MICROSOFT)
def where(node: Node) -> Result:
    """Convert QLinearWhere: elements of X where the condition holds, else of Y."""
    chosen = standard(node, "Where", node.input(0), _dequantized(node, 1), _dequantized(node, 4))
    return _quantized(node, chosen, 7)


@converter("QLinearAveragePool", domain=MICROSOFT)
def average_pool(node: Node) -> Result:
    """Convert QLinearAveragePool: the mean of each window."""
    if node.integer("channels_last", 0):
        raise node.unsupported("channels_last is not supported")
    attributes: dict[str, Attribute] = {
        name: node.integers(name) for name in ("kernel_shape", "pads", "strides") if node.has_attribute(name)
    }
    attributes |= {name: node.integer(name, 0) for name in ("ceil_mode", "count_include_pad")}
    pooled = standard(
        node, "AveragePool", _dequantized(node, 0), auto_pad=node.string("auto_pad", "NOTSET"), **attributes
    )
    return _quantized(node, pooled, 3)


@converter("QLinearGlobalAveragePool", domain=MICROSOFT)
def global_average_pool(node: Node) -> Result:
    """Convert QLinearGlobalAveragePool: the mean of each channel; channels stand on the last axis if so asked."""
    data = _dequantized(node, 0)
    first = 1 if node.integer("channels_last", 0) else 2
    axes = list(range(first, first + data.rank - 2))
    return _quantized(node, standard(node, "ReduceMean", data, node.constant(np.array(axes, np.int64)), keepdims=1), 3)


@converter("QLinearSoftmax", domain=MICROSOFT)
def softmax(node: Node) -> Result:
    """Convert QLinearSoftmax: before opset 13 of Softmax, over all axes from `axis` on together."""
    data = _dequantized(node, 0)
    axis = node.checked_axis(node.integer("axis", -1), data.rank)
    if node.integer("opset") < 13 and axis != data.rank - 1:
        flat = standard(node, "Flatten", data, axis=axis)
        result = node.reshape(standard(node, "Softmax", flat, axis=1), data.shape)
    else:
        result = standard(node, "Softmax", data, axis=axis)
    return _quantized(node, result, 3)


@converter("QGemm", domain=MICROSOFT)
def gemm(node: Node) -> Result:
    """Convert QGemm: alpha times the product of quantized matrices, plus an int32 bias of the product's scale."""
    left, right = (
        standard(node, "Transpose", node.input(index), perm=[1, 0]) if node.integer(name, 0) else node.input(index)
        for index, name in ((0, "transA"), (3, "transB"))
    )
    product = standard(node, "MatMulInteger", left, right, node.optional_input(2), node.optional_input(5))
    if node.has_input(6):
        product = standard(node, "Add", product, node.input(6))
    scale = standard(node, "Mul", node.input(1), node.input(4))
    scaled = standard(node, "Mul", converted(node, product, scale.dtype), scale)
    alpha = node.float("alpha", 1.0)
    if alpha != 1.0:
        scaled = standard(node, "Mul", scaled, node.constant(np.array(alpha, scaled.dtype)))
    return _quantized(node, scaled, 7) if node.has_input(7) else scaled


def _register(operator: str, name: str, places: tuple[tuple[int, ...], int], *attributes: tuple[str, float]) -> None:
    operands, result = places

    @converter(operator, domain=MICROSOFT)
    def convert(node: Node) -> Result:
        given = {attribute: node.float(attribute, default) for attribute, default in attributes}
        values = [_dequantized(node, index) for index in operands]
        return _quantized(node, standard(node, name, *values, **given), result)


_register("QLinearAdd", "Add", _TWO_OPERANDS)
_register("QLinearMul", "Mul", _TWO_OPERANDS)
_register("QLinearSigmoid", "Sigmoid", _ONE_OPERAND)
_register("QLinearLeakyRelu", "LeakyRelu", _ONE_OPERAND, ("alpha", 0.01))


def _dequantized(node: Node, index: int) -> Value:
    """Return the floats of input `index`, whose scale and zero point follow it."""
    inputs = (node.input(index), node.input(index + 1), node.optional_input(index + 2))
    return standard(node, "DequantizeLinear", *inputs)


def _quantized(node: Node, value: Value, index: int) -> Value:
    """Quantize `value` by the scale and zero point at inputs `index` and `index + 1`."""
    zero_point = node.optional_input(index + 1)
    if zero_point is None:  # of the type of the operands, where QuantizeLinear would take uint8
        zero_point = node.constant(np.zeros((), node.input(0).dtype))
    return standard(node, "QuantizeLinear", value, node.input(index), zero_point)


def _axis(node: Node, scale: Value) -> dict[str, Attribute]:
    if node.has_attribute("axis"):
        return {"axis": node.integer("axis")}
    if scale.rank:
        raise node.unsupported("a scale of more than one element needs an axis")
    return {}
