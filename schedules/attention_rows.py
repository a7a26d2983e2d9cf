"""The loop nest of attention of few queries, as in decoding: keys and values read once for all heads of a group.

What takes the time is reading keys and values, so a task is a block of keys of one head of them, whatever the number of
heads: it computes the logits, their maximum, the sum of their exponentials and the weighted values for all query heads
that share the keys. The blocks' results are put together at the end. Lanes run along a head's elements, and along the
keys in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import occurs
from schedules.attention_block import (
    FLOAT,
    SUM,
    Block,
    Following,
    products,
    shared_heads,
    while_summing,
)
from schedules.attention_joining import LOWEST, ZERO, Row, joined
from schedules.attention_mask import choice_of, end_of_seen, seen_logit
from schedules.attention_operands import Codes, codes_of, in_stores
from schedules.attention_structure import AttentionAnalysis
from schedules.family import is_large
from schedules.intrin.free_registers import can_free_registers, free_registers, with_free_registers
from schedules.intrin.vector_math import exp_of_nonpositive
from schedules.loops import (
    Extent,
    ceiling,
    in_vectors,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    store,
    tiles,
    unflatten,
    unrolled,
    vector,
    with_local,
)
from schedules.reducer import NARROW_FLOATS, Reducer, fold, load_lanes
from schedules.stages import Axis, sequence
from targets.base import Target

_MAXIMUM = Reducer(tirx.max, ZERO, tirx.const(LOWEST, FLOAT))
# Heads whose values are summed side by side.
HEADS_AT_ONCE = 4
# Vectors of a value's columns that are summed side by side.
VECTORS_AT_ONCE = 4


def emit(analysis: AttentionAnalysis, target: Target, key_block: int) -> Stmt:
    """Return the parallel loops over blocks of keys, and over their results."""
    lanes, own_registers = target.vector_lanes(32), target.vector_registers if can_free_registers(target) else 0
    heads = shared_heads(analysis, _axes(analysis))
    axes = [axis for axis in _axes(analysis) if axis is not heads.axis]
    groups = 1 if heads.axis is None else int(heads.axis.extent) // heads.count
    outer = [*(axis.extent for axis in axes), groups]
    keys = analysis.key.extent
    room = min(key_block, keys) if isinstance(keys, int) else key_block
    blocks, size = _blocks(keys, room, lanes, outer)
    results = product([*outer, blocks])
    columns = analysis.column.extent
    gathered = {
        "largest": local([results, heads.count], FLOAT, "block_largest"),
        "total": local([results, heads.count], FLOAT, "block_total"),
        "sums": local([results, heads.count, columns], FLOAT, "block_sums"),
    }

    seen = _seen(analysis) if target.has_few_registers else None

    def point(values: Sequence[Expr], group: Expr) -> dict[Var, Expr]:
        found = {axis.variable: value for axis, value in zip(axes, values, strict=True)}
        return found if heads.axis is None else {**found, heads.axis.variable: group * heads.count}

    def block(number: Expr) -> Stmt:
        *values, group, part = unflatten(number, [*outer, blocks])
        base = part * size
        exact = isinstance(keys, int) and isinstance(size, int) and keys % size == 0
        extent = size if exact else tirx.max(index(0), tirx.min(index(size), index(keys) - base))
        buffers = {
            "query": local([heads.count, analysis.depth.extent], FLOAT, "query"),
            "weights": local([heads.count, room], FLOAT, "weights"),
            "partial": local([lanes], FLOAT, "partial"),
        }
        if _coded_values(analysis.values, analysis.column) is not None:
            buffers["scaled"] = local([heads.count, room], FLOAT, "scaled")
            buffers["offsets"] = local([heads.count], FLOAT, "offsets")
        following = None
        if _spreads_requests(target):
            *values_after, group_after, part_after = unflatten(number + 1, [*outer, blocks])
            following = Following(point(values_after, group_after), part_after * size)
        at = point(values, group)
        task = Block(
            analysis, lanes, own_registers, heads, at, number, base, extent, **buffers, **gathered,
            following=following, seen=seen,
        )  # fmt: skip
        return with_local(list(buffers.values()), _block(task))

    def row(number: Expr) -> Stmt:
        *values, group, head = unflatten(number, [*outer, heads.count])
        at = point(values, group)
        if heads.axis is not None:
            at[heads.axis.variable] = group * heads.count + head
        first = tirx.floordiv(number, index(heads.count)) * blocks
        return joined(Row(analysis, lanes, at, first, head, blocks, **gathered))

    work = product([*outer, heads.count, keys, analysis.depth.extent])
    statement = with_local(
        list(gathered.values()),
        [
            parallel(results, block, is_large(work)),
            # Joining costs a fraction of what the blocks do, and as much as waking threads where they are few.
            loop(product([*outer, heads.count]), row),
        ],
    )
    return with_free_registers(statement, target) if own_registers else statement


def _spreads_requests(target: Target) -> bool:
    """Return whether a block asks for values at each key, and for the next block's keys in each pass over values.

    With AVX2 the values of few heads take several passes. Nothing was asked for in the later ones, nor between keys and
    values: 4096 tokens of 9, 14 and 32 heads take 12, 9 and 11 % less time so, 512 of 9 heads 13 % (Zen 3). Elsewhere
    it was not measured.
    """
    return target.has_few_registers


def _seen(analysis: AttentionAnalysis) -> tuple[Expr, Expr] | None:
    """Return the logit of a key that the mask does not hide, and the key from which on it hides all, as `Block.seen`.

    The mask compares keys in 64 bits, of which a vector of AVX2 holds half as many as of logits.
    """
    logit, end = seen_logit(analysis), end_of_seen(analysis)
    return None if logit is None or end is None else (logit, end)


def _blocks(keys: Extent, room: int, lanes: int, outer: Sequence[Extent]) -> tuple[Extent, Extent]:
    """Return how many blocks of at most `room` keys there are for each of the tasks `outer`, and their keys.

    Where the keys are many or few only as the code runs, blocks are of about equal size, and their number is even where
    that of heads is odd, so that threads get equal shares. The last ones may be empty.
    """
    blocks = ceiling(keys, room)
    if isinstance(keys, int) or room % lanes:
        return blocks, room
    if not any(isinstance(extent, int) and extent % 2 == 0 for extent in outer):
        blocks = ceiling(blocks, 2) * 2
    each = tirx.floordiv(keys + blocks - 1, tirx.max(index(blocks), index(1)))
    return blocks, index(ceiling(each, lanes)) * lanes


def _axes(analysis: AttentionAnalysis) -> list[Axis]:
    """Return the axes of heads and queries."""
    return [*analysis.outer, *([] if analysis.lane is None else [analysis.lane])]


def _block(task: Block) -> list[Stmt]:
    """Return the steps of one block of keys."""
    analysis = task.analysis
    count = task.heads.count

    def copy(head: Expr) -> Stmt:
        def element(d: Expr) -> Stmt:
            value = task.at(analysis.query, {analysis.depth.variable: d}, head).astype(FLOAT)
            return store(task.query, value, [head, d])

        return in_vectors(task.lanes, analysis.depth.extent, element)

    in_heads = [(first, min(HEADS_AT_ONCE, count - first)) for first in range(0, count, HEADS_AT_ONCE)]
    return [
        loop(count, copy),
        products(task),
        loop(count, lambda head: _exponentials(task, head)),
        *([] if task.scaled is None else [_scaled_weights(task)]),
        *(_weighted(task, first, heads) for first, heads in in_heads),
    ]


def _exponentials(task: Block, head: Expr) -> Stmt:
    """Return the logits of a head, their maximum, their exponentials in their place, and the sum of those."""
    analysis = task.analysis
    here = [task.number, head]

    def logits(value: Expr) -> Stmt:
        def logit(j: Expr) -> Stmt:
            values = {analysis.key.variable: task.base + j, analysis.score: load(task.weights, [head, j])}
            return store(task.weights, task.at(value, values, head), [head, j])

        return in_vectors(task.lanes, task.extent, logit)

    def exponential(j: Expr) -> Stmt:
        difference = load(task.weights, [head, j]) - load(task.largest, here)
        return store(task.weights, exp_of_nonpositive(difference), [head, j])

    all_logits = logits(analysis.logit)
    if task.seen is not None:
        visible, end = task.seen
        are_seen = task.base + index(task.extent) <= task.at(end, {}, head)
        all_logits = tirx.IfThenElse(are_seen, logits(visible), all_logits)
    return sequence(
        [
            all_logits,
            *_reduced(task, head, _MAXIMUM),
            store(task.largest, _folded(task, _MAXIMUM), here),
            in_vectors(task.lanes, task.extent, exponential),
            *_reduced(task, head, SUM),
            store(task.total, _folded(task, SUM), here),
        ]
    )


def _reduced(task: Block, head: Expr, reducer: Reducer) -> Sequence[Stmt]:
    """Return the reduction of a head's weights to one vector, `partial`."""
    start = vector(task.lanes, lambda v: store(task.partial, reducer.identity, [v]))

    def add(base: Expr, width: int) -> Stmt:
        def lane(v: Expr) -> Stmt:
            value = reducer.combine(load(task.partial, [v]), load(task.weights, [head, base + v]))
            return store(task.partial, value, [v])

        return vector(width, lane)

    sizes = [task.lanes] if isinstance(task.extent, int) else [task.lanes, 1]
    return start, tiles(task.extent, sizes, add)


