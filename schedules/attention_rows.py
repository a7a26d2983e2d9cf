"""The loop nest of attention of few queries, as in decoding: keys and values read once for all heads of a group.

What takes the time is reading keys and values, so a task is a block of keys of one head of them, whatever the number of
heads: it computes the logits, their maximum, the sum of their exponentials and the weighted values for all query heads
that share the keys. The blocks' results are put together at the end. Lanes run along a head's elements, and along the
keys in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int
from schedules.attention_joining import LOWEST, ZERO, Row, joined
from schedules.attention_operands import alike, in_stores, requests
from schedules.attention_structure import AttentionAnalysis
from schedules.family import is_large
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
    quotient,
    remainder,
    store,
    tiles,
    unflatten,
    unrolled,
    vector,
    with_local,
)
from schedules.reducer import Reducer, fold, folds, lanes_for, load_lanes, power_of_two
from schedules.stages import Axis, sequence, substitute, variables_of

FLOAT = "float32"
# Products of keys with queries that are summed side by side and folded together. Reading more keys at once is slower
# where they come from memory.
KEYS_AT_ONCE = 4
HEADS_AT_ONCE = 4
# Vectors of sums in a loop: enough to hide the latency of a sum. With what is added to them they have to fit 16
# registers: around the loops the compiler keeps the constants of the exponential in the others.
SUMS_AT_ONCE = 8
# How many keys ahead of their use are asked for. A step of a decoder reads its weights between two uses of a layer's
# keys and values, which come from memory, and too few at a time for the hardware to foresee much.
KEYS_AHEAD = 32

_SUM = Reducer(lambda a, b: a + b, ZERO, ZERO)
_MAXIMUM = Reducer(tirx.max, ZERO, tirx.const(LOWEST, FLOAT))


@dataclass(frozen=True, eq=False)
class _Heads:
    """The axis of which `count` adjacent heads or queries share keys and values; None where each has its own."""

    axis: Axis | None
    count: int


@dataclass(frozen=True, eq=False)
class _Block:
    """A block of keys; `weights` [heads][keys] holds logits, then exponentials; `number` is where its results go."""

    analysis: AttentionAnalysis
    lanes: int
    heads: _Heads
    point: Mapping[Var, Expr]
    number: Expr
    base: Expr
    extent: Extent
    query: Var
    weights: Var
    partial: Var
    largest: Var
    total: Var
    sums: Var

    def at(self, expression: Expr, axes: Mapping[Var, Expr], head: Expr | None = None) -> Expr:
        """Return `expression` at the task's query, a head of those that share keys, and given values of other axes."""
        values = {**self.point, **axes}
        if self.heads.axis is not None:
            first = self.point[self.heads.axis.variable]
            values[self.heads.axis.variable] = first if head is None else first + head
        return substitute(expression, values)


def emit(analysis: AttentionAnalysis, lanes: int, key_block: int) -> Stmt:
    """Return the parallel loops over blocks of keys, and over their results."""
    heads = _shared_heads(analysis)
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
        task = _Block(analysis, lanes, heads, point(values, group), number, base, extent, **buffers, **gathered)
        return with_local(list(buffers.values()), _block(task))

    def row(number: Expr) -> Stmt:
        *values, group, head = unflatten(number, [*outer, heads.count])
        at = point(values, group)
        if heads.axis is not None:
            at[heads.axis.variable] = group * heads.count + head
        first = tirx.floordiv(number, index(heads.count)) * blocks
        return joined(Row(analysis, lanes, at, first, head, blocks, **gathered))

    work = product([*outer, heads.count, keys, analysis.depth.extent])
    return with_local(
        list(gathered.values()),
        [
            parallel(results, block, is_large(work)),
            # Joining costs a fraction of what the blocks do, and as much as waking threads where they are few.
            loop(product([*outer, heads.count]), row),
        ],
    )


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


def _shared_heads(analysis: AttentionAnalysis) -> _Heads:
    """Return the axis that keys and values depend on only by its quotient by some number of heads, and that number.

    The heads of a group may also be an axis of their own, on which keys and values do not depend at all.
    """
    for axis in _axes(analysis):
        if not isinstance(axis.extent, int):
            continue
        counts = {_quotient_of(expression, axis) for expression in (analysis.keys, analysis.values)}
        count = counts.pop()
        if not counts and count is not None and count > 1 and axis.extent % count == 0:
            return _Heads(axis, count)
    return _Heads(None, 1)


