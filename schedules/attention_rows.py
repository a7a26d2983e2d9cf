"""The loop nest of attention of few queries, as in decoding: one query of one head a task, keys in memory's order.

What takes the time is reading keys and values once; lanes run along a head's elements, and along the keys in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_structure import AttentionAnalysis
from schedules.family import is_large
from schedules.intrin.vector_math import exp_of_nonpositive
from schedules.loops import (
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    quotient,
    remainder,
    store,
    tiles,
    unflatten,
    unrolled,
    vector,
    with_local,
)
from schedules.reducer import Reducer, fold, lanes_for, load_lanes
from schedules.stages import sequence, substitute

FLOAT = "float32"
LOWEST = -3.4028234663852886e38
# Keys whose products with the query are summed side by side, to hide the latency of a sum.
KEYS_AT_ONCE = 4

_ZERO = tirx.const(0.0, FLOAT)
_SUM = Reducer(lambda a, b: a + b, _ZERO, _ZERO)
_MAXIMUM = Reducer(tirx.max, _ZERO, tirx.const(LOWEST, FLOAT))


@dataclass(frozen=True, eq=False)
class _Row:
    """One query; `weights` holds a block of logits, then of exponentials, `state` the maximum and the sum so far."""

    analysis: AttentionAnalysis
    lanes: int
    point: Mapping[Var, Expr]
    query: Var
    weights: Var
    sums: Var
    partial: Var
    largest: Var
    total: Var
    factor: Var

    def at(self, expression: Expr, axes: Mapping[Var, Expr]) -> Expr:
        """Return `expression` at the task's query and the given values of other axes."""
        return substitute(expression, {**self.point, **axes})


def emit(analysis: AttentionAnalysis, lanes: int, key_block: int) -> Stmt:
    """Return the parallel loop over heads and queries."""
    axes = [*analysis.outer, *([] if analysis.lane is None else [analysis.lane])]
    extents = [axis.extent for axis in axes]

    def task(number: Expr) -> Stmt:
        point = {axis.variable: v for axis, v in zip(axes, unflatten(number, extents), strict=True)}
        buffers = {
            "query": local([analysis.depth.extent], FLOAT, "query"),
            "weights": local([key_block], FLOAT, "weights"),
            "sums": local([analysis.column.extent], FLOAT, "sums"),
            "partial": local([lanes], FLOAT, "partial"),
            **{name: local([1], FLOAT, name) for name in ("largest", "total", "factor")},
        }
        return with_local(list(buffers.values()), _body(_Row(analysis, lanes, point, **buffers), key_block))

    work = product([*extents, analysis.key.extent, analysis.depth.extent])
    return parallel(product(extents), task, is_large(work))


def _body(row: _Row, key_block: int) -> list[Stmt]:
    analysis, zero = row.analysis, index(0)
    keys = analysis.key.extent

    def copy(d: Expr) -> Stmt:
        return store(row.query, row.at(analysis.query, {analysis.depth.variable: d}).astype(FLOAT), [d])

    def block(number: Expr) -> Stmt:
        base = number * key_block
        if isinstance(keys, int) and keys <= key_block:
            return _key_block(row, index(0), keys)
        return _key_block(row, base, tirx.min(index(key_block), index(keys) - base))

    def finish(e: Expr) -> Stmt:
        values = {analysis.column.variable: e}
        value = (load(row.sums, [e]) * load(row.factor, [zero])).astype(analysis.output.dtype)
        return store(analysis.output, value, [row.at(i, values) for i in analysis.indices])

    return [
        _in_vectors(row, analysis.depth.extent, copy),
        store(row.largest, tirx.const(LOWEST, FLOAT), [zero]),
        store(row.total, _ZERO, [zero]),
        _in_vectors(row, analysis.column.extent, lambda e: store(row.sums, _ZERO, [e])),
        loop(ceiling(keys, key_block), block),
        store(row.factor, _inverse(row), [zero]),
        _in_vectors(row, analysis.column.extent, finish),
    ]


def _inverse(row: _Row) -> Expr:
    total = load(row.total, [index(0)])
    inverse = tirx.const(1.0, FLOAT) / total
    return tirx.Select(total > _ZERO, inverse, _ZERO) if row.analysis.zero_if_empty else inverse


def _in_vectors(row: _Row, extent: Extent, element: Callable[[Expr], Stmt]) -> Stmt:
    sizes = [row.lanes] if isinstance(extent, int) else [row.lanes, 1]
    return tiles(extent, sizes, lambda base, width: vector(width, lambda i: element(base + i)))


