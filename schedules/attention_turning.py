"""Attention's queries turned from rows to lanes, and its results turned back.

Those that lie in memory as bfloat16 are turned two neighbours at once, as numbers of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step
from schedules.attention_operands import narrow_read
from schedules.attention_products import FLOAT, Task
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.bf16_pairs import PAIR
from schedules.loops import Extent, in_vectors, index, load, local, loop, store, tiles, unrolled, vector, with_local
from schedules.stages import as_extent, loads_of, sequence
from schedules.turn import turned, turned_vectors


def turned_queries(task: Task) -> list[Stmt]:
    """Return the copy of the block's queries to [depth][queries], and its rounding to pairs where they are read so."""
    narrow = _narrow_queries(task)
    if narrow is not None:
        return [narrow]
    analysis, lanes = task.analysis, task.lanes

    def element(lane: Expr, d: Expr) -> Expr:
        values = {task.lane.variable: task.query(lane), analysis.depth.variable: d}
        return task.at(analysis.query, values).astype(FLOAT)

    contiguous = all(
        Access(read.source, tuple(read.indices)).step(analysis.depth) == Step.UNIT for read in loads_of(analysis.query)
    )

    def columns(base: Expr, width: int) -> Stmt:
        if width != lanes or not contiguous:
            return loop(
                width,
                lambda d: vector(
                    task.queries, lambda v: store(task.turned, element(v, base + d), [task.turned_row(base + d), v])
                ),
            )
        return _squares(
            task,
            lambda first, row, column: element(first + row, base + column),
            lambda first, row, column, value: store(task.turned, value, [task.turned_row(base + column), first + row]),
        )

    turning = tiles(task.depth, [lanes] if isinstance(task.depth, int) else [lanes, 1], columns)
    if task.pairs is None:
        return [turning]
    return [turning, task.pairs.turn(task.turned, task.turned_pairs, task.queries)]


def written(task: Task) -> Stmt:
    """Return the division by the sums of exponentials, and the output turned back to rows of queries."""
    analysis, lanes = task.analysis, task.lanes

    def inverse(v: Expr) -> Stmt:
        total = load(task.total, [v])
        value = tirx.const(1.0, FLOAT) / total
        if analysis.zero_if_empty:
            value = tirx.Select(total > tirx.const(0.0, FLOAT), value, tirx.const(0.0, FLOAT))
        return store(task.factor, value, [v])

    rows = local([task.queries, task.columns], FLOAT, "rows")

    def element(lane: Expr, e: Expr) -> Expr:
        return load(task.sums, [task.sums_row(e), lane]) * load(task.factor, [lane])

    def columns(base: Expr, width: int) -> Stmt:
        if width != lanes:
            return loop(width, lambda e: loop(task.queries, lambda v: store(rows, element(v, base + e), [v, base + e])))
        return _squares(
            task,
            lambda first, row, column: element(first + column, base + row),
            lambda first, row, column, value: store(rows, value, [first + column, base + row]),
        )

    def copy(lane: Expr) -> Stmt:
        values = {task.lane.variable: task.start + lane}

        def cell(e: Expr) -> Stmt:
            at = {**values, analysis.column.variable: e}
            indices = [task.at(i, at) for i in analysis.indices]
            return store(analysis.output, load(rows, [lane, e]).astype(analysis.output.dtype), indices)

        return in_vectors(task.lanes, task.columns, cell)

    end = tirx.min(index(task.queries), index(task.lane.extent) - task.start) if task.clamped else index(task.queries)
    count = as_extent(end - task.first)
    narrow = _narrow_results(task, task.first, count)
    if narrow is not None:
        return sequence([vector(task.queries, inverse), narrow])
    return with_local(
        [rows],
        [
            vector(task.queries, inverse),
            tiles(task.columns, [lanes] if isinstance(task.columns, int) else [lanes, 1], columns),
            loop(count, lambda lane: copy(task.first + lane)),
        ],
    )


def _squares(
    task: Task, element: Callable[[Expr, Expr, Expr], Expr], write: Callable[[Expr, Expr, Expr, Expr], Stmt]
) -> Stmt:
    """Return `turned` for each vector of the block's queries, with the number of its first one before all arguments."""

    def square(part: Expr) -> Stmt:
        first = part * task.lanes
        return turned(task.lanes, FLOAT, partial(element, first), partial(write, first))

    return loop(task.queries // task.lanes, square)


def _narrow_queries(task: Task) -> Stmt | None:
    """Return the copy of queries to pairs [depth / 2][queries]; None where they are no whole vectors of bfloat16."""
    analysis, pairs, depth, lanes = task.analysis, task.pairs, task.depth, task.lanes
    read = narrow_read(analysis.query, analysis.depth)
    if pairs is None or read is None or lanes != pairs.dot.lanes or not isinstance(depth, int):
        return None
    if depth % (PAIR * lanes):
        return None
    dot, target = pairs.dot, task.turned_pairs
    assert target is not None

    def block(chunk: Expr, part: Expr) -> Stmt:
        def fetch(row: Expr) -> Expr:
            values = {task.lane.variable: task.query(part * lanes + row), analysis.depth.variable: chunk * PAIR * lanes}
            return dot.read_adjacent(task.at(read, values))

        def keep(column: Expr, value: Expr) -> Stmt:
            return store(target, value, [chunk * lanes + column, _vector(part * lanes, lanes)])

        return turned_vectors(lanes, "int32", fetch, keep)

    return loop(depth // (PAIR * lanes), lambda chunk: loop(task.queries // lanes, lambda part: block(chunk, part)))


def _narrow_results(task: Task, first: Expr, count: Extent) -> Stmt | None:
    """Return the stores of `count` queries' results from `first` on, sums [columns][queries] times `factor`.

    None where results are no whole vectors of bfloat16.
    """
    analysis, pairs, columns, lanes = task.analysis, task.pairs, task.columns, task.lanes
    step = Access(analysis.output, analysis.indices).step(analysis.column)
    if pairs is None or str(analysis.output.dtype) != BFLOAT16 or step != Step.UNIT or lanes != pairs.dot.lanes:
        return None
    if not isinstance(columns, int) or columns % (PAIR * lanes):
        return None
    dot = pairs.dot
    rows = local([task.queries, columns // PAIR], "int32", "rows")

    def block(chunk: Expr, part: Expr) -> Stmt:
        queries = _vector(part * lanes, lanes)

        def fetch(number: Expr) -> Expr:
            column = (chunk * lanes + number) * PAIR
            both = [load(task.sums, [column + n, queries]) * load(task.factor, [queries]) for n in range(PAIR)]
            return dot.alternating(*both)

        def keep(row: Expr, value: Expr) -> Stmt:
            return store(rows, value, [part * lanes + row, _vector(chunk * lanes, lanes)])

        return turned_vectors(lanes, "int32", fetch, keep)

    def copy(lane: Expr, chunk: Expr) -> Stmt:
        values = {task.lane.variable: task.start + lane, analysis.column.variable: chunk * PAIR * lanes}
        place = load(analysis.output, [task.at(position, values) for position in analysis.indices])
        return dot.write_adjacent(place, load(rows, [lane, _vector(chunk * lanes, lanes)]))

    chunks = columns // (PAIR * lanes)
    turning = loop(chunks, lambda chunk: loop(task.queries // lanes, lambda part: block(chunk, part)))
    written = loop(count, lambda lane: unrolled(chunks, lambda chunk: copy(first + lane, chunk)))
    return with_local([rows], [turning, written])


def _vector(first: Expr, lanes: int) -> Expr:
    return tirx.Ramp(first, index(1), lanes)