def _quotient_of(expression: Expr, axis: Axis) -> int | None:
    """Return n where `expression` depends on `axis` through axis // n alone, at most the axis's extent."""
    divisors: list[int] = []
    quotients = Var("quotient", axis.variable.ty)

    def visit(division: tirx.FloorDiv, mutator: tvm_ffi.StructuralMutator) -> Expr:
        divisor = as_int(division.b)
        if divisor is None or not division.a.same_as(axis.variable):
            return mutator.default_mutate(division)
        divisors.append(divisor)
        return quotients

    rest = tvm_ffi.structural_mutate(expression, (tirx.FloorDiv, visit))
    if any(variable.same_as(axis.variable) for variable in variables_of(rest)) or len(set(divisors)) > 1:
        return None
    return divisors[0] if divisors else as_int(index(axis.extent))


def _block(task: _Block) -> list[Stmt]:
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
        _products(task),
        loop(count, lambda head: _exponentials(task, head)),
        *(_weighted(task, first, heads) for first, heads in in_heads),
    ]


def _exponentials(task: _Block, head: Expr) -> Stmt:
    """Return the logits of a head, their maximum, their exponentials in their place, and the sum of those."""
    analysis = task.analysis
    here = [task.number, head]

    def logit(j: Expr) -> Stmt:
        values = {analysis.key.variable: task.base + j, analysis.score: load(task.weights, [head, j])}
        return store(task.weights, task.at(analysis.logit, values, head), [head, j])

    def exponential(j: Expr) -> Stmt:
        difference = load(task.weights, [head, j]) - load(task.largest, here)
        return store(task.weights, exp_of_nonpositive(difference), [head, j])

    return sequence(
        [
            in_vectors(task.lanes, task.extent, logit),
            *_reduced(task, head, _MAXIMUM),
            store(task.largest, _folded(task, _MAXIMUM), here),
            in_vectors(task.lanes, task.extent, exponential),
            *_reduced(task, head, _SUM),
            store(task.total, _folded(task, _SUM), here),
        ]
    )


def _reduced(task: _Block, head: Expr, reducer: Reducer) -> Sequence[Stmt]:
    """Return the reduction of a head's weights to one vector, `partial`."""
    start = vector(task.lanes, lambda v: store(task.partial, reducer.identity, [v]))

    def add(base: Expr, width: int) -> Stmt:
        def lane(v: Expr) -> Stmt:
            value = reducer.combine(load(task.partial, [v]), load(task.weights, [head, base + v]))
            return store(task.partial, value, [v])

        return vector(width, lane)

    sizes = [task.lanes] if isinstance(task.extent, int) else [task.lanes, 1]
    return start, tiles(task.extent, sizes, add)


def _folded(task: _Block, reducer: Reducer) -> Expr:
    return fold(reducer, load_lanes(task.partial, index(0), task.lanes), task.lanes)


