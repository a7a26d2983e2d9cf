"""The register tiles of attention with queries in lanes: scores of a block of keys, exponentials, weighted values.

Products are multiply-adds of fp32, or where a model asks for operands rounded to bfloat16, dot products of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_mask import Kept, end_of_seen
from schedules.attention_matrices import Matrices
from schedules.attention_operands import Operand
from schedules.attention_pairs import Pairs
from schedules.attention_structure import AttentionAnalysis
from schedules.by_element import over_rows, over_terms
from schedules.intrin.power_of_two import PowersOfTwo
from schedules.loops import Extent, ceiling, cells, index, load, local, loop, store, tiles, unrolled, vector, with_local
from schedules.stages import Axis, sequence, substitute

FLOAT = "float32"
ZERO = tirx.const(0.0, FLOAT)
# Keys whose logits are made at a time of scores in memory: enough that their maximum stays in registers for a while.
ROWS_OF_LOGITS = 8


@dataclass(frozen=True, eq=False)
class Task:
    """One block of queries of one head: `start` is the first query, `first` the first one that is written.

    `clamped` says that lanes may stand for queries past the last one, which they then repeat. `weights` [keys][queries]
    holds what is `kept` of scores, then exponentials; with `pairs` the latter go to `rounded`, two keys' together.
    `largest` is of what is kept, and `bound` what is subtracted from exponents where that has a scale. A task that
    `spreads` its requests for keys and values makes some at each step of a product, not all before it. One of several
    that take each block of keys after each other has a `number` among them: `turned` and `sums` hold the rows of all.
    """

    analysis: AttentionAnalysis
    lane: Axis
    lanes: int
    rows: int
    queries: int
    key_block: int
    point: Mapping[Var, Expr]
    start: Expr
    first: Expr
    clamped: bool
    depth: Extent
    columns: Extent
    keys: Operand
    values: Operand
    elements: int
    turned: Var
    weights: Var
    sums: Var
    largest: Var
    total: Var
    factor: Var
    bound: Var
    kept: Kept
    powers: PowersOfTwo | None
    pairs: Pairs | None = None
    turned_pairs: Var | None = None
    rounded: Var | None = None
    spreads: bool = False
    number: Expr | None = None

    @property
    def scale(self) -> float | None:
        """Return what makes a logit of what is kept, None where that is the logit itself."""
        return self.kept.scale

    def query(self, lane: Expr) -> Expr:
        """Return the query of a lane."""
        number = self.start + lane
        return tirx.min(number, index(self.lane.extent) - 1) if self.clamped else number

    def at(self, expression: Expr, values: Mapping[Var, Expr]) -> Expr:
        """Return `expression` at the task's head and the given values of other axes."""
        return substitute(expression, {**self.point, **values})

    def turned_row(self, d: Expr) -> Expr:
        """Return the row of `turned` that holds an element of all queries."""
        return d if self.number is None else self.number * self.depth + d

    def sums_row(self, e: Expr) -> Expr:
        """Return the row of `sums` that holds a column of all queries' results."""
        return e if self.number is None else self.number * self.columns + e


def cleared(task: Task) -> Stmt:
    """Return the code that sets all sums of a task to zero."""
    return loop(
        task.columns,
        lambda e: vector(task.queries, lambda v: store(task.sums, ZERO, [task.sums_row(e), v])),
    )


