"""The standard attention operators: Attention (opset 23 and later) and RotaryEmbedding."""

from __future__ import annotations

import onnx
from tvm import relax

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.dimensions import Dimension, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.rotary import angles_at, rotated
from optimizer.frontend.scaled_dot_product import (
    Attention,
    attend,
    bias_where,
    converted,
    heads_apart,
    merge_heads,
    padded_last_axis,
    positions,
    split_heads,
    visible_keys,
)
from optimizer.frontend.value import TensorValue, Value


@converter("Attention", since=23)
def attention(node: Node) -> Result:
    """Convert Attention: scaled dot-product attention, heads grouped, with past and present keys and values."""
    flat = node.input(0).rank == 3
    if any(node.input(index).rank != node.input(0).rank for index in (1, 2)) or node.input(0).rank not in (3, 4):
        raise node.unsupported("Q, K and V must all have rank 3, or all rank 4")
    query = split_heads(node, node.input(0), node.integer("q_num_heads")) if flat else node.input(0)
    key = _with_past(node, _key_or_value(node, 1), node.optional_input(4))
    value = _with_past(node, _key_or_value(node, 2), node.optional_input(5))
    if node.has_input(4) != node.has_input(5) or (node.has_input(4) and node.has_input(6)):
        raise node.unsupported("past_key and past_value go together, and not with nonpad_kv_seqlen")
    past = node.input(4).shape[2] if node.has_input(4) else 0
    biases, rows_may_be_masked = _biases(node, query, key, past)
    result = attend(
        node,
        query,
        key,
        value,
        scale=node.float("scale") if node.has_attribute("scale") else None,
        soft_cap=node.float("softcap", 0.0),
        bias=biases,
        softmax_dtype=_softmax_dtype(node, query.dtype),
        zero_masked_rows=rows_may_be_masked,
    )
    output = merge_heads(node, result.output) if flat else result.output
    scores = converted(node, _exposed_scores(node, result), query.dtype) if node.has_output(3) else None
    return [output, key, value, scores]


@converter("RotaryEmbedding", since=23)
def rotary_embedding(node: Node) -> Result:
    """Convert RotaryEmbedding: rotate pairs of channels by angles that grow with the position."""
    data = node.input(0)
    cosines, sines = node.input(1), node.input(2)
    if node.has_input(3):
        cosines, sines = (angles_at(node, cache, node.input(3)) for cache in (cosines, sines))
    rotary_size = node.integer("rotary_embedding_dim", 0)
    size = data.shape[-1] if data.rank == 4 else simplified(data.shape[-1] // node.integer("num_heads"))
    half = cosines.shape[-1]
    if cosines.rank != 3 or sines.rank != 3 or (rotary_size or size) != simplified(2 * half):
        raise node.unsupported(f"caches of {half} angles do not fit a rotation of {rotary_size or size} channels")
    interleaved = bool(node.integer("interleaved", 0))
    if data.rank == 4:
        return rotated(node, data, cosines, sines, head_axis=1, interleaved=interleaved)
    apart = heads_apart(node, data, node.integer("num_heads"))
    turned = rotated(node, apart, cosines, sines, head_axis=2, interleaved=interleaved)
    return relax.op.reshape(turned.expr, data.shape)


def _key_or_value(node: Node, index: int) -> Value:
    value = node.input(index)
    return split_heads(node, value, node.integer("kv_num_heads")) if value.rank == 3 else value


def _with_past(node: Node, value: Value, past: Value | None) -> Value:
    return value if past is None else node.emit(relax.op.concat([past.expr, value.expr], axis=2))


def _biases(node: Node, query: Value, key: Value, past: Dimension) -> tuple[list[Value], bool]:
    """Return all that is added to the scores, and whether a query may be left without any key."""
    dtype = accumulation_dtype(query.dtype)
    rows, columns = query.shape[2], key.shape[2]
    biases: list[Value] = []
    offset: Dimension | Value = past
    before, after = node.integer("left_window_size", -1), node.integer("right_window_size", -1)
    if node.has_input(6):
        lengths = converted(node, node.input(6), "int64")
        biases.append(bias_where(node, _padding(node, lengths, columns), dtype))
        offset = node.emit(relax.op.subtract(lengths.expr, _length_tensor(node, rows)))
    if node.has_input(3):
        mask = node.input(3)
        is_boolean = mask.dtype == "bool"
        mask = padded_last_axis(node, mask, columns, False if is_boolean else float("-inf"))
        biases.append(bias_where(node, mask, dtype) if is_boolean else mask)
    if node.integer("is_causal", 0):
        after = 0 if after < 0 else min(after, 0)
    if before >= 0 or after >= 0:
        window = visible_keys(
            node, rows, columns, offset, before=before if before >= 0 else None, after=after if after >= 0 else None
        )
        biases.append(bias_where(node, window, dtype))
    return biases, node.has_input(3) or node.has_input(6) or before >= 0


def _padding(node: Node, lengths: Value, columns: Dimension) -> TensorValue:
    """Return bool [B, 1, 1, T]: which keys lie within each sequence's length."""
    ends = relax.op.reshape(lengths.expr, (lengths.shape[0], 1, 1, 1))
    return node.emit(relax.op.less(node.emit(positions(0, columns)).expr, ends))


def _length_tensor(node: Node, length: Dimension) -> relax.Expr:
    if isinstance(length, int):
        return relax.const(length, "int64")
    return node.emit(relax.op.shape_to_tensor(relax.ShapeExpr([length]))).expr


def _softmax_dtype(node: Node, dtype: str) -> str | None:
    """Return the wider of the asked softmax type and the one that scores are computed in."""
    if not node.has_attribute("softmax_precision"):
        return None
    asked = onnx.helper.tensor_dtype_to_np_dtype(node.integer("softmax_precision")).name
    return "float64" if "float64" in (asked, dtype) else "float32"


def _exposed_scores(node: Node, result: Attention) -> Value:
    mode = node.integer("qk_matmul_output_mode", 0)
    stages = (result.scaled, result.capped, result.biased, result.probabilities)
    if not 0 <= mode < len(stages):
        raise node.unsupported(f"qk_matmul_output_mode {mode} is not defined")
    return stages[mode]
