"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864) composed of Relax operators."""

from __future__ import annotations

from tvm import relax

from optimizer.frontend.dimensions import Dimension
from optimizer.frontend.node import Node
from optimizer.frontend.value import TensorValue, Value


def rotated(node: Node, data: Value, cosines: Value, sines: Value, *, head_axis: int, interleaved: bool) -> TensorValue:
    """Rotate pairs of the last axis of `data` by the angles of their positions.

    `data` is rank 4 with heads on `head_axis` (1 or 2) and positions on the other of the two. `cosines` and `sines`
    are [B, S, R / 2]; the last axis of `data` beyond R is passed through. A pair is (i, i + R / 2), or (2 i, 2 i + 1)
    if `interleaved`.
    """
    half = cosines.shape[-1]
    size = data.shape[-1]
    if not isinstance(half, int) or not isinstance(size, int) or 2 * half > size:
        raise node.unsupported(f"{half} rotation angles do not fit a head size of {size}")
    turning, kept = data.expr, None
    if 2 * half < size:
        parts = node.emit_tuple(relax.op.split(data.expr, [2 * half], axis=-1))
        turning, kept = parts[0].expr, parts[1].expr
    cosine = _with_head_axis(node, cosines, head_axis)
    sine = _with_head_axis(node, sines, head_axis)
    outer = data.shape[:-1]
    if interleaved:
        first, second = _interleaved_pairs(node, turning, outer, half)
    else:
        first, second = (part.expr for part in node.emit_tuple(relax.op.split(turning, 2, axis=-1)))
    real = relax.op.subtract(relax.op.multiply(first, cosine), relax.op.multiply(second, sine))
    imaginary = relax.op.add(relax.op.multiply(first, sine), relax.op.multiply(second, cosine))
    parts = (node.emit(real).expr, node.emit(imaginary).expr)
    result = _interleaved(node, parts, outer, half) if interleaved else relax.op.concat(parts, axis=-1)
    return node.emit(result if kept is None else relax.op.concat([node.emit(result).expr, kept], axis=-1))


def angles_at(node: Node, cache: Value, positions: Value) -> TensorValue:
    """Return the rows of a cache [length, R / 2] at `positions` [B, S]; a position outside the cache gives NaN."""
    return node.emit(relax.op.take(cache.expr, positions.expr, axis=0, mode="nan"))


def _with_head_axis(node: Node, angles: Value, head_axis: int) -> relax.Expr:
    return node.emit(relax.op.expand_dims(angles.expr, head_axis)).expr


def _interleaved_pairs(
    node: Node, data: relax.Expr, outer: tuple[Dimension, ...], half: int
) -> tuple[relax.Expr, relax.Expr]:
    paired = node.emit(relax.op.reshape(data, (*outer, half, 2)))
    first, second = node.emit_tuple(relax.op.split(paired.expr, 2, axis=-1))
    return relax.op.squeeze(first.expr, [-1]), relax.op.squeeze(second.expr, [-1])


def _interleaved(
    node: Node, parts: tuple[relax.Expr, relax.Expr], outer: tuple[Dimension, ...], half: int
) -> relax.Expr:
    apart = [node.emit(relax.op.expand_dims(part, len(outer) + 1)).expr for part in parts]
    return relax.op.reshape(node.emit(relax.op.concat(apart, axis=-1)).expr, (*outer, 2 * half))