def scores(task: Task, base: Expr, extent: Extent) -> Stmt:
    """Return the logits of a block of keys, kept in `weights`, and their running maximum."""
    analysis = task.analysis
    if isinstance(task.pairs, Matrices):
        assert task.turned_pairs is not None
        products = task.pairs.block_of_scores(task.weights, task.turned_pairs, task.queries, task.point, (base, extent))
        return sequence([products, _logits(task, base, extent)])

    def tile(first: Expr, rows: int) -> Stmt:
        registers = local([rows * task.queries], FLOAT, "scores")

        def start(r: Expr, v: Expr) -> Stmt:
            return store(registers, ZERO, [r * task.queries + v])

        def element(r: Expr, d: Expr) -> Expr:
            return task.keys.at(task.point, base, first + r, d)

        def step(d: Expr, of_row: Callable[[Expr], Expr]) -> Stmt:
            def update(r: Expr, v: Expr) -> Stmt:
                place = r * task.queries + v
                return store(
                    registers,
                    load(registers, [place]) + of_row(r) * load(task.turned, [task.turned_row(d), v]),
                    [place],
                )

            lines = _requests_of_step(task, base + first, rows, d) if task.spreads else []
            return sequence([*lines, cells(rows, task.queries, update)])

        def logit(value: Expr, r: Expr, v: Expr) -> Stmt:
            values = {
                analysis.key.variable: base + first + r,
                task.lane.variable: task.query(v),
                analysis.score: load(registers, [r * task.queries + v]),
            }
            return store(task.weights, task.at(value, values), [first + r, v])

        def maximum(r: Expr, v: Expr) -> Stmt:
            return store(task.largest, tirx.max(load(task.largest, [v]), load(task.weights, [first + r, v])), [v])

        if task.pairs is None:
            sums = over_terms(task.depth, task.elements if task.keys.is_contiguous else 1, rows, element, step)
        else:
            tile = (registers, rows, task.queries)
            sums = task.pairs.scores(tile, task.turned_pairs, task.point, base + first)
        finish = _where_seen(task, base + first + rows, lambda value: cells(rows, task.queries, partial(logit, value)))
        keep = cells(rows, task.queries, maximum)
        asks = task.pairs is None and task.number is None and not task.spreads
        ahead = [_requests(task, base + first, rows)] if asks else []
        return with_local([registers], [*ahead, cells(rows, task.queries, start), sums, finish, keep])

    if isinstance(extent, int):
        return _in_equal_tiles(extent, task.rows, tile)
    return _in_tiles_that_overlap(extent, task.rows, tile)


def _logits(task: Task, base: Expr, extent: Extent) -> Stmt:
    """Return the logits in the place of scores in `weights`, and their running maximum."""
    analysis = task.analysis

    def some(first: Expr, rows: int) -> Stmt:
        def logit(value: Expr, r: Expr, v: Expr) -> Stmt:
            values = {
                analysis.key.variable: base + first + r,
                task.lane.variable: task.query(v),
                analysis.score: load(task.weights, [first + r, v]),
            }
            return store(task.weights, task.at(value, values), [first + r, v])

        def maximum(r: Expr, v: Expr) -> Stmt:
            return store(task.largest, tirx.max(load(task.largest, [v]), load(task.weights, [first + r, v])), [v])

        def finish(value: Expr) -> Stmt:
            if value.same_as(analysis.score):
                return tirx.Evaluate(0)
            return cells(rows, task.queries, partial(logit, value))

        return sequence([_where_seen(task, base + first + rows, finish), cells(rows, task.queries, maximum)])

    return tiles(extent, [ROWS_OF_LOGITS, 1], some)


def _requests(task: Task, key: Expr, rows: int) -> Stmt:
    """Return requests for the keys behind `rows` of them, and for the values of these, which are read after all keys.

    Rows of one head lie far apart, so that the hardware foresees little of them. Packed ones are neighbours.
    """

    def row(number: Expr) -> Stmt:
        keys = task.keys.requests(task.point, key + rows + number, cache=1)
        return sequence([*keys, *task.values.requests(task.point, key + number, cache=2), tirx.Evaluate(0)])

    return unrolled(rows, row)


