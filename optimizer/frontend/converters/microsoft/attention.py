"""Attention of com.microsoft without grouped heads: MultiHeadAttention, Attention, QAttention, RotaryEmbedding."""

from __future__ import annotations

import numpy as np
from tvm import relax

from optimizer.frontend.converters.microsoft.masks import mask_biases
from optimizer.frontend.converters.microsoft.matrix_product import scaled_integer_product
from optimizer.frontend.converters.microsoft.standard import standard
from optimizer.frontend.dimensions import Dimension
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter
from optimizer.frontend.rotary import angles_at, rotated
from optimizer.frontend.scaled_dot_product import (
    attend,
    heads_apart,
    merge_heads,
    positions,
    split_heads,
)
from optimizer.frontend.value import TensorValue, Value

Heads = tuple[Value, Value, Value]  # query, key and value with their heads apart: [B, H, S, D]


@converter("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(node: Node) -> Result:
    """Convert MultiHeadAttention: attention of projected queries, keys and values, whose projection bias is added."""
    if node.has_input(8) or node.has_input(9):
        raise node.unsupported("past buffers longer than the past (past_sequence_length, cache_indirection)")
    if node.has_output(3):
        raise node.unsupported("the output qk is not supported")
    query, key, value = _projected_heads(node, node.integer("num_heads"))
    if node.has_input(6) != node.has_input(7):
        raise node.unsupported("past_key and past_value go together")
    past: Dimension = 0
    if node.has_input(6):
        past = node.input(6).shape[2]
        key, value = (_appended(node, node.input(6 + i), part) for i, part in enumerate((key, value)))
    biases = mask_biases(node, node.optional_input(4), query, key, past)
    extra = node.optional_input(5)
    result = attend(node, query, key, value, scale=_scale(node), bias=biases if extra is None else [*biases, extra])
    return [merge_heads(node, result.output), key, value]


@converter("Attention", domain=MICROSOFT)
def attention(node: Node) -> Result:
    """Convert Attention: self-attention with its input projection; past and present hold keys and values stacked."""
    if node.integer("do_rotary", 0) or node.integer("past_present_share_buffer", 0) or node.has_input(6):
        raise node.unsupported("rotary embedding and shared past buffers are not supported")
    projected = standard(node, "MatMul", node.input(0), node.input(1))
    if node.has_input(2):
        projected = standard(node, "Add", projected, node.input(2))
    return _self_attention(node, projected, mask=node.optional_input(3), past=node.optional_input(4), extra=5)


@converter("QAttention", domain=MICROSOFT)
def quantized_attention(node: Node) -> Result:
    """Convert QAttention: Attention whose input projection is a product of 8-bit integers."""
    if node.integer("do_rotary", 0) or node.integer("past_present_share_buffer", 0):
        raise node.unsupported("rotary embedding and shared past buffers are not supported")
    left = (node.input(0), node.input(3), node.optional_input(6))
    right = (node.input(1), node.input(4), node.optional_input(7))
    projected = scaled_integer_product(node, left, right, node.input(2))
    return _self_attention(node, projected, mask=node.optional_input(5), past=node.optional_input(8), extra=None)


@converter("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(node: Node) -> Result:
    """Convert RotaryEmbedding: rotate pairs of channels by the angles of `position_ids`.

    One position id is the position of the first token of every row.
    """
    if node.integer("is_packed_batching", 0) or node.float("scale", 1.0) != 1.0:
        raise node.unsupported("packed batches and a scale are not supported")
    data, place = node.input(0), node.input(1)
    head_axis = 1 if data.rank == 4 else 2
    batch, length = data.shape[0], data.shape[2 if data.rank == 4 else 1]
    if place.rank == 1:
        row = node.emit(relax.op.add(relax.op.reshape(positions(0, length), (1, length)), place.expr))
        place = node.emit(relax.op.broadcast_to(row.expr, (batch, length)))
    apart = data if data.rank == 4 else heads_apart(node, data, _rotary_heads(node, data))
    cosines, sines = (angles_at(node, node.input(index), place) for index in (2, 3))
    interleaved = bool(node.integer("interleaved", 0))
    turned = rotated(node, apart, cosines, sines, head_axis=head_axis, interleaved=interleaved)
    return turned if data.rank == 4 else relax.op.reshape(turned.expr, data.shape)


def _rotary_heads(node: Node, data: Value) -> int:
    """Return the number of heads: given with a partial rotation, else from the width of the caches."""
    heads = node.integer("num_heads", 0)
    if heads:
        return heads
    hidden, half = data.shape[2], node.input(2).shape[1]
    if not isinstance(hidden, int) or not isinstance(half, int):
        raise node.unsupported("the hidden size and the width of the caches must be known at compile time")
    return hidden // (2 * half)


def _projected_heads(node: Node, heads: int) -> Heads:
    """Return query, key and value of MultiHeadAttention from any of the forms that its inputs take."""
    query, key, value = node.input(0), node.optional_input(1), node.optional_input(2)
    if node.has_input(3) and (query.rank == 5 or (key is not None and key.rank == 5)):
        raise node.unsupported("a bias together with packed inputs is not supported")
    if query.rank == 5:
        query_part, key_part, value_part = _unpacked(node, query, 3)
        return query_part, key_part, value_part
    bias = _split_bias(node, query, value)
    query_heads = split_heads(node, _biased(node, query, bias[0]), heads)
    if key is None:
        raise node.unsupported("a query of rank 3 needs a key")
    if key.rank == 5:
        key_part, value_part = _unpacked(node, key, 2)
        return query_heads, key_part, value_part
    if value is None or value.rank != key.rank:
        raise node.unsupported("key and value must have the same rank")
    if key.rank == 4:
        return query_heads, key, value
    keys, values = _biased(node, key, bias[1]), _biased(node, value, bias[2])
    return query_heads, split_heads(node, keys, heads), split_heads(node, values, heads)


def _split_bias(node: Node, query: Value, value: Value | None) -> list[Value | None]:
    if not node.has_input(3):
        return [None, None, None]
    hidden = query.shape[2]
    if not isinstance(hidden, int):
        raise node.unsupported("the hidden size must be known at compile time")
    if value is not None and value.rank == 4:
        raise node.unsupported("a bias together with keys and values of rank 4 is not supported")
    return list(node.emit_tuple(relax.op.split(node.expr(3), [hidden, 2 * hidden], axis=0)))


def _biased(node: Node, value: Value, bias: Value | None) -> Value:
    return value if bias is None else standard(node, "Add", value, bias)


def _unpacked(node: Node, packed: Value, count: int) -> list[TensorValue]:
    """Turn [B, S, H, count, D] into `count` tensors [B, H, S, D]."""
    batch, length, heads, _, size = packed.shape
    parts = node.emit_tuple(relax.op.split(packed.expr, count, axis=3))
    flat = [node.emit(relax.op.reshape(part.expr, (batch, length, heads, size))) for part in parts]
    return [node.emit(relax.op.permute_dims(part.expr, [0, 2, 1, 3])) for part in flat]


def _self_attention(
    node: Node, projected: Value, *, mask: Value | None, past: Value | None, extra: int | None
) -> Result:
    """Return output and present of the attention over `projected`: queries, keys and values side by side."""
    heads = node.integer("num_heads")
    hidden = projected.shape[2]
    if not isinstance(hidden, int):
        raise node.unsupported("the width of the projection must be known at compile time")
    sizes = node.integers("qkv_hidden_sizes", [hidden // 3] * 3)
    parts = node.emit_tuple(relax.op.split(projected.expr, [int(i) for i in np.cumsum(sizes[:2])], axis=2))
    query, key, value = (split_heads(node, part, heads) for part in parts)
    before: Dimension = 0
    if past is not None:
        before = past.shape[3]
        stacked = node.emit_tuple(relax.op.split(past.expr, 2, axis=0))
        old = [node.emit(relax.op.squeeze(part.expr, [0])) for part in stacked]
        key, value = _appended(node, old[0], key), _appended(node, old[1], value)
    present = None
    if node.has_output(1):
        halves = [relax.op.expand_dims(part.expr, 0) for part in (key, value)]
        present = node.emit(relax.op.concat([node.emit(half).expr for half in halves], axis=0))
    biases = mask_biases(node, mask, query, key, before)
    if extra is not None and node.has_input(extra):
        biases = [*biases, node.input(extra)]
    result = attend(node, query, key, value, scale=_scale(node), bias=biases)
    return [merge_heads(node, result.output), present]


def _appended(node: Node, past: Value, new: Value) -> TensorValue:
    return node.emit(relax.op.concat([past.expr, new.expr], axis=2))


def _scale(node: Node) -> float | None:
    """Return the scale if one is given; 0 means the default."""
    return node.float("scale", 0.0) or None
