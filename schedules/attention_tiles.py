"""The loop nest of attention with queries in lanes: blocks of queries by blocks of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_exponentials import exponentials, factor, subtrahend, updated
from schedules.attention_groups import Groups, first_query, in_turns, sees_first
from schedules.attention_joining import LOWEST, LOWEST_NUMBER
from schedules.attention_key_blocks import if_seen, over_keys, up_to_end
from schedules.attention_mask import all_seen, end_of_seen, kept
from schedules.attention_matrices import TERMS, Matrices, in_tiles, rounded_up
from schedules.attention_operands import Operand
from schedules.attention_pairs import Pairs, packed
from schedules.attention_products import FLOAT, Task, cleared, scores, weighted
from schedules.attention_structure import AttentionAnalysis
from schedules.attention_turning import turned_queries, written
from schedules.family import is_large
from schedules.intrin.bf16_pairs import PAIR, Bf16Pairs
from schedules.intrin.matrix_tiles import BLOCK, TILE, MatrixTiles
from schedules.intrin.power_of_two import PowersOfTwo
from schedules.loops import (
    INDEX,
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    region,
    store,
    then_wait,
    unflatten,
    vector,
    with_local,
)
from schedules.stages import Axis, sequence
from targets.base import Target

# Lanes of the shortest vectors with instructions of their own.
NARROWEST = 4


@dataclass(frozen=True)
class Blocks:
    """How queries and keys are cut: `vectors` of `lanes` queries by `rows` keys in registers, `keys` at a time.

    `elements` of a key or value are loaded at once. `powers` are those of two by the target's own instructions, and
    `tiles` products of bfloat16 in its tile registers. `spreads` is whether requests for keys and values are made
    between products. Tasks take `groups` of blocks of queries, each block of keys for all of one.
    """

    lanes: int
    rows: int
    vectors: int
    keys: int
    elements: int
    powers: PowersOfTwo | None
    tiles: MatrixTiles | None = None
    spreads: bool = False
    groups: Groups | None = None


def emit(analysis: AttentionAnalysis, lane: Axis, blocks: Blocks, dot: Bf16Pairs | None, target: Target) -> Stmt:
    """Return the parallel loop over heads and blocks of queries; with `dot`, after the packing of keys and values."""

    def variant(clamped: bool) -> Stmt:
        pairs = None if dot is None else packed(dot, analysis, target)
        if pairs is not None and blocks.tiles is not None:
            pairs = in_tiles(pairs, blocks.tiles)
        tasks = _tasks(analysis, lane, blocks, pairs, clamped)
        return tasks if blocks.powers is None else blocks.powers.imported(tasks)

    if isinstance(lane.extent, int):
        return variant(lane.extent < blocks.lanes * blocks.vectors)
    return tirx.IfThenElse(lane.extent >= blocks.lanes * blocks.vectors, variant(False), variant(True))


def _widths(queries: int, blocks: Blocks, narrowest: int) -> list[int]:
    """Return how many queries are computed at a time for those that are left by whole blocks.

    As vectors they are a power of two: LLVM keeps no sums of 48 lanes in registers (97 queries took 11 times as long as
    96).
    """
    block, lanes = blocks.lanes * blocks.vectors, blocks.lanes
    rest = queries % block
    if rest == 0:
        return []
    if rest <= narrowest < lanes:
        return [narrowest]
    if lanes < rest <= lanes + narrowest < block:
        return [lanes, narrowest]
    vectors = -(-rest // lanes)
    return [lanes * (1 << (vectors - 1).bit_length())]


def _tasks(analysis: AttentionAnalysis, lane: Axis, blocks: Blocks, pairs: Pairs | None, clamped: bool) -> Stmt:
    if blocks.groups is not None and not clamped:
        return _tasks_of_groups(analysis, lane, blocks, blocks.groups)
    outer = [axis.extent for axis in analysis.outer]
    queries, block = lane.extent, blocks.lanes * blocks.vectors
    # Vectors of half the size cost half as much, as far as there are instructions on them.
    narrowest = blocks.lanes if pairs is not None else max(NARROWEST, blocks.lanes // 2)
    last = _widths(queries, blocks, narrowest) if isinstance(queries, int) else []
    whole = queries // block if isinstance(queries, int) else ceiling(queries, block)
    count = whole + len(last) if isinstance(whole, int) else whole

    parts = 1 if pairs is None else pairs.parts
    extents = outer if pairs is None or parts == 1 else [pairs.first_heads, *outer[1:]]

    def blocks_at(point: Mapping[Var, Expr], part: Expr) -> Stmt:
        def of(first: Expr, width: int) -> Stmt:
            return _block_of_queries(analysis, lane, blocks, pairs, point, (first, width), clamped)

        body = of(part * block, block)
        done = whole * block
        for position, width in enumerate(last):
            rest, before = of(index(done), width), whole + position
            body = rest if before == 0 else tirx.IfThenElse(part < before, body, rest)
            done = done + width
        return body

    def task(share: Expr, number: Expr) -> Stmt:
        *outside, turn = unflatten(number, [*extents, count])
        if parts != 1:
            outside[0] = share * extents[0] + outside[0]
        point = {axis.variable: value for axis, value in zip(analysis.outer, outside, strict=True)}
        part = Var("part", INDEX)
        return sequence([tirx.Bind(part, _in_turn(analysis, turn, count)), blocks_at(point, part)])

    large = is_large(product([*outer, queries, *_terms(analysis)]))
    if pairs is not None and pairs.owned:
        return pairs.imported(_by_heads(analysis, pairs, count, large, blocks_at))

    def tasks(share: Expr) -> Stmt:
        return parallel(product([*extents, count]), lambda number: task(share, number), large)

    if pairs is None:
        return tasks(index(0))

    def both(share: Expr) -> Stmt:
        pack, products = pairs.pack(share, large), tasks(share)
        if not large:
            return sequence([pack, products])
        return sequence([then_wait(pack), products if parts == 1 else then_wait(products)])

    shares = [*pairs.begin(), loop(parts, both), *pairs.end()]
    return pairs.imported(with_local(pairs.buffers, [region(shares) if large else sequence(shares)]))


def _tasks_of_groups(analysis: AttentionAnalysis, lane: Axis, blocks: Blocks, groups: Groups) -> Stmt:
    """Return the parallel loop over groups of blocks of queries of the heads that share keys and values."""
    shared, block = groups.heads, blocks.lanes * blocks.vectors
    extents = [axis.extent // shared.count if axis is shared.axis else axis.extent for axis in analysis.outer]
    own = product([shared.count, ceiling(lane.extent, block)])
    size, count = Var("size", INDEX), Var("count", INDEX)

    def task(number: Expr) -> Stmt:
        *outside, turn = unflatten(number, [*extents, count])
        point = {axis.variable: value for axis, value in zip(analysis.outer, outside, strict=True)}
        if shared.axis is not None:
            point[shared.axis.variable] = point[shared.axis.variable] * shared.count
        first = Var("first", INDEX)
        part = first, tirx.min(size, index(own) - first)
        return sequence([tirx.Bind(first, _in_turn(analysis, turn, count) * size), of_group(point, part)])

    def of_group(point: Mapping[Var, Expr], part: tuple[Expr, Expr]) -> Stmt:
        task, buffers = _new_task(analysis, lane, blocks, None, (point, index(0), index(0)), block, False, groups.most)
        end = end_of_seen(analysis)

        def in_blocks(of_block: Callable[[Expr, Extent], Stmt]) -> list[Stmt]:
            if end is None:
                return over_keys(task, of_block)
            first, last = (first_query(task, groups, number) for number in (part[0], part[0] + part[1] - 1))
            stop = task.at(end, {lane.variable: last + (task.queries - 1)})
            return up_to_end(task, stop, sees_first(task, first), of_block)

        def of_keys(own: Task, base: Expr, extent: Extent) -> Stmt:
            return _part(own, base, extent) if end is None else sequence(_key_block(own, base, extent, False))

        return with_local(buffers, [in_turns(task, groups, part, in_blocks, of_keys)])

    large = is_large(product([*(axis.extent for axis in analysis.outer), lane.extent, *_terms(analysis)]))
    begin = [tirx.Bind(size, index(groups.size)), tirx.Bind(count, tirx.floordiv(index(own) + size - 1, size))]
    return sequence([*begin, parallel(product([*extents, count]), task, large)])


def _terms(analysis: AttentionAnalysis) -> tuple[Extent, Extent]:
    return analysis.key.extent, analysis.depth.extent


def _by_heads(
    analysis: AttentionAnalysis,
    pairs: Pairs,
    count: Extent,
    large: bool,
    blocks_at: Callable[[Mapping[Var, Expr], Expr], Stmt],
) -> Stmt:
    """Return the parallel loop over the heads that differ in keys and values, each with all blocks of its queries."""
    others = [axis for axis in analysis.outer if not any(axis is own for own in pairs.axes)]

    def head(number: Expr) -> Stmt:
        own = pairs.point(unflatten(number, pairs.heads))
        inside = [*pairs.shares, *(axis.extent for axis in others), count]

        def of_queries(number: Expr) -> Stmt:
            *outside, part = unflatten(number, inside)
            members, places = outside[: len(pairs.axes)], outside[len(pairs.axes) :]
            point = {axis.variable: place for axis, place in zip(others, places, strict=True)}
            heads = {axis.variable: own[axis.variable] + n for axis, n in zip(pairs.axes, members, strict=True)}
            return blocks_at({**heads, **point}, part)

        queries = loop(product(inside), of_queries)
        return with_local(pairs.buffers, [pairs.pack_head(own), *pairs.begin(), queries, *pairs.end()])

    return parallel(product(pairs.heads), head, large)


def _in_turn(analysis: AttentionAnalysis, place: Expr, blocks: Extent) -> Expr:
    """Return the block at a place among a head's: where later ones see more keys, early and late ones take turns.

    So each thread's range of them, wherever it ends, has its share of both.
    """
    if end_of_seen(analysis) is None:
        return place
    half = tirx.floordiv(place, index(2))
    return tirx.Select(tirx.floormod(place, index(2)).equal(0), half, index(blocks) - 1 - half)


def _block_of_queries(
    analysis: AttentionAnalysis,
    lane: Axis,
    blocks: Blocks,
    pairs: Pairs | None,
    point: Mapping[Var, Expr],
    part: tuple[Expr, int],
    clamped: bool,
) -> Stmt:
    """Return the attention of the queries from `part[0]` on, `part[1]` of them."""
    first, block = part
    # The last block begins earlier where the queries do not divide; what it has in common is written once.
    exact = clamped or (isinstance(lane.extent, int) and lane.extent % block == 0)
    start: Expr = first if exact else Var("start", INDEX)
    task, buffers = _new_task(analysis, lane, blocks, pairs, (point, start, first - start), block, clamped)
    begin = [] if exact else [tirx.Bind(start, tirx.min(first, index(lane.extent) - block))]
    return with_local(buffers, [*begin, *_body(task)])


def _new_task(
    analysis: AttentionAnalysis,
    lane: Axis,
    blocks: Blocks,
    pairs: Pairs | None,
    place: tuple[Mapping[Var, Expr], Expr, Expr],
    block: int,
    clamped: bool,
    together: int = 1,
) -> tuple[Task, list[Var]]:
    """Return a task for `block` queries at a head, a first query and the first that is written, and its buffers.

    They have room for as many blocks as are taken `together`.
    """
    (point, start, first), key_block = place, blocks.keys
    depth, columns = analysis.depth.extent, analysis.column.extent
    # Rows of whole lines, an even number of them, would lie in few sets of the first-level cache.
    between = 0 if blocks.groups is None else blocks.lanes * blocks.vectors
    keys = Operand(analysis.keys, analysis.key, analysis.depth, key_block, between=between)
    values = Operand(analysis.values, analysis.key, analysis.column, key_block, between=between)
    buffers = {
        "turned": local([together * depth, block], FLOAT, "turned"),
        "weights": local([key_block, block], FLOAT, "weights"),
        "sums": local([together * columns, block], FLOAT, "sums"),
        **{name: local([block], FLOAT, name) for name in ("largest", "total", "factor", "bound")},
    }
    operands = [*keys.buffers, *values.buffers]
    if pairs is not None:
        buffers |= _buffers_of_pairs(analysis, pairs, key_block, block)
        operands = []
    task = Task(
        analysis, lane, min(blocks.lanes, block), blocks.rows, block, key_block, point, start, first, clamped,
        depth, columns, keys, values, blocks.elements, kept=kept(analysis), powers=blocks.powers,
        pairs=pairs, spreads=blocks.spreads and blocks.groups is None and pairs is None and isinstance(depth, int),
        **buffers,
    )  # fmt: skip
    return task, [*buffers.values(), *operands]


def _buffers_of_pairs(analysis: AttentionAnalysis, pairs: Pairs, keys: int, queries: int) -> dict[str, Var]:
    """Return the buffers that pairs need, and those that they need larger than numbers one by one."""
    depth, buffers = analysis.depth.extent, {}
    assert isinstance(depth, int)
    if isinstance(pairs, Matrices):
        depth, keys = int(rounded_up(depth, TERMS)), int(rounded_up(keys, BLOCK))
        columns = rounded_up(analysis.column.extent, TILE)
        buffers = {
            "weights": local([keys, queries], FLOAT, "weights"),
            "sums": local([columns, queries], FLOAT, "sums"),
        }
    return {
        **buffers,
        "turned_pairs": local([depth // PAIR, queries], "int32", "turned_pairs"),
        "rounded": local([-(-keys // PAIR), queries], "int32", "rounded"),
    }


def _body(task: Task) -> list[Stmt]:
    keys = task.analysis.key.extent
    sink, end = task.analysis.sink, end_of_seen(task.analysis)
    single = isinstance(keys, int) and keys <= task.key_block and sink is None and end is None
    block = task.queries

    def fill(buffer: Var, value: float) -> Stmt:
        return vector(block, lambda v: store(buffer, tirx.const(value, FLOAT), [v]))

    def first(v: Expr) -> Stmt:
        assert sink is not None
        value = task.at(sink, {task.lane.variable: task.query(v)})
        return store(task.largest, tirx.max(value, LOWEST_NUMBER), [v])

    # A sink is what every query has met before the first key.
    largest = fill(task.largest, LOWEST) if sink is None else vector(block, first)
    start = [*turned_queries(task), largest, fill(task.bound, LOWEST), fill(task.total, 0.0 if sink is None else 1.0)]
    if single:
        return [*start, *_key_block(task, index(0), keys, True), written(task)]
    start.append(cleared(task))

    part = partial(_part, task)
    if end is not None:
        last = task.at(end, {task.lane.variable: task.query(index(task.queries - 1))})
        met = all_seen(task.largest, task.queries)
        return [*start, *up_to_end(task, last, met, part), written(task)]
    return [*start, *over_keys(task, part), written(task)]


def _part(task: Task, base: Expr, extent: Extent) -> Stmt:
    steps = sequence(_key_block(task, base, extent, False))
    # What is left of the keys by whole blocks is not looked at.
    return steps if isinstance(extent, int) and extent < task.key_block else if_seen(task, base, extent, steps)


def _key_block(task: Task, base: Expr, extent: Extent, single: bool) -> list[Stmt]:
    """Return the steps of `extent` keys from `base`; a `single` block needs no running sums."""
    block = task.queries
    previous = local([block], FLOAT, "previous")

    def keep(v: Expr) -> Stmt:
        return store(previous, load(subtrahend(task), [v]), [v])

    def shrink(v: Expr) -> Stmt:
        return store(task.factor, factor(task, load(previous, [v]), load(subtrahend(task), [v])), [v])

    def shrink_total(v: Expr) -> Stmt:
        return store(task.total, load(task.total, [v]) * load(task.factor, [v]), [v])

    copies: list[Stmt] = []
    if task.pairs is None and task.number is None:
        copies += task.keys.fill(task.point, base, extent, task.lanes)
        copies += task.values.fill(task.point, base, extent, task.lanes)
    logits = sequence([scores(task, base, extent), *updated(task)])
    if single:
        return [*copies, logits, exponentials(task, extent), weighted(task, base, extent, True)]
    running = [*copies, vector(block, keep), logits, vector(block, shrink), vector(block, shrink_total)]
    return [with_local([previous], [*running, exponentials(task, extent), weighted(task, base, extent, False)])]