def _products(task: _Block) -> Stmt:
    """Return the products of all heads' queries with the keys: lanes along the depth, some keys at a time."""
    analysis, count = task.analysis, task.heads.count
    in_heads = [(first, min(HEADS_AT_ONCE, count - first)) for first in range(0, count, HEADS_AT_ONCE)]

    def some(element: Expr, start: Expr, keys: int) -> Stmt:
        requested = [each for key in range(keys) for each in _requests(task, element, start + key)]
        products = [_products_of(task, element, start, keys, first, heads) for first, heads in in_heads]
        return sequence([*requested, *products])

    at_once = min(KEYS_AT_ONCE, SUMS_AT_ONCE // min(count, HEADS_AT_ONCE))

    def part(element: Expr, start: Expr, extent: Extent) -> Stmt:
        return tiles(extent, [at_once, 1], lambda base, keys: some(element, start + base, keys))

    return in_stores(analysis.keys, analysis.key, task.point, task.base, task.extent, part)


def _requests(task: _Block, element: Expr, key: Expr) -> list[Stmt]:
    """Return requests for the memory of a key further on, and of this key's value, which is read after all keys."""
    analysis = task.analysis

    def at(axis: Axis, position: Expr) -> Callable[[Expr, Expr], Expr]:
        return lambda read, place: task.at(read, {analysis.key.variable: position, axis.variable: place})

    value = alike(element, analysis.keys, analysis.values)
    here = task.base + key
    return [
        *requests(element, analysis.depth, at(analysis.depth, here + KEYS_AHEAD), cache=1),
        *requests(value, analysis.column, at(analysis.column, here), cache=2),
    ]


def _products_of(task: _Block, element: Expr, start: Expr, keys: int, first: int, heads: int) -> Stmt:
    """Return the products of the queries of `heads` heads with `keys` keys, whose sums stay in registers."""
    analysis = task.analysis
    depth = analysis.depth.extent
    lanes = lanes_for(depth, task.lanes, most=1)
    sums = local([heads * keys * lanes], FLOAT, "products")

    def term(h: Expr, k: Expr, d: Expr) -> Expr:
        key = task.at(element, {analysis.key.variable: task.base + start + k, analysis.depth.variable: d})
        return key.astype(FLOAT) * load(task.query, [first + h, d])

    def each(cell: Callable[[Expr, Expr, Expr], Stmt]) -> Stmt:
        return unrolled(keys, lambda k: unrolled(heads, lambda h: cell(h, k, (h * keys + k) * lanes)))

    def add(place: Expr, value: Expr) -> Stmt:
        return store(sums, load(sums, [place]) + value, [place])

    def step(d: Expr) -> Stmt:
        return each(lambda h, k, own: vector(lanes, lambda v: add(own + v, term(h, k, d * lanes + v))))

    def left(i: Expr) -> Stmt:
        d = index(quotient(depth, lanes)) * lanes + i
        return each(lambda h, k, own: add(own, term(h, k, d)))

    return with_local(
        [sums],
        [
            each(lambda h, k, own: vector(lanes, lambda v: store(sums, ZERO, [own + v]))),
            loop(quotient(depth, lanes), step),
            loop(remainder(depth, lanes), left),
            *_kept(task, sums, lanes, start, keys, range(first, first + heads)),
        ],
    )


def _kept(task: _Block, sums: Var, lanes: int, start: Expr, keys: int, heads: range) -> Sequence[Stmt]:
    """Return the storing of sums [heads][keys], each the fold of `lanes` lanes, as many at a time as a vector holds."""
    kept: list[Stmt] = []
    together = min(keys, lanes)  # of one head
    places = [(head, key) for head in heads for key in range(0, keys, together)]
    for begin in range(0, len(places), lanes // together):
        some = places[begin : begin + lanes // together]
        own = [(head - heads.start) * keys + key + k for head, key in some for k in range(together)]
        own += [own[-1]] * (power_of_two(len(own)) - len(own))
        folded = Var("folded", f"{FLOAT}x{len(own)}" if len(own) > 1 else FLOAT)
        vectors = [load_lanes(sums, index(each * lanes), lanes) for each in own]
        kept.append(tirx.Bind(folded, folds(_SUM, vectors, lanes)))
        for number, (head, key) in enumerate(some):
            part = [number * together + k for k in range(together)]
            value = folded if len(own) == 1 else tirx.Shuffle([folded], part)
            place = start + key if together == 1 else tirx.Ramp(start + key, index(1), together)
            kept.append(store(task.weights, value, [index(head), place]))
    return kept


def _weighted(task: _Block, first: int, heads: int) -> Stmt:
    """Return the sums of the values, weighted by the exponentials of some heads."""
    analysis = task.analysis
    extent = analysis.column.extent
    width = min(4, SUMS_AT_ONCE // heads) * task.lanes

    def columns(start: Expr, count: int) -> Stmt:
        sums = local([heads * count], FLOAT, "weighted")

        lanes = min(count, task.lanes)

        def each(element: Callable[[Expr, Expr], Stmt]) -> Stmt:
            def parts(h: Expr) -> Stmt:
                return unrolled(count // lanes, lambda part: vector(lanes, lambda v: element(h, part * lanes + v)))

            return unrolled(heads, parts)

        def step(source: Expr, j: Expr) -> Stmt:
            def add(h: Expr, e: Expr) -> Stmt:
                values = {analysis.key.variable: task.base + j, analysis.column.variable: start + e}
                value = task.at(source, values).astype(FLOAT)
                own = h * count + e
                return store(sums, load(sums, [own]) + load(task.weights, [first + h, j]) * value, [own])

            return each(add)

        def part(source: Expr, begin: Expr, length: Extent) -> Stmt:
            return loop(length, lambda j: step(source, begin + j))

        def keep(h: Expr, e: Expr) -> Stmt:
            return store(task.sums, load(sums, [h * count + e]), [task.number, first + h, start + e])

        return with_local(
            [sums],
            [
                each(lambda h, e: store(sums, ZERO, [h * count + e])),
                in_stores(analysis.values, analysis.key, task.point, task.base, task.extent, part),
                each(keep),
            ],
        )

    sizes = [width, task.lanes] if isinstance(extent, int) else [width, task.lanes, 1]
    return tiles(extent, sizes, columns)