def _folded(task: Block, reducer: Reducer) -> Expr:
    return fold(reducer, load_lanes(task.partial, index(0), task.lanes), task.lanes)


def _coded_values(values: Expr, column: Axis) -> Codes | None:
    """Return the codes among values, if there are any whose scale and minimum are the same for all columns."""
    choice = choice_of(values)
    for part in (values,) if choice is None else choice[1:]:
        codes = codes_of(part)
        if codes is not None and not any(occurs(each, column.variable) for each in (codes.scale, codes.minimum)):
            return codes
    return None


def _scaled_weights(task: Block) -> Stmt:
    """Return the exponentials times the scales of values that are codes, and the sums of those times the minima.

    sum_t w[t] (c[t] s[t] + m[t]) = sum_t (w[t] s[t]) c[t] + sum_t w[t] m[t]: then no column needs scales.
    """
    analysis = task.analysis
    assert task.scaled is not None
    assert task.offsets is not None
    scaled, offsets = task.scaled, task.offsets

    def part(source: Expr, begin: Expr, length: Extent) -> Stmt:
        codes = _coded_values(source, analysis.column)
        if codes is None:
            return tirx.Evaluate(0)

        def head(h: Expr) -> Stmt:
            def some(base: Expr, width: int) -> Stmt:
                def one(v: Expr) -> Stmt:
                    place = begin + base + v
                    at = {analysis.key.variable: task.base + place}
                    scale, minimum = (task.at(each, at) for each in (codes.scale, codes.minimum))
                    weight = load(task.weights, [h, place])
                    total = load(task.partial, [v]) + weight * minimum
                    return sequence([store(scaled, weight * scale, [h, place]), store(task.partial, total, [v])])

                return vector(width, one)

            clear = vector(task.lanes, lambda v: store(task.partial, ZERO, [v]))
            return sequence([clear, tiles(length, [task.lanes, 1], some), store(offsets, _folded(task, SUM), [h])])

        return loop(task.heads.count, head)

    return in_stores(analysis.values, analysis.key, task.point, task.base, task.extent, part)


