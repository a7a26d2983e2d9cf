"""The products of a block of keys with the queries of all heads that share them, lanes along a head's elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int
from schedules.attention_joining import ZERO
from schedules.attention_operands import Codes, alike, codes_of, in_stores, line_request, lines_of, requests
from schedules.attention_structure import AttentionAnalysis
from schedules.loops import (
    INDEX,
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    quotient,
    remainder,
    store,
    tiles,
    unrolled,
    vector,
    with_local,
)
from schedules.reducer import Reducer, folds, lanes_for, load_lanes, power_of_two
from schedules.stages import Axis, sequence, substitute, variables_of

FLOAT = "float32"
# Products of keys with queries that are summed side by side and folded together. Reading more keys at once is slower
# where they come from memory.
KEYS_AT_ONCE = 4
# Vectors of sums where a loop has no registers of its own: enough to hide the latency of a sum. With what is added to
# them they have to fit 16 registers: around the loops the compiler keeps the exponential's constants in the others.
SUMS_AT_ONCE = 8
# How many keys ahead of their use are asked for. A step of a decoder reads its weights between two uses of a layer's
# keys and values, which come from memory, and too few at a time for the hardware to foresee much.
KEYS_AHEAD = 32

SUM = Reducer(lambda a, b: a + b, ZERO, ZERO)


@dataclass(frozen=True, eq=False)
class Heads:
    """The axis of which `count` adjacent heads or queries share keys and values; None where each has its own."""

    axis: Axis | None
    count: int


@dataclass(frozen=True, eq=False)
class Following:
    """The block of keys after another one: the values of the axes of heads and queries, and its first key."""

    point: Mapping[Var, Expr]
    base: Expr


@dataclass(frozen=True, eq=False)
class Block:
    """A block of keys; `weights` [heads][keys] holds logits, then exponentials; `number` is where its results go.

    Where keys are codes, products with them start from `first_sums` [heads][lanes]. Where values are, `scaled`
    [heads][keys] holds the exponentials times their scales, and `offsets` [heads] the sums of those times their minima.
    The loop over values has `own_registers` for itself: all that there are, or none. `following` is the block that its
    thread takes next where requests are spread between two, None where a block asks for its own alone. `seen` is the
    logit of a key that the mask does not hide, and the key from which on it hides all, None where each key is compared.
    """

    analysis: AttentionAnalysis
    lanes: int
    own_registers: int
    heads: Heads
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
    first_sums: Var | None = None
    scaled: Var | None = None
    offsets: Var | None = None
    following: Following | None = None
    seen: tuple[Expr, Expr] | None = None

    @property
    def sums_at_once(self) -> int:
        """Return how many vectors of sums a loop has: half of all registers, beside what is added to them."""
        return self.own_registers // 2 or SUMS_AT_ONCE

    def at(self, expression: Expr, axes: Mapping[Var, Expr], head: Expr | None = None) -> Expr:
        """Return `expression` at the task's query, a head of those that share keys, and given values of other axes."""
        values = {**self.point, **axes}
        if self.heads.axis is not None:
            first = self.point[self.heads.axis.variable]
            values[self.heads.axis.variable] = first if head is None else first + head
        return substitute(expression, values)


