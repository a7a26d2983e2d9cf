"""GroupQueryAttention: the attention of exported decoders, with its key-value cache and rotary embedding.

Of each row b, `seqlens_k[b] + 1` positions are in use after the step, the last S of them being new, unless the whole
step is a prompt (S equals `total_sequence_length`): then all S are new, and a shorter row is padded at its end.
present [B, G, max(total_sequence_length, past length), D] holds the row's past, its new keys or values, and zeros.
Queries attend to the first `total_sequence_length` positions T of it, as far as their row reaches.
With `sliding_window_cache`, past and present hold the newest tokens alone (`optimizer/frontend/window_sized_cache.py`).
With `k_scale` and `v_scale` they hold codes (`optimizer/frontend/coded_cache.py`): new keys and values are rounded to
them, and all that is attended to is read from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import relax, te, tirx

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.coded_cache import cache_codes
from optimizer.frontend.converters.microsoft.standard import standard
from optimizer.frontend.dimensions import Dimension, as_expression, provably_equal, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter
from optimizer.frontend.rotary import angles_at, rotated
from optimizer.frontend.scaled_dot_product import (
    Attention,
    attend,
    bias_where,
    converted,
    merge_heads,
    positions,
    split_heads,
    visible_keys,
)
from optimizer.frontend.value import TensorValue, Value
from optimizer.frontend.window_sized_cache import all_tokens, newest_tokens
from passes.cache_append import APPENDS_BY_ROW, WINDOW
from schedules.cache_pages import READS_IN_PLACE

_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class _Step:
    """Where the new tokens stand: S, T and the cache's length; for each row its past length and its last position.

    Of a sliding window W, `seen` keys from each row's `first` one on are what its queries may see: min(T, W + S - 1).
    """

    length: Dimension
    total: Dimension
    cache: Dimension
    past: Value
    last: Value
    seen: Dimension
    first: Value | None = None


@converter("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(node: Node) -> Result:
    """Convert GroupQueryAttention: causal attention of H query heads over G key heads and their cache."""
    _check(node)
    query, key, value = _heads(node)
    query, key = (_normalized(node, part, index) for part, index in ((query, 14), (key, 15)))
    codes = cache_codes(node)
    for past in filter(None, map(node.optional_input, (3, 4))):
        # Exporters may leave the size of a cached head open, in case it is stored in fewer bits.
        node.graph.symbols.fix(past.shape[3], key.shape[3] if codes is None else codes.width(node, key))
    step = _step(node, query.shape[2])
    if node.integer("do_rotary", 0):
        place = _positions(node, step)
        cosines, sines = (angles_at(node, node.input(index), place) for index in (7, 8))
        interleaved = bool(node.integer("rotary_interleaved", 0))
        query, key = (
            rotated(node, part, cosines, sines, head_axis=1, interleaved=interleaved) for part in (query, key)
        )
    if codes is not None:
        key, value = (codes.encoded(node, part, index) for part, index in ((key, 12), (value, 13)))
    present_key, present_value = (
        _present(node, part, _past(node, index, step), step) for part, index in ((key, 3), (value, 4))
    )
    kept = [_kept(node, part, index, step) for part, index in ((present_key, 3), (present_value, 4))]
    step = _within_window(node, step)
    allowed = _allowed(node, step)
    biases: list[Value] = [bias_where(node, allowed, accumulation_dtype(query.dtype))]
    key, value = (_in_use(node, part, step) for part in (present_key, present_value))
    if codes is not None:
        key, value = (codes.decoded(node, part, index, query.dtype) for part, index in ((key, 12), (value, 13)))
    result = attend(
        node,
        query,
        key,
        value,
        scale=node.float("scale", 0.0) or None,
        soft_cap=node.float("softcap", 0.0),
        bias=[*biases, node.input(10)] if node.has_input(10) else biases,
        sink=_sink(node),
        zero_masked_rows=node.integer("local_window_size", -1) > 0,
    )
    scores = _exposed_scores(node, result, allowed)
    return [
        merge_heads(node, result.output),
        *kept,
        None if scores is None else converted(node, scores, query.dtype),
    ]


def _check(node: Node) -> None:
    if node.has_input(3) != node.has_input(4):
        raise node.unsupported("past_key and past_value go together")
    if _has_window_sized_cache(node) and node.integer("local_window_size", -1) <= 0:
        raise node.unsupported("sliding_window_cache needs a local_window_size")


def _heads(node: Node) -> tuple[Value, Value, Value]:
    """Return query [B, H, S, D], key and value [B, G, S, D]."""
    heads, groups = node.integer("num_heads"), node.integer("kv_num_heads")
    if node.has_input(1):
        counts = (heads, groups, groups)
        query, key, value = (split_heads(node, node.input(i), count) for i, count in enumerate(counts))
        return query, key, value
    together = split_heads(node, node.input(0), heads + 2 * groups)
    query, key, value = node.emit_tuple(relax.op.split(together.expr, [heads, heads + groups], axis=1))
    return query, key, value


def _normalized(node: Node, heads: Value, index: int) -> Value:
    """Return queries or keys divided by the root mean square of each head, and scaled, if an input says by what."""
    scale = node.optional_input(index)
    if scale is None:
        return heads
    epsilon = node.float("qk_norm_epsilon", _NORM_EPSILON)
    return standard(node, "RMSNormalization", heads, scale, axis=-1, epsilon=epsilon)


def _step(node: Node, length: Dimension) -> _Step:
    (total,) = node.shape_argument(6)
    batch = node.input(0).shape[0]
    ends = node.input(5)
    ends = node.emit(relax.op.reshape(ends.expr, (batch,))) if ends.rank != 1 else ends

    if provably_equal(total, length):
        past = node.emit(relax.op.zeros((batch,), "int64"))
    else:
        sizes = (as_expression(total), as_expression(length))
        past = node.compute(_past_positions, ends.expr, *sizes, primfunc_name_hint="past_positions")
    return _Step(length, total, _cache_length(node, total), past, ends, total)


def _within_window(node: Node, step: _Step) -> _Step:
    """Return the step with positions counted from the first key that any query of the row may see."""
    window = _window(node)
    if window is None:
        return step
    reach = as_expression(simplified(step.length + (window - 1)))
    seen = node.graph.bound_dimension(tirx.min(as_expression(step.total), reach), "seen")

    def first(past: te.Tensor, new: tirx.PrimExpr, keys: tirx.PrimExpr) -> te.Tensor:
        return te.compute(
            past.shape, lambda row: tirx.max(past[row] + new - keys, tirx.const(0, "int64")), "first_seen"
        )

    begin = node.compute(first, step.past.expr, as_expression(step.length), seen, primfunc_name_hint="first_seen")
    past, last = (
        node.emit(relax.op.subtract(converted(node, each, "int64").expr, begin.expr)) for each in (step.past, step.last)
    )
    return replace(step, past=past, last=last, seen=seen, first=begin)


def _window(node: Node) -> int | None:
    """Return the size of the sliding window if keys beyond it need not be read: if nothing else knows of them."""
    window = node.integer("local_window_size", -1)
    alone = not node.has_input(10) and not (node.has_output(3) and node.integer("qk_output", 0))
    return window if window > 0 and alone and node.integer("causal", 1) and node.has_input(3) else None


def _past_positions(last: te.Tensor, total: tirx.PrimExpr, length: tirx.PrimExpr) -> te.Tensor:
    """Return how many positions precede the new ones: [B]; `last` holds each row's last position."""

    def element(row: tirx.Var) -> tirx.PrimExpr:
        past = last[row].astype("int64") + 1 - length
        return tirx.Select(tirx.EQ(total, length), tirx.const(0, "int64"), past)

    return te.compute(last.shape, element, name="past_positions")


