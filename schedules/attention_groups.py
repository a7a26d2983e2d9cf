"""Attention's blocks of queries that take each block of keys one after the other.

Each block of queries reads all keys and values of its head. What the second-level cache does not hold of these comes
from the last one, which cores share, once for each block of queries. Those of a group, of all heads that share keys and
values, take a block of keys, which all but the first find in the second-level cache, before the next one. Keys and
values that are no numbers in fp32 are widened once for all of them. What a block of queries keeps in registers while it
takes a block of keys lies in memory between its turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import occurs
from schedules.attention_block import Heads, shared_heads
from schedules.attention_joining import LOWEST
from schedules.attention_mask import end_of_seen, hides_only_ends
from schedules.attention_operands import is_plain
from schedules.attention_products import FLOAT, Task, cleared
from schedules.attention_structure import AttentionAnalysis
from schedules.attention_turning import turned_queries, written
from schedules.loops import INDEX, Extent, ceiling, index, load, local, loop, product, store, vector, with_local
from schedules.stages import sequence
from targets.base import Target

# 1500 keys took 24.2 ms by single blocks, 23.1 by four and 22.4 by eight; 36.6 and 29.0 by single ones and eight in an
# hour in which others used the last cache (Zen 3).
LARGEST_GROUP = 8
# Groups that each core should have at least, so that the last ones end at about the same time. 512 queries of 9 heads
# behind 3584 tokens took 28.9 ms by groups of four, which twice as many would make, and 28.4 by eight (Zen 3).
GROUPS_OF_CORE = 4
_FLOAT_BYTES = 4
_FIRST = index(0)

# What a task does with the keys from one on, so many of them.
KeyBlock = Callable[[Task, Expr, Extent], Stmt]
# The loops over blocks of keys of what one of them does.
OverKeys = Callable[[Callable[[Expr, Extent], Stmt]], list[Stmt]]


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of `size` blocks of queries, at most `most`, each of one of the `heads` that share keys and values."""

    heads: Heads
    size: Extent
    most: int


