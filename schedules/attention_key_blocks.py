"""The loops of attention over blocks of keys, and which blocks a mask leaves out."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.attention_mask import any_seen, hides, hides_only_ends
from schedules.attention_matrices import Matrices
from schedules.attention_products import FLOAT, ZERO, Task
from schedules.intrin.bf16_pairs import PAIR
from schedules.intrin.matrix_tiles import BLOCK
from schedules.loops import INDEX, Extent, ceiling, index, load, local, loop, store, tiles, vector, with_local
from schedules.stages import sequence


def over_keys(task: Task, part: Callable[[Expr, Extent], Stmt]) -> list[Stmt]:
    """Return the loops over blocks of keys of what `part` does with some from one on."""
    keys = task.analysis.key.extent
    if not isinstance(keys, int):

        def at_most(number: Expr) -> Stmt:
            base = number * task.key_block
            return part(base, tirx.min(index(task.key_block), keys - base))

        return [loop(ceiling(keys, task.key_block), at_most)]
    full, rest = divmod(keys, task.key_block)
    last = [part(index(full * task.key_block), rest)] if rest else []
    return [loop(full, lambda number: part(number * task.key_block, task.key_block)), *last]


def up_to_end(task: Task, last: Expr, met: Expr, part: Callable[[Expr, Extent], Stmt]) -> list[Stmt]:
    """Return the blocks of keys before `last`, the first that the mask hides from all queries, and where needed others.

    A query that has not `met` a key that it sees by then sees none at all: its result comes from all that are hidden.
    """
    keys = index(task.analysis.key.extent)
    at_once = BLOCK if isinstance(task.pairs, Matrices) else PAIR
    last = tirx.floordiv(tirx.max(last, index(0)) + (at_once - 1), index(at_once)) * at_once
    # In memory: TVM takes seconds to bound what depends on bindings of such values.
    bounds = local([3], INDEX, "bounds")
    begin, stop, extent = (load(bounds, [index(place)]) for place in range(3))

    def block(number: Expr) -> Stmt:
        base = begin + number * task.key_block
        count = store(bounds, tirx.min(index(task.key_block), stop - base), [index(2)])
        return sequence([count, part(base, extent)])

    def phase(_: Expr) -> Stmt:
        behind = tirx.Select(met, stop, keys)
        blocks = loop(ceiling(stop - begin, task.key_block), block)
        return sequence([blocks, store(bounds, stop, [index(0)]), store(bounds, behind, [index(1)])])

    start = [store(bounds, index(0), [index(0)]), store(bounds, tirx.min(keys, last), [index(1)])]
    return [with_local([bounds], [*start, loop(2, phase)])]


def if_seen(task: Task, base: Expr, extent: Extent, steps: Stmt) -> Stmt:
    """Return the steps of a block of keys, left out where the mask hides all of them from all queries."""
    hidden = hides(task.analysis)
    if hidden is None or hides_only_ends(task.analysis):
        return steps
    seen = local([task.lanes], FLOAT, "seen")
    none = ZERO

    def sees(query: Expr, key: Expr) -> Expr:
        values = {task.analysis.key.variable: key, task.lane.variable: task.query(query)}
        return tirx.Select(task.at(hidden, values), none, tirx.const(1.0, FLOAT))

    def look(query: Expr) -> Stmt:
        def keys(first: Expr, width: int) -> Stmt:
            return vector(
                width,
                lambda lane: store(seen, tirx.max(load(seen, [lane]), sees(query, base + first + lane)), [lane]),
            )

        return tiles(extent, [task.lanes, 1], keys)

    # Where a mask is causal, the last query sees the first key of every block that is seen at all.
    probe = store(seen, sees(index(task.queries - 1), base), [index(0)])
    search = tirx.IfThenElse(load(seen, [index(0)]) <= none, loop(task.queries, look), None)
    clear = vector(task.lanes, lambda lane: store(seen, none, [lane]))
    condition = any_seen(seen, task.lanes, task.largest, task.queries)
    return with_local([seen], [clear, probe, search, tirx.IfThenElse(condition, steps, None)])