def _cache_length(node: Node, total: Dimension) -> Dimension:
    """Return the greater one of the total length and the length of the past; a symbol if that is not known."""
    if _has_window_sized_cache(node):
        return total
    past_length = node.input(3).shape[2] if node.has_input(3) else 0
    wide, narrow = as_expression(total), as_expression(past_length)
    if node.graph.symbols.proves(wide >= narrow):
        return total
    if node.graph.symbols.proves(narrow >= wide):
        return past_length
    return node.graph.bound_dimension(tirx.max(wide, narrow), "cache_length")


def _has_window_sized_cache(node: Node) -> bool:
    return bool(node.integer("sliding_window_cache", 0)) and node.has_input(3)


def _past(node: Node, index: int, step: _Step) -> Value | None:
    """Return past keys or values, each token at its own position, if the node is given any."""
    past = node.optional_input(index)
    if past is None or not _has_window_sized_cache(node):
        return past
    length = simplified(as_expression(step.total) - as_expression(step.length))
    return all_tokens(node, past, step.past, length, node.integer("local_window_size"))


def _kept(node: Node, present: TensorValue, index: int, step: _Step) -> TensorValue:
    """Return what the node returns of the keys or values after the step."""
    if not _has_window_sized_cache(node):
        return present
    return newest_tokens(node, present, step.last, node.input(index).shape[2], node.integer("local_window_size"))