def _key_block(row: _Row, base: Expr, extent: Extent) -> Stmt:
    """Return the steps of `extent` keys from `base`."""
    zero = index(0)

    def logit(j: Expr) -> Stmt:
        values = {row.analysis.key.variable: base + j, row.analysis.score: load(row.weights, [j])}
        return store(row.weights, row.at(row.analysis.logit, values), [j])

    def exponential(j: Expr) -> Stmt:
        return store(row.weights, exp_of_nonpositive(load(row.weights, [j]) - load(row.largest, [zero])), [j])

    largest = tirx.max(load(row.largest, [zero]), _folded(row, _MAXIMUM))
    total = load(row.total, [zero]) * load(row.factor, [zero]) + _folded(row, _SUM)
    return sequence(
        [
            _products(row, base, extent),
            _in_vectors(row, extent, logit),
            *_reduced(row, extent, _MAXIMUM),
            store(row.factor, load(row.largest, [zero]), [zero]),
            store(row.largest, largest, [zero]),
            store(row.factor, exp_of_nonpositive(load(row.factor, [zero]) - load(row.largest, [zero])), [zero]),
            _in_vectors(row, extent, exponential),
            *_reduced(row, extent, _SUM),
            store(row.total, total, [zero]),
            _weighted(row, base, extent),
        ]
    )


def _reduced(row: _Row, extent: Extent, reducer: Reducer) -> Sequence[Stmt]:
    """Return the reduction of a block of weights to one vector, `partial`."""
    start = vector(row.lanes, lambda v: store(row.partial, reducer.identity, [v]))

    def add(base: Expr, width: int) -> Stmt:
        def lane(v: Expr) -> Stmt:
            return store(row.partial, reducer.combine(load(row.partial, [v]), load(row.weights, [base + v])), [v])

        return vector(width, lane)

    return start, tiles(extent, [row.lanes] if isinstance(extent, int) else [row.lanes, 1], add)


def _folded(row: _Row, reducer: Reducer) -> Expr:
    return fold(reducer, load_lanes(row.partial, index(0), row.lanes), row.lanes)


def _products(row: _Row, base: Expr, extent: Extent) -> Stmt:
    """Return the products of the query and a block of keys: lanes along the depth, some keys at a time."""
    depth = row.analysis.depth.extent
    lanes = lanes_for(depth, row.lanes, most=1)

    def key_at(j: Expr, d: Expr) -> Expr:
        values = {row.analysis.key.variable: base + j, row.analysis.depth.variable: d}
        return row.at(row.analysis.keys, values).astype(FLOAT) * load(row.query, [d])

    def some(first: Expr, count: int) -> Stmt:
        sums, rest = local([count * lanes], FLOAT, "products"), local([count], FLOAT, "rest")

        def step(d: Expr) -> Stmt:
            def add(k: Expr, v: Expr) -> Stmt:
                place = k * lanes + v
                return store(sums, load(sums, [place]) + key_at(first + k, d * lanes + v), [place])

            return unrolled(count, lambda k: vector(lanes, lambda v: add(k, v)))

        def left(i: Expr) -> Stmt:
            d = index(quotient(depth, lanes)) * lanes + i
            return unrolled(count, lambda k: store(rest, load(rest, [k]) + key_at(first + k, d), [k]))

        def finish(k: Expr) -> Stmt:
            return store(
                row.weights, load(rest, [k]) + fold(_SUM, load_lanes(sums, k * lanes, lanes), lanes), [first + k]
            )

        return with_local(
            [sums, rest],
            [
                vector(count * lanes, lambda v: store(sums, _ZERO, [v])),
                unrolled(count, lambda k: store(rest, _ZERO, [k])),
                loop(quotient(depth, lanes), step),
                loop(remainder(depth, lanes), left),
                unrolled(count, finish),
            ],
        )

    return tiles(extent, [KEYS_AT_ONCE, 1], some)


def _weighted(row: _Row, base: Expr, extent: Extent) -> Stmt:
    """Return the sum of a block's values, weighted by the exponentials, added to the shrunken sums so far."""
    width = 4 * row.lanes

    def columns(first: Expr, count: int) -> Stmt:
        sums = local([count], FLOAT, "weighted")

        def start(e: Expr) -> Stmt:
            return store(sums, load(row.sums, [first + e]) * load(row.factor, [index(0)]), [e])

        def step(j: Expr) -> Stmt:
            def add(e: Expr) -> Stmt:
                values = {row.analysis.key.variable: base + j, row.analysis.column.variable: first + e}
                value = row.at(row.analysis.values, values).astype(FLOAT)
                return store(sums, load(sums, [e]) + load(row.weights, [j]) * value, [e])

            return vector(count, add)

        return with_local(
            [sums],
            [
                vector(count, start),
                loop(extent, step),
                vector(count, lambda e: store(row.sums, load(sums, [e]), [first + e])),
            ],
        )

    sizes = [width, row.lanes] if isinstance(row.analysis.column.extent, int) else [width, row.lanes, 1]
    return tiles(row.analysis.column.extent, sizes, columns)
