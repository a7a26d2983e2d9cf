"""Rotary position embedding as the operators of ONNX have it: of some channels of every head, at given positions."""

from __future__ import annotations

from tvm import relax

from optimizer.frontend.dimensions import simplified
from optimizer.frontend.node import Node
from optimizer.frontend.value import TensorValue, Value
from passes.rotary_embedding import rotary_embedding


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
    angles = [_of_each_row(node, part, data, head_axis) for part in (cosines, sines)]
    if 2 * half == size:
        return node.emit(rotary_embedding(data.expr, *angles, interleaved=interleaved))
    turning, kept = node.emit_tuple(relax.op.split(data.expr, [2 * half], axis=-1))
    turned = node.emit(rotary_embedding(turning.expr, *angles, interleaved=interleaved))
    return node.emit(relax.op.concat([turned.expr, kept.expr], axis=-1))


def angles_at(node: Node, cache: Value, positions: Value) -> TensorValue:
    """Return the rows of a cache [length, R / 2] at `positions` [B, S]; a position outside the cache gives NaN."""
    return node.emit(relax.op.take(cache.expr, positions.expr, axis=0, mode="nan"))


def _of_each_row(node: Node, angles: Value, data: Value, head_axis: int) -> relax.Expr:
    """Return angles [B or 1, S or 1, R / 2] with an axis of heads, their rows checked to be those of `data`."""
    batch, length = data.shape[0], data.shape[3 - head_axis]
    rows = [own if own == 1 else wanted for own, wanted in zip(angles.shape[:2], (batch, length), strict=True)]
    checked = node.reshaped_type(angles, (*rows, simplified(angles.shape[2])))
    return node.emit(relax.op.expand_dims(checked, head_axis)).expr
