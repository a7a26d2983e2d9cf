"""The loop nest of attention with queries in lanes: register tiles of keys, then of value columns, by queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step
from schedules.attention_joining import LOWEST, LOWEST_NUMBER
from schedules.attention_mask import any_seen, hides
from schedules.attention_operands import Operand
from schedules.attention_structure import AttentionAnalysis
from schedules.family import is_large
from schedules.intrin.vector_math import exp_of_nonpositive
from schedules.loops import (
    INDEX,
    Extent,
    ceiling,
    cells,
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
    vector,
    with_local,
)
from schedules.stages import Axis, as_extent, loads_of, sequence, substitute
from schedules.turn import turned

FLOAT = "float32"


@dataclass(frozen=True, eq=False)
class _Task:
    """One block of queries of one head: `start` is the first query, `first` the first one that is written.

    `clamped` says that lanes may stand for queries past the last one, which they then repeat.
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
    turned: Var
    weights: Var
    sums: Var
    largest: Var
    total: Var
    factor: Var

    def query(self, lane: Expr) -> Expr:
        """Return the query of a lane."""
        number = self.start + lane
        return tirx.min(number, index(self.lane.extent) - 1) if self.clamped else number

    def at(self, expression: Expr, values: Mapping[Var, Expr]) -> Expr:
        """Return `expression` at the task's head and the given values of other axes."""
        return substitute(expression, {**self.point, **values})


def emit(analysis: AttentionAnalysis, lane: Axis, lanes: int, tile: tuple[int, int], key_block: int) -> Stmt:
    """Return the parallel loop over heads and blocks of queries; `tile` is the rows and vectors of accumulators."""
    rows, vectors = tile
    block = lanes * vectors

    def variant(clamped: bool) -> Stmt:
        return _tasks(analysis, lane, lanes, rows, block, key_block, clamped)

    if isinstance(lane.extent, int):
        return variant(lane.extent < block)
    return tirx.IfThenElse(lane.extent >= block, variant(False), variant(True))


def _tasks(
    analysis: AttentionAnalysis, lane: Axis, lanes: int, rows: int, block: int, key_block: int, clamped: bool
) -> Stmt:
    outer = [axis.extent for axis in analysis.outer]
    queries = lane.extent
    blocks = ceiling(queries, block)
    depth, columns = analysis.depth.extent, analysis.column.extent

    def task(number: Expr) -> Stmt:
        *outside, part = unflatten(number, [*outer, blocks])
        first = part * block
        exact = clamped or (isinstance(queries, int) and queries % block == 0)
        # The last block begins earlier where the queries do not divide; what it has in common is written once.
        start: Expr = first if exact else Var("start", INDEX)
        buffers = {
            "turned": local([depth, block], FLOAT, "turned"),
            "weights": local([key_block, block], FLOAT, "weights"),
            "sums": local([columns, block], FLOAT, "sums"),
            **{name: local([block], FLOAT, name) for name in ("largest", "total", "factor")},
        }
        point = {axis.variable: value for axis, value in zip(analysis.outer, outside, strict=True)}
        keys = Operand(analysis.keys, analysis.key, analysis.depth, key_block)
        values = Operand(analysis.values, analysis.key, analysis.column, key_block)
        self = _Task(
            analysis,
            lane,
            lanes,
            rows,
            block,
            key_block,
            point,
            start,
            first - start,
            clamped,
            depth,
            columns,
            keys,
            values,
            **buffers,
        )
        begin = [] if exact else [tirx.Bind(start, tirx.min(first, index(queries) - block))]
        return with_local([*buffers.values(), *keys.buffers, *values.buffers], [*begin, *_body(self)])

    work = product([*outer, queries, analysis.key.extent, depth])
    return parallel(product([*outer, blocks]), task, is_large(work))


