"""Attention's blocks of queries that take each block of keys one after the other.

Each block of queries reads all keys and values of its head. What the second-level cache does not hold of these comes
from the last one, which cores share, once for each block of queries. Those of a group take a block of keys, which all
but the first find in the second-level cache, before the next one. What a block of queries keeps in registers while it
takes a block of keys lies in memory between its turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_joining import LOWEST
from schedules.attention_mask import end_of_seen
from schedules.attention_products import FLOAT, Task, cleared
from schedules.attention_structure import AttentionAnalysis
from schedules.attention_turning import turned_queries, written
from schedules.loops import INDEX, Extent, index, load, local, loop, product, store, vector, with_local
from schedules.stages import sequence
from targets.base import Target

# 1500 keys took 24.2 ms by single blocks, 23.1 by four and 22.4 by eight; 36.6 and 29.0 by single ones and eight in an
# hour in which others used the last cache (Zen 3).
LARGEST_GROUP = 8
# Groups that each core should have at least, so that the last ones end at about the same time.
GROUPS_OF_CORE = 8
_FLOAT_BYTES = 4

# What a task does with the keys from one on, so many of them.
KeyBlock = Callable[[Task, Expr, Extent], Stmt]
# The loops over blocks of keys of what one of them does.
OverKeys = Callable[[Callable[[Expr, Extent], Stmt]], list[Stmt]]


def size_of_group(analysis: AttentionAnalysis, queries: Extent, block: int, target: Target) -> int:
    """Return how many blocks of `block` queries take each block of keys together, 1 where that gains nothing."""
    heads = product([axis.extent for axis in analysis.outer])
    elements = product([analysis.key.extent, analysis.depth.extent])
    if not isinstance(heads, int) or not isinstance(elements, int) or not isinstance(queries, int) or queries < block:
        return 1
    if analysis.sink is not None or end_of_seen(analysis) is not None:
        return 1
    # Beside keys and values, what the blocks of queries themselves read and write passes through the cache.
    if 2 * elements * _FLOAT_BYTES <= target.caches.level2 // 2:
        return 1
    groups = GROUPS_OF_CORE * target.cores
    return max(1, min(LARGEST_GROUP, heads * -(-queries // block) // groups))


def in_turns(task: Task, size: int, part: tuple[Expr, Expr], over_keys: OverKeys, key_block: KeyBlock) -> Stmt:
    """Return the attention of the queries from `part[0]` on, `part[1]` blocks of them, at most `size`."""
    first, count = part
    states = {task.largest: LOWEST, task.total: 0.0, task.bound: LOWEST}
    kept = local([size * len(states), task.queries], FLOAT, "kept")

    def each(steps: Callable[[Task], list[Stmt]]) -> Stmt:
        def one(number: Expr) -> Stmt:
            place, start = Var("place", INDEX), Var("start", INDEX)
            last = index(task.lane.extent) - task.queries
            begin = [tirx.Bind(place, first + number * task.queries), tirx.Bind(start, tirx.min(place, last))]
            return sequence([*begin, *steps(replace(task, number=number, start=start, first=place - start))])

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
            laid_by = [keep(own, n, lambda v, b=buffer: load(b, [v])) for n, buffer in enumerate(states)]
            return [*taken_up(own), key_block(own, base, extent), *laid_by]

        return steps

    blocks = over_keys(lambda base, extent: each(turn(base, extent)))
    return with_local([kept], [each(begin), *blocks, each(lambda own: [*taken_up(own), written(own)])])