def _weighted(task: Block, first: int, heads: int) -> Stmt:
    """Return the sums of the values, weighted by the exponentials of some heads."""
    analysis = task.analysis
    extent = analysis.column.extent
    width = min(VECTORS_AT_ONCE, task.sums_at_once // heads) * task.lanes
    boundary = [free_registers()] if task.own_registers else []

    def columns(start: Expr, count: int) -> Stmt:
        sums = local([heads * count], FLOAT, "weighted")

        lanes = min(count, task.lanes)

        def each(element: Callable[[Expr, Expr], Stmt]) -> Stmt:
            def parts(h: Expr) -> Stmt:
                return unrolled(count // lanes, lambda part: vector(lanes, lambda v: element(h, part * lanes + v)))

            return unrolled(heads, parts)

        def step(source: Expr, weights: Var, j: Expr) -> Stmt:
            # What is asked for is for all heads.
            asked = [] if first else while_summing(task, source, j, start, width)

            def add(h: Expr, e: Expr) -> Stmt:
                values = {analysis.key.variable: task.base + j, analysis.column.variable: start + e}
                value = task.at(source, values).astype(FLOAT)
                own = h * count + e
                return store(sums, load(sums, [own]) + load(weights, [first + h, j]) * value, [own])

            return sequence([*asked, each(add)])

        def part(source: Expr, begin: Expr, length: Extent) -> Stmt:
            codes = _coded_values(source, analysis.column)
            if codes is None or task.scaled is None or task.offsets is None:
                return loop(length, lambda j: step(source, task.weights, begin + j))
            scaled, offsets = task.scaled, task.offsets

            def offset(h: Expr, e: Expr) -> Stmt:
                own = h * count + e
                return store(sums, load(sums, [own]) + load(offsets, [first + h]), [own])

            return sequence([each(offset), loop(length, lambda j: step(codes.code, scaled, begin + j))])

        def keep(h: Expr, e: Expr) -> Stmt:
            return store(task.sums, load(sums, [h * count + e]), [task.number, first + h, start + e])

        return with_local(
            [sums],
            [
                *boundary,
                each(lambda h, e: store(sums, ZERO, [h * count + e])),
                in_stores(analysis.values, analysis.key, task.point, task.base, task.extent, part),
                each(keep),
                *boundary,
            ],
        )

    if not isinstance(extent, int):
        return tiles(extent, [width, task.lanes, 1], columns)
    rest = extent % task.lanes
    if rest and extent > task.lanes and str(analysis.values.source.dtype) in ("float32", *NARROW_FLOATS):
        # A vector more, some of whose columns are computed twice: what is left of one takes its lanes one by one.
        last = columns(index(extent - task.lanes), task.lanes)
        return sequence([tiles(extent - rest, [width, task.lanes], columns), last])
    return tiles(extent, [width, task.lanes], columns)