def _requests_of_step(task: Task, key: Expr, rows: int, step: Expr) -> list[Stmt]:
    """Return the part of a step in requests for the keys behind `rows` of them, and for the values of these.

    A core waits where more lines are under way than it has places for: requests before the first step had a third of a
    product's samples (1500 keys of 64 elements, Granite Rapids).
    """
    assert isinstance(task.depth, int)
    asked: list[Stmt] = []
    for operand, first, cache in ((task.keys, key + rows, 1), (task.values, key, 2)):
        lines = operand.lines
        each = -(-rows * lines // task.depth)
        for number in range(each):
            place = step * each + number
            row, line = tirx.floordiv(place, index(lines)), tirx.floormod(place, index(lines))
            asked.append(operand.request(task.point, first + row, line, cache))
    return asked


def _where_seen(task: Task, end: Expr, logits: Callable[[Expr], Stmt]) -> Stmt:
    """Return `logits` of what is kept of scores: without the mask where all queries see all keys before `end`."""
    bound = end_of_seen(task.analysis)
    if task.kept.visible is None or bound is None:
        return logits(task.kept.value)
    seen = end <= task.at(bound, {task.lane.variable: task.query(index(0))})
    return tirx.IfThenElse(seen, logits(task.kept.visible), logits(task.kept.value))


def _in_equal_tiles(extent: int, most: int, tile: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return as few tiles of at most `most` rows as there can be, whose sizes differ by one at most."""
    count = -(-extent // most)
    size, longer = divmod(extent, count)
    rest = index(longer * (size + 1))
    parts = [loop(longer, lambda i: tile(i * (size + 1), size + 1))] if longer else []
    return sequence([*parts, loop(count - longer, lambda i: tile(rest + i * size, size))])


def _in_tiles_that_overlap(extent: Expr, rows: int, tile: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return tiles of `rows` rows, the last of which may repeat some; single rows where there are fewer."""
    whole = loop(ceiling(extent, rows), lambda i: tile(tirx.min(i * rows, extent - rows), rows))
    return tirx.IfThenElse(extent >= rows, whole, loop(extent, lambda i: tile(i, 1)))


def weighted(task: Task, base: Expr, extent: Extent, single: bool) -> Stmt:
    """Return the sum of a block's values, weighted by the exponentials, added to the shrunken sums so far."""
    if isinstance(task.pairs, Matrices):
        return _weighted_in_tiles(task, task.pairs, (base, extent), single)

    def tile(first: Expr, rows: int) -> Stmt:
        registers = local([rows * task.queries], FLOAT, "partial")

        def start(r: Expr, v: Expr) -> Stmt:
            value = ZERO if single else load(task.sums, [task.sums_row(first + r), v]) * load(task.factor, [v])
            return store(registers, value, [r * task.queries + v])

        def step(j: Expr) -> Stmt:
            def element(r: Expr) -> Expr:
                return task.values.at(task.point, base, j, first + r)

            def products(of_row: Callable[[Expr], Expr]) -> Stmt:
                def update(r: Expr, v: Expr) -> Stmt:
                    place = r * task.queries + v
                    return store(registers, load(registers, [place]) + of_row(r) * load(task.weights, [j, v]), [place])

                return cells(rows, task.queries, update)

            return over_rows(rows, task.elements if task.values.is_contiguous else 1, element, products)

        def finish(r: Expr, v: Expr) -> Stmt:
            return store(task.sums, load(registers, [r * task.queries + v]), [task.sums_row(first + r), v])

        if task.pairs is None:
            products = loop(extent, step)
        else:
            products = task.pairs.weighted(
                (registers, rows, task.queries), task.rounded, task.point, (base, extent), first
            )
        return with_local(
            [registers],
            [cells(rows, task.queries, start), products, cells(rows, task.queries, finish)],
        )

    if isinstance(task.columns, int):
        return _in_equal_tiles(task.columns, task.rows, tile)
    return tiles(task.columns, [task.rows, max(1, task.rows // 3), 1], tile)


def _weighted_in_tiles(task: Task, matrices: Matrices, keys: tuple[Expr, Extent], single: bool) -> Stmt:
    assert task.rounded is not None

    def shrink(e: Expr) -> Stmt:
        return vector(
            task.queries, lambda v: store(task.sums, load(task.sums, [e, v]) * load(task.factor, [v]), [e, v])
        )

    rest = matrices.clear_rest(task.rounded, task.queries, keys[1])
    shrunken = [] if single else [loop(task.columns, shrink)]
    sums = matrices.block_of_sums(task.sums, task.rounded, task.queries, task.point, keys, single)
    return sequence([*rest, *shrunken, sums])
