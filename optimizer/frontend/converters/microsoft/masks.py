"""The masks of com.microsoft's attention operators, as biases to be added to the scores.

A masked key gets `mask_filter_value` (-10000 by default), so that a row without any key attends to all of them evenly.
"""

from __future__ import annotations

from tvm import relax

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.dimensions import Dimension, provably_equal, simplified
from optimizer.frontend.node import Node
from optimizer.frontend.scaled_dot_product import bias_where, positions, visible_keys
from optimizer.frontend.value import Value

_MASKED = -10000.0  # the schemas' default
_LOWEST = -3.4028234663852886e38  # of float32


def mask_biases(node: Node, mask: Value | None, query: Value, key: Value, past: Dimension) -> list[Value]:
    """Return the biases that `mask` and the attribute `unidirectional` stand for.

    `mask` is one of: [B] numbers of keys; [2 B] ends, then starts of the keys; [B, T] or [B, S, T] with 0 for masked.
    `past` keys precede the queries.
    """
    dtype = accumulation_dtype(query.dtype)
    rows, columns = query.shape[2], key.shape[2]
    biases: list[Value] = []
    if mask is not None:
        allowed = _allowed(node, mask, query.shape[0], rows, columns)
        biases.append(bias_where(node, allowed, dtype, node.float("mask_filter_value", _MASKED)))
    if node.integer("unidirectional", 0):
        biases.append(bias_where(node, visible_keys(node, rows, columns, past), dtype, _LOWEST))
    return biases


def _allowed(node: Node, mask: Value, batch: Dimension, rows: Dimension, columns: Dimension) -> Value:
    """Return which keys the mask allows: bool [B, 1, 1, T] or [B, 1, S, T]."""
    zero = relax.const(0, mask.dtype)
    if mask.rank == 2:
        given = node.reshaped_type(mask, (batch, columns))
        return node.emit(relax.op.greater(relax.op.reshape(given, (batch, 1, 1, columns)), zero))
    if mask.rank == 3:
        given = node.reshaped_type(mask, (batch, rows, columns))
        return node.emit(relax.op.greater(relax.op.reshape(given, (batch, 1, rows, columns)), zero))
    if mask.rank != 1:
        raise node.unsupported(f"a mask of rank {mask.rank} is not supported")
    place = node.emit(relax.op.astype(positions(0, columns), mask.dtype)).expr
    if provably_equal(mask.shape[0], simplified(2 * batch)):
        ends, starts = node.emit_tuple(relax.op.split(mask.expr, 2, axis=0))
        before = relax.op.less(place, relax.op.reshape(ends.expr, (batch, 1, 1, 1)))
        after = relax.op.greater_equal(place, relax.op.reshape(starts.expr, (batch, 1, 1, 1)))
        return node.emit(relax.op.logical_and(before, after))
    ends = node.reshaped_type(mask, (batch,))
    return node.emit(relax.op.less(place, relax.op.reshape(ends, (batch, 1, 1, 1))))