def _body(task: _Task) -> list[Stmt]:
    keys = task.analysis.key.extent
    sink = task.analysis.sink
    single = isinstance(keys, int) and keys <= task.key_block and sink is None
    block = task.queries

    def fill(buffer: Var, value: float) -> Stmt:
        return vector(block, lambda v: store(buffer, tirx.const(value, FLOAT), [v]))

    def first(v: Expr) -> Stmt:
        assert sink is not None
        value = task.at(sink, {task.lane.variable: task.query(v)})
        return store(task.largest, tirx.max(value, LOWEST_NUMBER), [v])

    # A sink is what every query has met before the first key.
    start = [fill(task.largest, LOWEST), fill(task.total, 0.0)]
    if sink is not None:
        start = [vector(block, first), fill(task.total, 1.0)]
    if single:
        return [_turn_queries(task), *start, *_key_block(task, index(0), keys, True), _write(task)]
    start.append(
        loop(task.columns, lambda e: vector(block, lambda v: store(task.sums, tirx.const(0.0, FLOAT), [e, v])))
    )

    def part(number: Expr) -> Stmt:
        base = number * task.key_block
        extent = task.key_block if isinstance(keys, int) else tirx.min(index(task.key_block), keys - base)
        return _if_seen(task, base, extent, sequence(_key_block(task, base, extent, False)))

    if not isinstance(keys, int):
        return [_turn_queries(task), *start, loop(ceiling(keys, task.key_block), part), _write(task)]
    full, rest = divmod(keys, task.key_block)
    last = _key_block(task, index(full * task.key_block), rest, False) if rest else []
    return [_turn_queries(task), *start, loop(full, part), *last, _write(task)]


def _if_seen(task: _Task, base: Expr, extent: Extent, steps: Stmt) -> Stmt:
    """Return the steps of a block of keys, left out where the mask hides all of them from all queries."""
    hidden = hides(task.analysis)
    if hidden is None:
        return steps
    seen = local([task.lanes], FLOAT, "seen")
    none = tirx.const(0.0, FLOAT)

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


def _turn_queries(task: _Task) -> Stmt:
    """Return the copy of the block's queries to [depth][queries]."""
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
                width, lambda d: vector(task.queries, lambda v: store(task.turned, element(v, base + d), [base + d, v]))
            )
        return loop(
            task.queries // lanes,
            lambda part: turned(
                lanes,
                FLOAT,
                lambda row, column: element(part * lanes + row, base + column),
                lambda row, column, value: store(task.turned, value, [base + column, part * lanes + row]),
            ),
        )

    return tiles(task.depth, [lanes] if isinstance(task.depth, int) else [lanes, 1], columns)


def _key_block(task: _Task, base: Expr, extent: Extent, single: bool) -> list[Stmt]:
    """Return the steps of `extent` keys from `base`; a `single` block needs no running sums."""
    block = task.queries
    previous = local([block], FLOAT, "previous")

    def keep(v: Expr) -> Stmt:
        return store(previous, load(task.largest, [v]), [v])

    def shrink(v: Expr) -> Stmt:
        value = exp_of_nonpositive(load(previous, [v]) - load(task.largest, [v]))
        return store(task.factor, value, [v])

    def shrink_total(v: Expr) -> Stmt:
        return store(task.total, load(task.total, [v]) * load(task.factor, [v]), [v])

    copies = [*task.keys.fill(task.point, base, extent, task.lanes)]
    copies += task.values.fill(task.point, base, extent, task.lanes)
    scores = _scores(task, base, extent)
    if single:
        return [*copies, scores, _exponentials(task, extent), _weighted(task, base, extent, True)]
    running = [*copies, vector(block, keep), scores, vector(block, shrink), vector(block, shrink_total)]
    return [with_local([previous], [*running, _exponentials(task, extent), _weighted(task, base, extent, False)])]


