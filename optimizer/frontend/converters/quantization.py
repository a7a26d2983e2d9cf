"""Linear quantization: QuantizeLinear, DequantizeLinear, and the integer products with their zero points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper
from tvm import relax, te, tirx

from optimizer.frontend import float8
from optimizer.frontend.converters.convolution import cross_correlation
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.scaled_dot_product import converted
from optimizer.frontend.value import NARROW_TYPES, TensorValue, Value, numpy_dtype

_NARROW_RANGES: dict[int, tuple[int, int]] = {
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3),
}
_WHOLE_BYTES = ("int8", "uint8", "int16", "uint16")


@dataclass(frozen=True)
class _QuantizedType:
    """An integer or 8-bit float type: how it is stored, its ONNX number if narrower than that, its range."""

    storage: str
    narrow: int | None
    low: int
    high: int


def _quantized_type(node: Node, element_type: int) -> _QuantizedType:
    if element_type in NARROW_TYPES:
        low, high = _NARROW_RANGES[element_type]
        return _QuantizedType(NARROW_TYPES[element_type][1], element_type, low, high)
    storage = helper.tensor_dtype_to_np_dtype(element_type).name
    if storage in float8.FLOAT8_FORMATS:
        return _QuantizedType(storage, None, 0, 0)
    if storage not in (*_WHOLE_BYTES, "int32"):
        raise node.unsupported(f"quantization to {storage}")
    limits = np.iinfo(storage)
    return _QuantizedType(storage, None, int(limits.min), int(limits.max))


def _element_type(value: Value) -> int:
    return value.narrow_type or helper.np_dtype_to_tensor_dtype(numpy_dtype(value.dtype))


@converter("QuantizeLinear", since=10)
def quantize_linear(node: Node) -> Result:
    """Convert QuantizeLinear: saturate(round_half_even(x / scale) + zero_point), per tensor, axis or block."""
    data, scale, zero_point = node.input(0), node.input(1), node.optional_input(2)
    given = node.integer("output_dtype", 0) or TensorProto.UINT8
    target = _quantized_type(node, _element_type(zero_point) if zero_point is not None else given)
    _check_granularity(node, data, scale)
    precision = node.integer("precision", 0)
    dtype = helper.tensor_dtype_to_np_dtype(precision).name if precision else scale.dtype
    whole = target.storage in _WHOLE_BYTES and target.narrow is None
    if dtype == data.dtype == scale.dtype == "float32" and scale.rank <= 1 and whole:
        zero = zero_point.expr if zero_point is not None else node.scalar(0, target.storage)
        return relax.op.quantize(data.expr, scale.expr, zero, axis=_axis(node, data), out_dtype=target.storage)
    operands = [data.expr, scale.expr] if zero_point is None else [data.expr, scale.expr, zero_point.expr]
    saturate = bool(node.integer("saturate", 1))
    place = _parameter_index(node, data)

    def quantize(tensor: te.Tensor, scales: te.Tensor, *zeros: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Expr) -> tirx.Expr:
            quotient = tirx.Cast(dtype, tensor(*index)) / tirx.Cast(dtype, scales(*place(scales, index)))
            quotient = tirx.Cast("float32", quotient)
            if target.storage in float8.FLOAT8_FORMATS:
                return float8.encode(quotient, target.storage, saturate=saturate)
            offset = tirx.Cast("float32", zeros[0](*place(zeros[0], index))) if zeros else tirx.const(0, "float32")
            return _saturated(te.nearbyint(quotient) + offset, target)

        return te.compute(tensor.shape, element, name="quantize")

    return TensorValue(node.compute(quantize, *operands, primfunc_name_hint="quantize").expr, target.narrow)


def _saturated(value: tirx.Expr, target: _QuantizedType) -> tirx.Expr:
    dtype = value.ty.dtype
    limited = tirx.max(tirx.min(value, tirx.const(target.high, dtype)), tirx.const(target.low, dtype))
    return tirx.Cast(target.storage, limited)


def _axis(node: Node, data: Value) -> int:
    return node.checked_axis(node.integer("axis", 1), data.rank) if data.rank > 1 else 0


def _check_granularity(node: Node, data: Value, scale: Value) -> None:
    if node.integer("block_size", 0) == 0 and scale.rank > 1:
        raise node.unsupported(f"a scale of shape {scale.shape} without block_size")
    if node.integer("block_size", 0) and scale.rank not in (0, 1, data.rank):
        raise node.unsupported(f"a blocked scale of shape {scale.shape} for data of shape {data.shape}")


def _parameter_index(node: Node, data: Value) -> Callable[[te.Tensor, Sequence[tirx.Expr]], list[tirx.Expr]]:
    """Return the function from a position in the data to the position of its scale or zero point."""
    axis, block = _axis(node, data), node.integer("block_size", 0)

    def place(parameter: te.Tensor, index: Sequence[tirx.Expr]) -> list[tirx.Expr]:
        if all(isinstance(size, tirx.IntImm) and size.value == 1 for size in parameter.shape):
            return [tirx.const(0, "int64")] * len(parameter.shape)
        if len(parameter.shape) == 1 and not (block and len(index) == 1):
            return [index[axis]]
        return [i // block if position == axis else i for position, i in enumerate(index)]

    return place


@converter("DequantizeLinear", since=10)
def dequantize_linear(node: Node) -> Result:
    """Convert DequantizeLinear: (x - zero_point) * scale, per tensor, per axis, or per block of an axis."""
    data, scale, zero_point = node.input(0), node.input(1), node.optional_input(2)
    if data.dtype not in (*_WHOLE_BYTES, "int32", *float8.FLOAT8_FORMATS):
        raise node.unsupported(f"dequantization of {data.dtype}")
    given = node.integer("output_dtype", 0)
    dtype = helper.tensor_dtype_to_np_dtype(given).name if given else scale.dtype
    _check_granularity(node, data, scale)
    weights = _constant_weights(node, data, scale, zero_point) if dtype == scale.dtype else None
    if weights is not None:
        return weights
    if dtype == scale.dtype == "float32" and scale.rank <= 1 and data.dtype in _WHOLE_BYTES:
        zero = zero_point.expr if zero_point is not None else node.scalar(0, data.dtype)
        return relax.op.dequantize(data.expr, scale.expr, zero, axis=_axis(node, data), out_dtype="float32")
    operands = [data.expr, scale.expr] if zero_point is None else [data.expr, scale.expr, zero_point.expr]
    place = _parameter_index(node, data)

    def dequantize(tensor: te.Tensor, scales: te.Tensor, *zeros: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Expr) -> tirx.Expr:
            if data.dtype in float8.FLOAT8_FORMATS:
                value = float8.decode(tensor(*index), data.dtype)
            else:
                value = tirx.Cast("int32", tensor(*index))
                if zeros:
                    value = value - tirx.Cast("int32", zeros[0](*place(zeros[0], index)))
                value = tirx.Cast("float32", value)
            return tirx.Cast(dtype, value * tirx.Cast("float32", scales(*place(scales, index))))

        return te.compute(tensor.shape, element, name="dequantize")

    return node.compute(dequantize, *operands, primfunc_name_hint="dequantize")


def _constant_weights(node: Node, data: Value, scale: Value, zero_point: Value | None) -> relax.Expr | None:
    """Return a dequantized matrix or filter of constant bytes by plain operators, whose integers passes read off.

    None where a part is no constant or the data have one axis.
    """
    given = (data, scale) if zero_point is None else (data, scale, zero_point)
    parts = [part.constant for part in given if part.constant is not None]
    if data.rank < 2 or data.dtype not in ("int8", "uint8") or len(parts) < len(given):
        return None
    codes, *parameters = parts
    axis, block = _axis(node, data), node.integer("block_size", 0) if scale.rank > 1 else 0
    shape = list(codes.shape)
    blocks = -(-shape[axis] // block) if block else 1
    padding = [(0, blocks * block - shape[axis] if block and place == axis else 0) for place in range(data.rank)]
    apart, single = [*shape], [1] * data.rank
    if block:
        apart[axis : axis + 1] = [blocks, block]
        single = [*apart]
        single[axis + 1] = 1
    elif scale.rank == 1:
        single[axis] = shape[axis]
    values = [np.pad(codes, padding).reshape(apart)]
    values += [part.reshape(single if part.size > 1 else (1,) * len(apart)) for part in parameters]
    integers, factors, *zeros = [node.constant(value) for value in values]
    result = converted(node, integers, scale.dtype)
    if zeros:
        result = node.emit(relax.op.subtract(result.expr, converted(node, zeros[0], scale.dtype).expr))
    result = node.emit(relax.op.multiply(result.expr, factors.expr))
    if not block:
        return result.expr
    filled = [extent + after for extent, (_, after) in zip(shape, padding, strict=True)]
    whole = node.emit(relax.op.reshape(result.expr, filled))
    return relax.op.strided_slice(whole.expr, [axis], [0], [shape[axis]], [1]) if filled != shape else whole.expr


@converter("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(node: Node) -> Result:
    """Convert DynamicQuantizeLinear: uint8 with a scale and zero point from the range of the data and zero."""
    data = node.expr()
    zero = node.scalar(0.0, "float32")
    low = node.emit(relax.op.minimum(relax.op.min(data), zero)).expr
    high = node.emit(relax.op.maximum(relax.op.max(data), zero)).expr
    width = relax.op.subtract(high, low)
    width = relax.op.where(relax.op.equal(width, zero), node.scalar(1.0, "float32"), width)
    scale = node.emit(relax.op.divide(width, node.scalar(255.0, "float32"))).expr
    offset = relax.op.round(relax.op.divide(relax.op.negative(low), scale))
    zero_point = node.emit(relax.op.astype(relax.op.clip(offset, 0.0, 255.0), "uint8")).expr
    quantized = relax.op.quantize(data, scale, zero_point, axis=0, out_dtype="uint8")
    return [quantized, scale, zero_point]


def centered(node: Node, value: Value, zero_point: Value | None, axis: int) -> relax.Expr:
    """Return `value - zero_point` for 8-bit operands: exact in int16, or unchanged where the zero point is 0.

    `zero_point` is one number, one per index of `axis`, or of the rank of `value`.
    """
    if value.dtype not in ("int8", "uint8"):
        raise node.unsupported(f"an integer product of {value.dtype} operands")
    if zero_point is None or (zero_point.constant is not None and not zero_point.constant.any()):
        return value.expr
    aligned = zero_point
    if zero_point.rank == 1 and value.rank > 1:
        single = zero_point.shape[0] == 1
        shape = [1 if single or position != axis else zero_point.shape[0] for position in range(value.rank)]
        aligned = node.reshape(zero_point, shape)
    if value.constant is not None and aligned.constant is not None:
        return node.constant(value.constant.astype(np.int16) - aligned.constant.astype(np.int16)).expr
    operands = node.broadcast_operands(*(node.cast(operand, "int16") for operand in (value, aligned)))
    return node.emit(relax.op.subtract(*operands)).expr


def integer_matmul(
    node: Node, left: Value, right: Value, left_zero: Value | None, right_zero: Value | None
) -> TensorValue:
    """Return the exact int32 product of two 8-bit matrices less their zero points (per row, per column)."""
    operands = [
        centered(node, left, left_zero, max(left.rank - 2, 0)),
        centered(node, right, right_zero, right.rank - 1),
    ]
    return node.emit(relax.op.matmul(*operands, out_dtype="int32"))


@converter("MatMulInteger", since=10)
def matmul_integer(node: Node) -> Result:
    """Convert MatMulInteger: (a - a_zero_point) @ (b - b_zero_point) in int32."""
    return integer_matmul(node, node.input(0), node.input(1), node.optional_input(2), node.optional_input(3))


@converter("ConvInteger", since=10)
def conv_integer(node: Node) -> Result:
    """Convert ConvInteger: the convolution of x - x_zero_point with w - w_zero_point in int32."""
    return _integer_conv(node, node.input(1), node.optional_input(2), node.optional_input(3))


def _integer_conv(node: Node, weight: Value, data_zero: Value | None, weight_zero: Value | None) -> TensorValue:
    data = centered(node, node.input(0), data_zero, 1)
    return cross_correlation(node, data, centered(node, weight, weight_zero, 0), weight, "int32")


@converter("QLinearConv", since=10)
def qlinear_conv(node: Node) -> Result:
    """Convert QLinearConv: an integer convolution, with its result scaled and rounded to 8 bits again."""
    weight = node.input(3)
    result = _integer_conv(node, weight, node.input(2), node.input(5))
    if node.has_input(8):
        bias = node.input(8)
        shape = (1, bias.shape[0], *[1] * (result.rank - 2))
        result = node.emit(relax.op.add(result.expr, node.reshape(bias, shape).expr))
    return requantized(node, result, [node.input(1), node.input(4), node.input(6)], node.input(7), axes=(1, 1))


@converter("QLinearMatMul", since=10)
def qlinear_matmul(node: Node) -> Result:
    """Convert QLinearMatMul: an integer product, with its result scaled and rounded to 8 bits again."""
    result = integer_matmul(node, node.input(0), node.input(3), node.input(2), node.input(5))
    axes = (max(result.rank - 2, 0), result.rank - 1)
    return requantized(node, result, [node.input(1), node.input(4), node.input(6)], node.input(7), axes=axes)


def requantized(
    node: Node, result: TensorValue, scales: Sequence[Value], zero_point: Value, axes: tuple[int, int]
) -> relax.Expr:
    """Return saturate(round_half_even(result * left * right / output) + zero_point) for scales (left, right, output).

    A scale with one number per index belongs to the axis of the result that `axes` gives for (left, right).
    """
    left, right, output = (
        node.cast(_aligned(node, scale, result.rank, axis), "float32")
        for scale, axis in zip(scales, (*axes, axes[1]), strict=True)
    )
    if left.constant is not None and right.constant is not None and output.constant is not None:
        factor = node.constant(left.constant * right.constant / output.constant).expr
    else:
        factor = relax.op.divide(relax.op.multiply(left.expr, right.expr), output.expr)
    scaled = relax.op.round(relax.op.multiply(relax.op.astype(result.expr, "float32"), factor))
    zero = node.cast(_aligned(node, zero_point, result.rank, axes[1]), "float32").expr
    limits = np.iinfo(zero_point.dtype)
    shifted = relax.op.clip(relax.op.add(scaled, zero), float(limits.min), float(limits.max))
    return relax.op.astype(node.emit(shifted).expr, zero_point.dtype)


def _aligned(node: Node, parameter: Value, rank: int, axis: int) -> Value:
    """Return a rank 0 or 1 parameter in a shape that broadcasts along `axis` of a result of `rank`."""
    if parameter.rank != 1:
        return parameter
    if parameter.shape[0] == 1:
        return node.reshape(parameter, ())
    return node.reshape(parameter, [parameter.shape[0] if position == axis else 1 for position in range(rank)])
