"""Caches that hold the newest tokens of a sliding window, in the layout of onnxruntime's GroupQueryAttention.

With room for C tokens and a window of W, C at least W, a cache that has seen T tokens holds the newest L of them, in
order from its beginning on; what lies behind is not defined. Tokens go G = C - W + 1 at a time when it is full:
    L(T) = T                          up to T = C
    L(T) = T - G * ceil((T - C) / G)  beyond
(the contract of its attribute `sliding_window_cache`). `all_tokens` gives each token the place that it would have in a
cache of all, and `newest_tokens` is the way back, so that what lies between knows nothing of it.
"""

from __future__ import annotations

from tvm import te, tirx

from optimizer.frontend.dimensions import Dimension, as_expression
from optimizer.frontend.node import Node
from optimizer.frontend.value import TensorValue, Value
from passes.cache_append import NEWEST_TOKENS, WINDOW


def all_tokens(node: Node, cache: Value, counts: Value, length: Dimension, window: int) -> TensorValue:
    """Return [B, G, length, D] with token t at t, of a `cache` that has seen `counts` [B] tokens; others are zeros."""

    def restore(held: te.Tensor, seen: te.Tensor, tokens: tirx.PrimExpr) -> te.Tensor:
        room = held.shape[2]

        def element(row: tirx.Var, head: tirx.Var, token: tirx.Var, channel: tirx.Var) -> tirx.PrimExpr:
            count = seen[row].astype("int64")
            place = token - _evicted(count, room, window)
            inside = tirx.all(place >= 0, token < count)
            return tirx.if_then_else(inside, held[row, head, place, channel], tirx.const(0, held.dtype))

        return te.compute((held.shape[0], held.shape[1], tokens, held.shape[3]), element, "all_tokens")

    return node.compute(
        restore,
        *(cache.expr, counts.expr, as_expression(length)),
        primfunc_name_hint="all_tokens",
        primfunc_attrs={NEWEST_TOKENS: window},
    )


def newest_tokens(node: Node, present: Value, last: Value, room: Dimension, window: int) -> TensorValue:
    """Return a cache [B, G, room, D] of all tokens that are `present`, each row's `last` [B] one included."""

    def keep(tokens: te.Tensor, ends: te.Tensor, room: tirx.PrimExpr) -> te.Tensor:
        def element(row: tirx.Var, head: tirx.Var, place: tirx.Var, channel: tirx.Var) -> tirx.PrimExpr:
            count = ends[row].astype("int64") + 1
            token = place + _evicted(count, room, window)
            inside = tirx.all(token < count, token < tokens.shape[2])
            return tirx.if_then_else(inside, tokens[row, head, token, channel], tirx.const(0, tokens.dtype))

        return te.compute((tokens.shape[0], tokens.shape[1], room, tokens.shape[3]), element, "newest_tokens")

    return node.compute(
        keep,
        *(present.expr, last.expr, as_expression(room)),
        primfunc_name_hint="newest_tokens",
        primfunc_attrs={NEWEST_TOKENS: window, WINDOW: window},
    )


def _evicted(count: tirx.PrimExpr, room: tirx.PrimExpr, window: int) -> tirx.PrimExpr:
    """Return how many of the first tokens a cache does not hold any more: count - L(count)."""
    # A room below the window is not allowed; it is not divided by.
    at_once = tirx.max(room - (window - 1), tirx.const(1, "int64"))
    beyond = tirx.max(count - room, tirx.const(0, "int64"))
    return tirx.floordiv(beyond + at_once - 1, at_once) * at_once
