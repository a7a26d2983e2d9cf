"""Scaled dot-product attention composed of Relax operators, as the attention operators of all domains import it.

Every one of them becomes the same chain, so that later passes have one structure to recognise:
`matmul(query, transpose(key))`, multiply by the scale, [soft cap], [add bias], softmax, `matmul(probabilities, value)`.
Shapes: query [B, H, S, D], key [B, G, T, D], value [B, G, T, E] where G divides H; scores [B, H, S, T].
16-bit inputs are accumulated, capped, masked and normalized in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax, te, tirx

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.dimensions import Dimension, as_expression, provably_equal, simplified
from optimizer.frontend.node import Node
from optimizer.frontend.value import TensorValue, Value

_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class Attention:
    """The stages of one attention: scores before and after the soft cap and the bias, probabilities, and the output.

    The scores and probabilities are of the type that they are computed in; the output is of the value's type.
    """

    scaled: TensorValue
    capped: TensorValue
    biased: TensorValue
    probabilities: TensorValue
    output: Value


def attend(
    node: Node,
    query: Value,
    key: Value,
    value: Value,
    *,
    scale: float | None = None,
    soft_cap: float = 0.0,
    bias: Sequence[Value] = (),
    sink: Value | None = None,
    softmax_dtype: str | None = None,
    zero_masked_rows: bool = False,
) -> Attention:
    """Emit attention of `query` over `key` and `value`.

    `scale` is 1/sqrt(D) by default. `soft_cap` c > 0 maps scores to c * tanh(scores / c). Every `bias` broadcasts to
    the scores and is added to them after the cap. `sink` [H] adds exp(sink) to each softmax denominator.
    `zero_masked_rows` gives probability 0, in place of NaN, to a row whose whole bias is -inf.
    """
    dtype = accumulation_dtype(query.dtype)
    scale = 1.0 / math.sqrt(_static(node, query.shape[3], "head size")) if scale is None else scale
    products = _grouped_matmul(node, query, _transposed(node, key), dtype)
    scaled = products if scale == 1.0 else node.emit(relax.op.multiply(products.expr, relax.const(scale, dtype)))
    capped = scaled
    if soft_cap > 0.0:
        cap = relax.const(soft_cap, dtype)
        capped = node.emit(relax.op.multiply(relax.op.tanh(relax.op.divide(scaled.expr, cap)), cap))
    biased = capped
    total_bias = _sum_of_biases(node, bias, dtype)
    if total_bias is not None:
        biased = node.emit(relax.op.add(*node.broadcast_operands(capped, total_bias)))
    probabilities = _softmax(node, biased, sink, softmax_dtype or dtype)
    if zero_masked_rows and total_bias is not None:
        probabilities = _with_masked_rows_zeroed(node, probabilities)
    weights = converted(node, probabilities, value.dtype)
    output = converted(node, _grouped_matmul(node, weights, value, accumulation_dtype(value.dtype)), value.dtype)
    return Attention(scaled, capped, biased, probabilities, output)


def converted(node: Node, value: Value, dtype: str) -> Value:
    """Return `value` in another element type."""
    return value if value.dtype == dtype else node.emit(relax.op.astype(value.expr, dtype))


def split_heads(node: Node, value: Value, heads: int) -> TensorValue:
    """Turn [B, S, H * D] into [B, H, S, D]."""
    return node.emit(relax.op.permute_dims(heads_apart(node, value, heads).expr, [0, 2, 1, 3]))


def heads_apart(node: Node, value: Value, heads: int) -> TensorValue:
    """Turn [B, S, H * D] into [B, S, H, D]."""
    batch, length, hidden = value.shape
    size, rest = divmod(_static(node, hidden, "hidden size"), heads)
    if rest:
        raise node.unsupported(f"a hidden size of {hidden} is not a multiple of {heads} heads")
    return node.emit(relax.op.reshape(value.expr, (batch, length, heads, size)))


def merge_heads(node: Node, value: Value) -> TensorValue:
    """Turn [B, H, S, D] into [B, S, H * D]."""
    batch, heads, length, size = value.shape
    joined = node.emit(relax.op.permute_dims(value.expr, [0, 2, 1, 3]))
    return node.emit(
        relax.op.reshape(
            joined.expr,
            (
                batch,
                length,
                simplified(heads * size),
            ),
        )
    )


def positions(start: Dimension, count: Dimension) -> relax.Expr:
    """Return the int64 vector start, start + 1, ..., of `count` elements."""
    return relax.op.arange(as_expression(start), as_expression(simplified(start + count)), 1, "int64")


def visible_keys(
    node: Node,
    queries: Dimension,
    keys: Dimension,
    offset: Dimension | Value,
    *,
    before: int | None = None,
    after: int | None = 0,
) -> TensorValue:
    """Return which key each query may see: bool [S, T], or [B, 1, S, T] if `offset` differs by batch.

    Query i stands at position p = i + offset and sees the keys from p - before to p + after; None is no limit.
    `offset` is a dimension or an integer tensor [B].
    """
    columns = node.emit(positions(0, keys)).expr
    if isinstance(offset, Value):
        rows = node.emit(relax.op.reshape(positions(0, queries), (1, 1, queries, 1)))
        offsets = relax.op.reshape(converted(node, offset, "int64").expr, (offset.shape[0], 1, 1, 1))
        rows = node.emit(relax.op.add(rows.expr, offsets)).expr
    else:
        rows = node.emit(relax.op.reshape(positions(offset, queries), (queries, 1))).expr
    conditions: list[relax.Expr] = []
    if after is not None:
        conditions.append(relax.op.less_equal(columns, _shifted(rows, after)))
    if before is not None:
        conditions.append(relax.op.greater_equal(columns, _shifted(rows, -before)))
    visible = conditions[0] if len(conditions) == 1 else relax.op.logical_and(*conditions)
    return node.emit(visible)


def bias_where(node: Node, allowed: Value, dtype: str, masked: float = _NEGATIVE_INFINITY) -> TensorValue:
    """Return 0 where the boolean `allowed` holds, else `masked`."""
    return node.emit(relax.op.where(allowed.expr, relax.const(0.0, dtype), relax.const(masked, dtype)))


def padded_last_axis(node: Node, value: Value, length: Dimension, fill: float | bool) -> Value:
    """Return `value` with its last axis filled up to `length` at the end."""
    if provably_equal(value.shape[-1], length):
        return value

    def pad(data: te.Tensor, width: tirx.PrimExpr) -> te.Tensor:
        def element(*indices: tirx.Var) -> tirx.PrimExpr:
            filler = tirx.const(fill, str(data.dtype))
            return tirx.if_then_else(indices[-1] < data.shape[-1], data(*indices), filler)

        return te.compute((*data.shape[:-1], width), element, name="pad_last_axis")

    return node.compute(pad, value.expr, as_expression(length), primfunc_name_hint="pad_last_axis")


def _shifted(rows: relax.Expr, distance: int) -> relax.Expr:
    return relax.op.add(rows, relax.const(distance, "int64")) if distance else rows


def _transposed(node: Node, key: Value) -> TensorValue:
    return node.emit(relax.op.permute_dims(key.expr, [0, 1, 3, 2]))


def _grouped_matmul(node: Node, left: Value, right: Value, dtype: str) -> TensorValue:
    """Multiply [B, H, S, K] by [B, G, K, N]: each of the G matrices serves H / G adjacent heads.

    The heads of a group are stacked along S, so that no matrix is repeated in memory.
    """
    batch, heads, rows, inner = left.shape
    groups, columns = _static(node, right.shape[1], "number of key heads"), right.shape[3]
    per_group, rest = divmod(_static(node, heads, "number of query heads"), groups)
    if rest:
        raise node.unsupported(f"{heads} query heads are not a multiple of {groups} key heads")
    stacked = left.expr
    if per_group > 1:
        stacked = node.emit(relax.op.reshape(stacked, (batch, groups, simplified(rows * per_group), inner))).expr
    matched = node.reshaped_type(right, (batch, groups, inner, columns))
    result = node.emit(relax.op.matmul(stacked, matched, out_dtype=dtype))
    if per_group > 1:
        result = node.emit(relax.op.reshape(result.expr, (batch, heads, rows, columns)))
    return result


def _sum_of_biases(node: Node, biases: Sequence[Value], dtype: str) -> Value | None:
    total: Value | None = None
    for bias in biases:
        term = converted(node, bias, dtype)
        total = term if total is None else node.emit(relax.op.add(*node.broadcast_operands(total, term)))
    return total


def _softmax(node: Node, scores: TensorValue, sink: Value | None, dtype: str) -> TensorValue:
    scores = node.emit(converted(node, scores, dtype).expr) if scores.dtype != dtype else scores
    if sink is None:
        return node.emit(relax.op.nn.softmax(scores.expr, axis=-1))
    batch, heads, rows, columns = scores.shape
    column = relax.op.reshape(converted(node, sink, dtype).expr, (1, heads, 1, 1))
    column = node.emit(relax.op.broadcast_to(column, (batch, heads, rows, 1)))
    extended = node.emit(relax.op.concat([scores.expr, column.expr], axis=3))
    normalized = node.emit(relax.op.nn.softmax(extended.expr, axis=-1))
    return node.emit(relax.op.strided_slice(normalized.expr, [3], [0], [columns], [1]))


def _with_masked_rows_zeroed(node: Node, probabilities: TensorValue) -> TensorValue:
    # Softmax is 0 / 0 where every score is -inf; written as exporters write it, the form that attention is known by.
    empty = node.emit(relax.op.isnan(probabilities.expr))
    zero = relax.const(0.0, probabilities.dtype)
    return node.emit(relax.op.where(empty.expr, zero, probabilities.expr))


def _static(node: Node, dimension: Dimension, what: str) -> int:
    if not isinstance(dimension, int):
        raise node.unsupported(f"the {what} must be known at compile time")
    return dimension