def products(task: Block) -> Stmt:
    """Return the products of all heads' queries with the keys: lanes along the depth, some keys at a time."""
    analysis, count = task.analysis, task.heads.count
    most = task.sums_at_once // 2  # so that there are two keys, for which a head's query is read once
    in_heads = [(first, min(most, count - first)) for first in range(0, count, most)]
    at_once = min(KEYS_AT_ONCE, task.sums_at_once // min(count, most))

    def run(own: Block, element: Expr, read: Expr, start: Expr, extent: Extent) -> Stmt:
        def some(base: Expr, keys: int) -> Stmt:
            first_key = start + base
            requested = [
                *(each for key in range(keys) for each in _next_keys(own, element, first_key + key)),
                *_values_of(own, element, first_key, keys),
            ]
            sums = [_products_of(own, read, first_key, keys, first, heads) for first, heads in in_heads]
            return sequence([*requested, *sums])

        return tiles(extent, [at_once, 1], some)

    def part(element: Expr, start: Expr, extent: Extent) -> Stmt:
        codes = codes_of(element)
        page = None if codes is None else _page(task, codes)
        if codes is None or page is None:
            return run(task, element, element, start, extent)
        return _by_pages(task, codes, page, (start, extent), lambda own, *keys: run(own, element, codes.code, *keys))

    return in_stores(analysis.keys, analysis.key, task.point, task.base, task.extent, part)


def _page(task: Block, codes: Codes) -> int | None:
    """Return how many keys of codes share scales and minima; None where that is not known, or lanes do not fit."""
    depth = task.analysis.depth.extent
    if not isinstance(depth, int) or depth % lanes_for(depth, task.lanes, most=1):
        return None
    pages = {quotient_of(part, task.analysis.key) for part in (codes.scale, codes.minimum)}
    page = pages.pop()
    return None if pages else page


def _by_pages(
    task: Block, codes: Codes, page: int, keys: tuple[Expr, Extent], run: Callable[[Block, Expr, Extent], Stmt]
) -> Stmt:
    """Return what `run` does with the keys from `keys[0]` on, `keys[1]` of them, page by page.

    sum_d q[d] (c[d] s[d] + m[d]) = sum_d (q[d] s[d]) c[d] + sum_d q[d] m[d]: with scales in the queries, and sums of
    minima where the others start, what remains to be done for each key is to read its codes.
    """
    analysis, count = task.analysis, task.heads.count
    depth, (start, extent) = int(analysis.depth.extent), keys
    lanes = lanes_for(depth, task.lanes, most=1)
    query, first_sums = local([count, depth], FLOAT, "scaled_query"), local([count, lanes], FLOAT, "first_sums")
    first, begin, end = (Var(name, INDEX) for name in ("first_page", "begin", "end"))

    def take_in(number: Expr) -> Stmt:
        def add(h: Expr, i: Expr, v: Expr) -> Stmt:
            d = i * lanes + v
            at = {analysis.key.variable: number * page, analysis.depth.variable: d}
            scale, minimum = (task.at(part, at) for part in (codes.scale, codes.minimum))
            value = load(task.query, [h, d])
            total = load(first_sums, [h, v]) + value * minimum
            return sequence([store(query, value * scale, [h, d]), store(first_sums, total, [h, v])])

        clear = unrolled(count, lambda h: vector(lanes, lambda v: store(first_sums, ZERO, [h, v])))
        steps = loop(depth // lanes, lambda i: unrolled(count, lambda h: vector(lanes, lambda v: add(h, i, v))))
        return sequence([clear, steps])

    def one(place: Expr) -> Stmt:
        number = first + place
        last = tirx.min(start + index(extent), (number + 1) * page - task.base)
        return sequence(
            [
                tirx.Bind(begin, tirx.max(start, number * page - task.base)),
                tirx.Bind(end, tirx.max(begin, last)),
                take_in(number),
                run(replace(task, query=query, first_sums=first_sums), begin, end - begin),
            ]
        )

    many = ceiling(task.base + start + index(extent), page) - first
    pages = sequence([tirx.Bind(first, tirx.floordiv(task.base + start, index(page))), loop(many, one)])
    return with_local([query, first_sums], [pages])


def _next_keys(task: Block, element: Expr, key: Expr) -> list[Stmt]:
    """Return requests for the memory of a key further on."""
    return _row_requests(task, element, task.analysis.depth, key + KEYS_AHEAD, cache=1)


def _values_of(task: Block, element: Expr, key: Expr, keys: int) -> list[Stmt]:
    """Return requests for the values of some keys, which are read after all keys of the block.

    Where requests are not spread that is for a block's first ones, and those behind them as `while_summing` asks.
    """
    value = alike(element, task.analysis.keys, task.analysis.values)
    rows = [_row_requests(task, value, task.analysis.column, key + number, cache=2) for number in range(keys)]
    asked = [each for row in rows for each in row]
    if task.following is not None or not asked:
        return asked
    return [tirx.IfThenElse(key < KEYS_AHEAD, sequence(asked), None)]


def while_summing(task: Block, element: Expr, key: Expr, start: Expr, width: int) -> list[Stmt]:
    """Return what is asked for as the value of a key is read, of which `width` columns from `start` on are summed.

    That is a value further on, with the first of the passes over all values. Where requests are spread it is a part of
    the next block's keys, as much in each pass: the first alone would wait for memory, and the others leave it idle.
    """
    if task.following is None:
        asked = _row_requests(task, element, task.analysis.column, key + KEYS_AHEAD, cache=1)
        return [tirx.IfThenElse(start < width, sequence(asked), None)] if asked and _is_part(task, width) else asked
    analysis, following = task.analysis, task.following
    keys = alike(element, analysis.values, analysis.keys)
    lines = lines_of(keys, analysis.depth)
    if not lines or not isinstance(analysis.column.extent, int):
        return []
    passes = -(-analysis.column.extent // width)
    number = tirx.floordiv(start, index(width)) * index(task.extent) + key
    first = tirx.floordiv(number * lines, index(passes))

    def request(line: Expr) -> Stmt:
        values = {**following.point, analysis.key.variable: following.base + tirx.floordiv(line, index(lines))}

        def at(read: Expr, place: Expr) -> Expr:
            return substitute(read, {**values, analysis.depth.variable: place})

        return line_request(keys, at, tirx.floormod(line, index(lines)), cache=2)

    return [request(first + number) for number in range(-(-lines // passes))]


def _is_part(task: Block, width: int) -> bool:
    """Return whether there are more columns than `width`."""
    extent = task.analysis.column.extent
    return not isinstance(extent, int) or width < extent


def _row_requests(task: Block, element: Expr, axis: Axis, key: Expr, cache: int) -> list[Stmt]:
    def at(read: Expr, place: Expr) -> Expr:
        return task.at(read, {task.analysis.key.variable: task.base + key, axis.variable: place})

    return requests(element, axis, at, cache)


def _products_of(task: Block, element: Expr, start: Expr, keys: int, first: int, heads: int) -> Stmt:
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

    def begin(h: Expr, v: Expr) -> Expr:
        return ZERO if task.first_sums is None else load(task.first_sums, [first + h, v])

    def add(place: Expr, value: Expr) -> Stmt:
        return store(sums, load(sums, [place]) + value, [place])

    def step(d: Expr) -> Stmt:
        return each(lambda h, k, own: vector(lanes, lambda v: add(own + v, term(h, k, d * lanes + v))))

    def left(i: Expr, width: int) -> Stmt:
        d = index(quotient(depth, lanes)) * lanes + i
        return each(lambda h, k, own: vector(width, lambda v: add(own + v, term(h, k, d + v))))

    # One by one what is left of 47 takes as long as 80 and more.
    halves = [lanes >> bit for bit in range(1, lanes.bit_length())]

    return with_local(
        [sums],
        [
            each(lambda h, k, own: vector(lanes, lambda v: store(sums, begin(h, v), [own + v]))),
            loop(quotient(depth, lanes), step),
            tiles(remainder(depth, lanes), halves, left),
            *_kept(task, sums, lanes, start, keys, range(first, first + heads)),
        ],
    )


def _kept(task: Block, sums: Var, lanes: int, start: Expr, keys: int, heads: range) -> Sequence[Stmt]:
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
        kept.append(tirx.Bind(folded, folds(SUM, vectors, lanes)))
        for number, (head, key) in enumerate(some):
            part = [number * together + k for k in range(together)]
            value = folded if len(own) == 1 else tirx.Shuffle([folded], part)
            place = start + key if together == 1 else tirx.Ramp(start + key, index(1), together)
            kept.append(store(task.weights, value, [index(head), place]))
    return kept


def shared_heads(analysis: AttentionAnalysis, axes: Sequence[Axis]) -> Heads:
    """Return that of `axes` which keys and values depend on only by its quotient by some number, and that number.

    The heads of a group may also be an axis of their own, on which keys and values do not depend at all.
    """
    for axis in axes:
        if not isinstance(axis.extent, int):
            continue
        counts = {quotient_of(expression, axis) for expression in (analysis.keys, analysis.values)}
        count = counts.pop()
        if not counts and count is not None and count > 1 and axis.extent % count == 0:
            return Heads(axis, count)
    return Heads(None, 1)


def quotient_of(expression: Expr, axis: Axis) -> int | None:
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
