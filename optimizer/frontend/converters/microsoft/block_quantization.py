"""Weights quantized in blocks along one axis: MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

import numpy as np
from tvm import relax

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.converters.microsoft.standard import standard
from optimizer.frontend.dimensions import Dimension
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter
from optimizer.frontend.scaled_dot_product import converted
from optimizer.frontend.value import Value


@converter("MatMulNBits", domain=MICROSOFT)
def matmul_n_bits(node: Node) -> Result:
    """Convert MatMulNBits: A times the transpose of a [N, K] matrix of 2, 4 or 8-bit integers, plus a bias.

    Weight (n, k) is (q - zero point) * scale, both of the block k // block_size, or of block g_idx[k] if that is given.
    """
    bits, columns, inner, size = (node.integer(name) for name in ("bits", "N", "K", "block_size"))
    if bits not in (2, 4, 8) or node.integer("weight_prepacked", 0):
        raise node.unsupported("only plain weights of 2, 4 or 8 bits are supported")
    if node.has_input(4) and node.has_input(3) and node.input(3).dtype == "uint8":
        raise node.unsupported("packed zero points together with g_idx, which onnxruntime ignores, are not supported")
    blocks = -(-inner // size)
    data = node.input(0)
    packed = node.reshape(node.input(1), (columns, blocks * size * bits // 8))
    weights = unpacked(node, packed, bits, blocks * size)
    scales = node.reshape(node.input(2), (columns, blocks))
    zero_points = _zero_points(node, bits, (columns, blocks))
    matrix = (
        _in_groups(node, weights, scales, zero_points, node.input(4))
        if node.has_input(4)
        else _in_blocks(node, weights, scales, zero_points, (columns, blocks, size))
    )
    if blocks * size != inner:
        matrix = node.emit(relax.op.strided_slice(matrix.expr, [1], [0], [inner], [1]))
    wide = accumulation_dtype(data.dtype)
    transposed = node.emit(relax.op.permute_dims(matrix.expr, [1, 0]))
    product: Value = node.emit(relax.op.matmul(data.expr, transposed.expr, out_dtype=wide))
    if node.has_input(5):
        product = standard(node, "Add", product, converted(node, node.input(5), wide))
    return converted(node, product, data.dtype)


@converter("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(node: Node) -> Result:
    """Convert GatherBlockQuantized: Gather of rows that are quantized in blocks, dequantized after the gathering."""
    data, indices, scales = node.input(0), node.input(1), node.input(2)
    if data.dtype not in ("int8", "uint8") or (data.narrow_type is None and data.dtype != "uint8"):
        raise node.unsupported(f"data of type {data.dtype} are not supported")
    gather_axis = node.checked_axis(node.integer("gather_axis", 0), data.rank)
    axis = node.checked_axis(node.integer("quantize_axis", 1), data.rank)
    bits = node.integer("bits", 4) if data.narrow_type is None else 8
    if gather_axis == axis or (data.narrow_type is None and (axis != data.rank - 1 or gather_axis != 0)):
        raise node.unsupported("the gathered axis and the one of the blocks are not supported together")
    zero_points = node.optional_input(3)
    if zero_points is None:
        zero_points = _default_zero_points(node, data)
    elif data.narrow_type is None:
        zero_points = unpacked(node, zero_points, bits, _known(node, scales.shape[-1]))
    count = _known(node, data.shape[gather_axis])
    row, inside = _checked_indices(node, indices, count)
    is_matrix = (gather_axis, axis, data.rank) == (0, 1, 2)
    table = _constant_table(node, (data, scales, zero_points), bits) if is_matrix else None
    if table is not None:
        rows = node.emit(relax.op.take(table.expr, row.expr, axis=0, mode="clip"))
        mask = node.emit(relax.op.expand_dims(inside.expr, indices.rank))
        return relax.op.where(mask.expr, rows.expr, relax.const(0.0, rows.dtype))
    gathered = [_taken(node, value, row, gather_axis) for value in (data, scales, zero_points)]
    moved = axis + indices.rank - 1 if axis > gather_axis else axis
    values = gathered[0]
    if data.narrow_type is None and bits < 8:
        values = unpacked(node, values, bits, _known(node, values.shape[-1]) * (8 // bits))
    result = _dequantized(node, values, gathered[1], gathered[2], moved, node.integer("block_size", 128))
    spread = [1] * gather_axis + list(indices.shape) + [1] * (data.rank - 1 - gather_axis)
    mask = node.emit(relax.op.reshape(inside.expr, spread))
    return relax.op.where(mask.expr, result.expr, relax.const(0.0, result.dtype))


def _constant_table(node: Node, parts: tuple[Value, Value, Value], bits: int) -> Value | None:
    """Return a constant matrix as its dequantization, which the passes compute gathered rows of from the integers.

    None where a part is no constant, or blocks do not fill the rows.
    """
    data, scales, zero_points = parts
    if any(part.constant is None for part in parts):
        return None
    rows, blocks = (_known(node, size) for size in scales.shape)
    size = node.integer("block_size", 128)
    values = data if data.narrow_type is not None else unpacked(node, data, bits, blocks * size)
    if values.shape != (rows, blocks * size):
        return None
    return _in_blocks(node, values, scales, zero_points, (rows, blocks, size))


def unpacked(node: Node, packed: Value, bits: int, count: int) -> Value:
    """Return the `count` unsigned integers of `bits` bits along the last axis of uint8 data, low bits first."""
    if bits == 8:
        return packed
    per_byte, mask = 8 // bits, (1 << bits) - 1
    if packed.constant is not None:
        shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
        parts = (packed.constant[..., None] >> shifts) & np.uint8(mask)
        return node.constant(np.ascontiguousarray(parts.reshape(*packed.constant.shape[:-1], -1)[..., :count]))
    shifts = relax.const(np.arange(per_byte, dtype=np.uint8) * np.uint8(bits))
    spread = node.emit(relax.op.expand_dims(packed.expr, packed.rank))
    shifted = relax.op.bitwise_and(relax.op.right_shift(spread.expr, shifts), relax.const(mask, "uint8"))
    total = _known(node, packed.shape[-1]) * per_byte
    flat = node.emit(relax.op.reshape(node.emit(shifted).expr, (*packed.shape[:-1], total)))
    if total == count:
        return flat
    return node.emit(relax.op.strided_slice(flat.expr, [packed.rank - 1], [0], [count], [1]))


def _zero_points(node: Node, bits: int, shape: tuple[int, int]) -> Value:
    """Return the zero point of each block, as integers or floats; by default the middle of the range, a scalar."""
    given = node.optional_input(3)
    if given is None:
        return node.constant(np.array(1 << (bits - 1), np.uint8))
    if given.dtype != "uint8":
        return node.reshape(given, shape)
    return unpacked(node, node.reshape(given, (shape[0], -(-shape[1] * bits // 8))), bits, shape[1])


def _in_blocks(node: Node, weights: Value, scales: Value, zero_points: Value, shape: tuple[int, int, int]) -> Value:
    columns, blocks, size = shape
    apart = node.reshape(weights, shape)
    per_block = (columns, blocks, 1)
    zero = zero_points if zero_points.rank == 0 else node.reshape(zero_points, per_block)
    result = _affine(node, apart, node.reshape(scales, per_block), zero)
    return node.emit(relax.op.reshape(result.expr, (columns, blocks * size)))


def _in_groups(node: Node, weights: Value, scales: Value, zero_points: Value, groups: Value) -> Value:
    """Return the weights where input channel k is of the block that `groups[k]` names."""
    padding = _known(node, weights.shape[1]) - _known(node, groups.shape[0])
    if padding:
        weights = node.emit(relax.op.strided_slice(weights.expr, [1], [0], [groups.shape[0]], [1]))
    per_channel = [
        value if value.rank == 0 else standard(node, "Gather", value, groups, axis=1) for value in (scales, zero_points)
    ]
    return _affine(node, weights, per_channel[0], per_channel[1])


def _dequantized(node: Node, values: Value, scales: Value, zero_points: Value, axis: int, block_size: int) -> Value:
    """Return (values - zero point) * scale with one scale and zero point to `block_size` values along `axis`."""
    length, blocks = _known(node, values.shape[axis]), _known(node, scales.shape[axis])
    repeated = [
        value if value.rank == 0 else node.emit(relax.op.repeat(value.expr, block_size, axis))
        for value in (scales, zero_points)
    ]
    if blocks * block_size != length:
        repeated = [
            value if value.rank == 0 else node.emit(relax.op.strided_slice(value.expr, [axis], [0], [length], [1]))
            for value in repeated
        ]
    return _affine(node, values, repeated[0], repeated[1])


def _affine(node: Node, values: Value, scales: Value, zero_points: Value) -> Value:
    shifted = relax.op.subtract(*(converted(node, value, scales.dtype).expr for value in (values, zero_points)))
    return node.emit(relax.op.multiply(node.emit(shifted).expr, scales.expr))


def _default_zero_points(node: Node, data: Value) -> Value:
    middle = 0 if data.narrow_type is not None else 1 << (node.integer("bits", 4) - 1)
    return node.constant(np.array(middle, data.dtype))


def _checked_indices(node: Node, indices: Value, count: int) -> tuple[Value, Value]:
    """Return the indices counted from the front and clipped, and which of them lay inside the axis."""
    size = relax.const(count, indices.dtype)
    zero = relax.const(0, indices.dtype)
    negative = relax.op.less(indices.expr, zero)
    row = node.emit(relax.op.where(negative, relax.op.add(indices.expr, size), indices.expr))
    inside = relax.op.logical_and(relax.op.greater_equal(row.expr, zero), relax.op.less(row.expr, size))
    return row, node.emit(inside)


def _taken(node: Node, value: Value, indices: Value, axis: int) -> Value:
    return value if value.rank == 0 else node.emit(relax.op.take(value.expr, indices.expr, axis=axis, mode="clip"))


def _known(node: Node, dimension: Dimension) -> int:
    if not isinstance(dimension, int):
        raise node.unsupported("the shape of the quantized data must be known at compile time")
    return dimension