def _scores(task: _Task, base: Expr, extent: Extent) -> Stmt:
    """Return the logits of a block of keys, kept in `weights`, and their running maximum."""
    analysis = task.analysis

    def tile(first: Expr, rows: int) -> Stmt:
        registers = local([rows * task.queries], FLOAT, "scores")

        def start(r: Expr, v: Expr) -> Stmt:
            return store(registers, tirx.const(0.0, FLOAT), [r * task.queries + v])

        def step(d: Expr) -> Stmt:
            def update(r: Expr, v: Expr) -> Stmt:
                factor = task.keys.at(task.point, base, first + r, d)
                place = r * task.queries + v
                return store(registers, load(registers, [place]) + factor * load(task.turned, [d, v]), [place])

            return cells(rows, task.queries, update)

        def logit(r: Expr, v: Expr) -> Stmt:
            values = {
                analysis.key.variable: base + first + r,
                task.lane.variable: task.query(v),
                analysis.score: load(registers, [r * task.queries + v]),
            }
            return store(task.weights, task.at(analysis.logit, values), [first + r, v])

        def maximum(r: Expr, v: Expr) -> Stmt:
            return store(task.largest, tirx.max(load(task.largest, [v]), load(task.weights, [first + r, v])), [v])

        finish = [cells(rows, task.queries, logit), cells(rows, task.queries, maximum)]
        return with_local([registers], [cells(rows, task.queries, start), loop(task.depth, step), *finish])

    return _in_rows(extent, task.rows, tile)


def _in_rows(extent: Extent, rows: int, tile: Callable[[Expr, int], Stmt]) -> Stmt:
    sizes = [rows] if isinstance(extent, int) else [rows, max(1, rows // 3), 1]
    return tiles(extent, list(dict.fromkeys(sizes)), tile)


def _exponentials(task: _Task, extent: Extent) -> Stmt:
    """Return the exponentials of a block's logits, in their place, and their sum."""

    def exponential(j: Expr, v: Expr) -> Stmt:
        return store(task.weights, exp_of_nonpositive(load(task.weights, [j, v]) - load(task.largest, [v])), [j, v])

    def add(j: Expr, v: Expr) -> Stmt:
        return store(task.total, load(task.total, [v]) + load(task.weights, [j, v]), [v])

    def row(j: Expr) -> Stmt:
        return tirx.SeqStmt(
            [vector(task.queries, lambda v: exponential(j, v)), vector(task.queries, lambda v: add(j, v))]
        )

    return loop(extent, row)


def _weighted(task: _Task, base: Expr, extent: Extent, single: bool) -> Stmt:
    """Return the sum of a block's values, weighted by the exponentials, added to the shrunken sums so far."""

    def tile(first: Expr, rows: int) -> Stmt:
        registers = local([rows * task.queries], FLOAT, "partial")

        def start(r: Expr, v: Expr) -> Stmt:
            value = tirx.const(0.0, FLOAT) if single else load(task.sums, [first + r, v]) * load(task.factor, [v])
            return store(registers, value, [r * task.queries + v])

        def step(j: Expr) -> Stmt:
            def update(r: Expr, v: Expr) -> Stmt:
                factor = task.values.at(task.point, base, j, first + r)
                place = r * task.queries + v
                return store(registers, load(registers, [place]) + factor * load(task.weights, [j, v]), [place])

            return cells(rows, task.queries, update)

        def finish(r: Expr, v: Expr) -> Stmt:
            return store(task.sums, load(registers, [r * task.queries + v]), [first + r, v])

        return with_local(
            [registers],
            [cells(rows, task.queries, start), loop(extent, step), cells(rows, task.queries, finish)],
        )

    return _in_rows(task.columns, task.rows, tile)


def _write(task: _Task) -> Stmt:
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
        return load(task.sums, [e, lane]) * load(task.factor, [lane])

    def columns(base: Expr, width: int) -> Stmt:
        if width != lanes:
            return loop(width, lambda e: loop(task.queries, lambda v: store(rows, element(v, base + e), [v, base + e])))
        return loop(
            task.queries // lanes,
            lambda part: turned(
                lanes,
                FLOAT,
                lambda row, column: element(part * lanes + column, base + row),
                lambda row, column, value: store(rows, value, [part * lanes + column, base + row]),
            ),
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
    return with_local(
        [rows],
        [
            vector(task.queries, inverse),
            tiles(task.columns, [lanes] if isinstance(task.columns, int) else [lanes, 1], columns),
            loop(count, lambda lane: copy(task.first + lane)),
        ],
    )