def groups_of(analysis: AttentionAnalysis, queries: Extent, block: int, target: Target) -> Groups | None:
    """Return the groups of blocks of `block` queries that take each block of keys together, None where none gain."""
    heads = product([axis.extent for axis in analysis.outer])
    elements = product([analysis.key.extent, analysis.depth.extent])
    end = end_of_seen(analysis)
    if analysis.sink is not None or (isinstance(queries, int) and queries < block):
        return None
    if end is not None and not hides_only_ends(analysis):
        return None
    shared = shared_heads(analysis, analysis.outer)
    if shared.axis is not None and end is not None and occurs(end, shared.axis.variable):
        return None
    plain = is_plain(analysis.keys) and is_plain(analysis.values)
    if plain and isinstance(elements, int) and not _exceed_caches(elements, target):
        return None
    each = product([heads, ceiling(queries, block)])
    cores = GROUPS_OF_CORE * target.cores
    if isinstance(each, int):
        most = max(1, min(LARGEST_GROUP, each // cores))
        return Groups(shared, most, most) if most > 1 else None
    size = tirx.max(index(1), tirx.min(index(LARGEST_GROUP), tirx.floordiv(each, index(cores))))
    return Groups(shared, size, LARGEST_GROUP)


def _exceed_caches(elements: int, target: Target) -> bool:
    """Return whether blocks of queries find so many elements of keys, and as many of values, in too far a cache.

    Beside these, what the blocks themselves read and write passes through the second-level one. With 32 registers a
    block of queries is large enough for the last one: 1500 keys took 23.7 ms by single blocks, 24.8 by groups (Emerald
    Rapids, one thread).
    """
    return target.has_few_registers and 2 * elements * _FLOAT_BYTES > target.caches.level2 // 2


def first_query(task: Task, groups: Groups, number: Expr) -> Expr:
    """Return the first query of a block, counted with those of all heads that share keys."""
    place = tirx.floordiv(number, index(groups.heads.count)) * task.queries
    return tirx.min(place, index(task.lane.extent) - task.queries)


def in_turns(task: Task, groups: Groups, part: tuple[Expr, Expr], over_keys: OverKeys, key_block: KeyBlock) -> Stmt:
    """Return the attention of `part[1]` blocks of queries from `part[0]` on, counted with those of all heads."""
    first, count = part
    heads, members = groups.heads.axis, groups.heads.count
    states = {task.largest: LOWEST, task.total: 0.0, task.bound: LOWEST}
    kept = local([groups.most * len(states), task.queries], FLOAT, "kept")

    def each(steps: Callable[[Task], list[Stmt]]) -> Stmt:
        def one(number: Expr) -> Stmt:
            place, start = Var("place", INDEX), Var("start", INDEX)
            own = tirx.floordiv(first + number, index(members)) * task.queries
            begin = [tirx.Bind(place, own), tirx.Bind(start, first_query(task, groups, first + number))]
            point = dict(task.point)
            if heads is not None:
                member = Var("member", INDEX)
                begin.append(tirx.Bind(member, tirx.floormod(first + number, index(members))))
                point[heads.variable] = point[heads.variable] + member
            own_task = replace(task, number=number, point=point, start=start, first=place - start)
            return sequence([*begin, *steps(own_task)])

        return loop(count, one)

    def row_of(own: Task, state: int) -> Expr:
        assert own.number is not None
        return own.number * len(states) + state

    def keep(own: Task, state: int, value: Callable[[Expr], Expr]) -> Stmt:
        return vector(own.queries, lambda v: store(kept, value(v), [row_of(own, state), v]))

    def take_up(own: Task, state: int, buffer: Var) -> Stmt:
        return vector(own.queries, lambda v: store(buffer, load(kept, [row_of(own, state), v]), [v]))

    def begin(own: Task) -> list[Stmt]:
        values = [tirx.const(value, FLOAT) for value in states.values()]
        return [
            *turned_queries(own),
            cleared(own),
            *(keep(own, n, lambda _, x=value: x) for n, value in enumerate(values)),
        ]

    def taken_up(own: Task) -> list[Stmt]:
        return [take_up(own, number, buffer) for number, buffer in enumerate(states)]

    def turn(base: Expr, extent: Extent) -> Callable[[Task], list[Stmt]]:
        def steps(own: Task) -> list[Stmt]:
            def seen(count: Extent) -> Stmt:
                laid_by = [keep(own, n, lambda v, b=buffer: load(b, [v])) for n, buffer in enumerate(states)]
                return sequence([*taken_up(own), key_block(own, base, count), *laid_by])

            return [_of_those_seen(own, base, extent, seen)]

        return steps

    def block(base: Expr, extent: Extent) -> Stmt:
        keys, values = (operand.fill(task.point, base, extent, task.lanes) for operand in (task.keys, task.values))
        return sequence([*keys, *values, each(turn(base, extent))])

    return with_local([kept], [each(begin), *over_keys(block), each(lambda own: [*taken_up(own), written(own)])])


def _of_those_seen(task: Task, base: Expr, extent: Extent, steps: Callable[[Extent], Stmt]) -> Stmt:
    """Return `steps` of as many of a block's keys as a task's last query sees, of all where some query sees none."""
    end = end_of_seen(task.analysis)
    if end is None:
        return steps(extent)
    # In memory: TVM takes seconds to bound what depends on bindings of such values.
    count = local([1], INDEX, "count")
    last = task.at(end, {task.lane.variable: task.query(index(task.queries - 1))})
    seen = tirx.Select(sees_first(task, task.query(_FIRST)), tirx.min(index(extent), last - base), index(extent))
    number = load(count, [_FIRST])
    return with_local([count], [store(count, seen, [_FIRST]), tirx.IfThenElse(number > 0, steps(number), None)])


def sees_first(task: Task, query: Expr) -> Expr:
    """Return whether a query sees the first key, where a mask hides only ends: later queries then do as well."""
    end = end_of_seen(task.analysis)
    assert end is not None
    return task.at(end, {task.lane.variable: query}) > 0