def _positions(node: Node, step: _Step) -> Value:
    """Return the position of each new token: int64 [B, S]."""
    if node.has_input(9):
        return node.input(9)
    row = relax.op.reshape(positions(0, step.length), (1, step.length))
    return node.emit(relax.op.add(row, relax.op.expand_dims(step.past.expr, 1)))


def _present(node: Node, new: Value, past: Value | None, step: _Step) -> TensorValue:
    """Return the cache after the step: [B, G, cache length, D]."""
    batch, groups, length, size = new.shape
    if past is None:
        if provably_equal(step.cache, length):
            return node.emit(new.expr)
        return node.compute(_padded, new.expr, as_expression(step.cache), primfunc_name_hint="pad_cache")
    old = node.reshaped_type(past, (batch, groups, past.shape[2], size))

    def append(before: te.Tensor, added: te.Tensor, counts: te.Tensor, cache: tirx.PrimExpr) -> te.Tensor:
        def element(row: tirx.Var, head: tirx.Var, place: tirx.Var, channel: tirx.Var) -> tirx.PrimExpr:
            kept = tirx.all(place < counts[row], place < before.shape[2])
            fresh = tirx.all(place >= counts[row], place < counts[row] + added.shape[2])
            rest = tirx.if_then_else(fresh, added[row, head, place - counts[row], channel], tirx.const(0, added.dtype))
            return tirx.if_then_else(kept, before[row, head, place, channel], rest)

        shape = (added.shape[0], added.shape[1], cache, added.shape[3])
        return te.compute(shape, element, name="append_to_cache")

    return node.compute(
        append,
        *(old, new.expr, step.past.expr),
        as_expression(step.cache),
        primfunc_name_hint="append_to_cache",
        primfunc_attrs={APPENDS_BY_ROW: True, **({} if _window(node) is None else {WINDOW: _window(node)})},
    )


def _padded(data: te.Tensor, length: tirx.PrimExpr) -> te.Tensor:
    def element(row: tirx.Var, head: tirx.Var, place: tirx.Var, channel: tirx.Var) -> tirx.PrimExpr:
        inside = place < data.shape[2]
        return tirx.if_then_else(inside, data[row, head, place, channel], tirx.const(0, data.dtype))

    return te.compute((*data.shape[:2], length, data.shape[3]), element, name="pad_cache")


def _in_use(node: Node, present: Value, step: _Step) -> Value:
    """Return the first T positions of the cache, or those that queries of a sliding window may see."""
    if step.first is not None:
        attributes = {READS_IN_PLACE: True, WINDOW: _window(node)}
        arguments = (present.expr, step.first.expr, as_expression(step.seen))
        return node.compute(_read_window, *arguments, primfunc_name_hint="read_window", primfunc_attrs=attributes)
    if provably_equal(step.total, step.cache):
        return present
    return node.emit(relax.op.strided_slice(present.expr, [2], [0], [step.total], [1], assume_inbound=True))


def _read_window(present: te.Tensor, first: te.Tensor, seen: tirx.PrimExpr) -> te.Tensor:
    def element(row: tirx.Var, head: tirx.Var, place: tirx.Var, channel: tirx.Var) -> tirx.PrimExpr:
        return present[row, head, place + first[row], channel]

    return te.compute((present.shape[0], present.shape[1], seen, present.shape[3]), element, "read_window")


def _allowed(node: Node, step: _Step) -> TensorValue:
    """Return which of the keys that are read each query may see: bool [B, 1, S, T]."""
    window = node.integer("local_window_size", -1)
    place = node.emit(positions(0, step.seen))
    last = relax.op.reshape(converted(node, step.last, "int64").expr, (step.last.shape[0], 1, 1, 1))
    in_row = node.emit(relax.op.less_equal(place.expr, last))
    if not node.integer("causal", 1):
        return in_row
    before = window - 1 if window > 0 else None
    causal = visible_keys(node, step.length, step.seen, step.past, before=before)
    return node.emit(relax.op.logical_and(causal.expr, in_row.expr))


def _sink(node: Node) -> Value | None:
    if node.has_input(11):
        return node.input(11)
    if node.integer("smooth_softmax", 0) > 0:
        heads = node.integer("num_heads")
        return node.emit(relax.op.zeros((heads,), node.input(0).dtype))
    return None


def _exposed_scores(node: Node, result: Attention, allowed: Value) -> Value | None:
    """Return the probabilities, or the scores with 0 for masked ones, if the node gives them out."""
    if not node.has_output(3) or not node.integer("qk_output", 0):
        return None
    if node.integer("qk_output") == 2:
        return result.probabilities
    zero = relax.const(0.0, result.biased.dtype)
    visible, scores = node.broadcast_operands(allowed, result.biased)
    return node.emit(relax.op.where(visible, scores, zero))
