"""Functions of rows in several steps: softmax, layer, group and RMS normalization, and what is fused around them.

All steps share leading axes. Each task runs every step for one row, with what the steps hand on kept in buffers of one
row, so that the row stays in the first-level cache from its first read to its last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, Step, as_int, branches_on, group_axes, occurs, same_extent
from schedules.elementwise import overlapping_tiles, overlapping_vectors
from schedules.family import Choice, Kernel, Parameters, Space, parallel_if_large, vector_width, work_of
from schedules.loops import (
    LINE_BITS,
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    nest,
    prefetch,
    product,
    store,
    unflatten,
    vector,
    with_local,
)
from schedules.matmul import step, walks_in_lanes
from schedules.reducer import accumulate, accumulator_dtype, reducer_of
from schedules.reduction import reduce_element
from schedules.softmax import simplified
from schedules.stages import Axis, Stage, as_extent, bind, contains, replace_loads, sequence, substitute
from targets.base import Target

TASKS_PER_CORE = 4
SYMBOLIC_ROWS_PER_TASK = 4
# The work of a row that takes as long as the division that finds its place, and what a row may grow to.
SHORT_ROW = 64
LONGEST_ROW = 8192
# Shorter rows the hardware sees coming.
FEWEST_LINES = 8


@dataclass(frozen=True, eq=False)
class RowwiseAnalysis:
    """Stages with `leading` output dimensions in common; `private` are the buffers that only they use."""

    stages: tuple[Stage, ...]
    leading: int
    private: tuple[Var, ...]


class Rowwise:
    """Rows in parallel, every step of a row in one task, vectors along the row."""

    name = "rowwise"
    version = 2

    def takes(self, kernel: Kernel, target: Target) -> RowwiseAnalysis | None:
        """Return the analysis of a kernel of several stages with leading axes in common."""
        leading = shared_leading(kernel.stages)
        if not kernel.private or not leading or not any(stage.is_reduction for stage in kernel.stages):
            return None
        stages, private = simplified(kernel.stages, kernel.private, target)
        return RowwiseAnalysis(stages, _long_rows(stages, leading), private)

    def space(self, target: Target, analysis: RowwiseAnalysis) -> Space:
        """Return how many registers one vector statement spans."""
        return (Choice("vectors", 2, (1, 2, 4)),)

    def apply(self, analysis: RowwiseAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the parallel loop over rows."""
        return all_rows(analysis, parameters["vectors"], target, _most_work(analysis.stages))


def row_extents(analysis: RowwiseAnalysis) -> list[Extent]:
    """Return the extents of the leading axes, whose product is the number of rows."""
    return [_extent(extent) for extent in analysis.stages[0].output.shape[: analysis.leading]]


def all_rows(analysis: RowwiseAnalysis, vectors: int, target: Target, work: Extent) -> Stmt:
    """Return the loop over all rows, parallel where `work` is large."""
    count = product(row_extents(analysis))
    return in_tasks(count, work, target, lambda start, rows: consecutive_rows(analysis, start, rows, vectors, target))


def in_tasks(count: Extent, work: Extent, target: Target, rows: Callable[[Expr, Extent], Stmt]) -> Stmt:
    """Return the loop over tasks of several of `count` rows each, parallel where `work` is large.

    `rows` is the code for so many rows from the first of a task on.
    """
    chunk = _rows_per_task(count, target)

    def task(number: Expr) -> Stmt:
        start = number * chunk
        whole = isinstance(count, int) and count % chunk == 0
        rest = index(chunk) if whole else tirx.min(index(chunk), count - start)
        return rows(start, as_extent(rest))

    return parallel_if_large(ceiling(count, chunk), work, task)


def consecutive_rows(analysis: RowwiseAnalysis, start: Expr, extent: Extent, vectors: int, target: Target) -> Stmt:
    """Return code for rows [start, start + extent) of the flattened leading axes; a statement spans `vectors`."""
    extents = row_extents(analysis)
    buffers = [_RowBuffer.of(buffer, analysis.leading) for buffer in analysis.private]
    lanes = max(vector_width(target, stage) for stage in analysis.stages) * vectors

    def row(number: Expr) -> Stmt:
        position = unflatten(number, extents)
        first, *others = [
            _step(stage, analysis.leading, buffers, position, lanes, first)
            for first, stage in _in_one_walk(analysis.stages, analysis.leading)
        ]
        return sequence([first, *_ahead(analysis, unflatten(number + 1, extents), target), *others])

    return with_local([each.local for each in buffers], [loop(extent, lambda i: row(start + i))])


def _ahead(analysis: RowwiseAnalysis, position: Sequence[Expr], target: Target) -> list[Stmt]:
    """Return requests for the lines that the row at `position`, past the last one or not, reads, where they are far.

    The first step waits for a row's lines, the others find them in the first-level cache: meanwhile those of the next
    row can come.
    """
    outputs = [stage.output for stage in analysis.stages]
    asked: dict[Var, Stmt] = {}
    for stage in analysis.stages:
        work = work_of(stage)
        far = isinstance(work, int) and work * stage.output.dtype.bits // 8 > target.caches.level2 // 2
        point = bind(stage.indices[: analysis.leading], position)
        groups = group_axes([axis for axis in stage.axes if axis.variable not in point], [stage])
        if not far or len(groups) != 1:
            continue
        for read in stage.loads():
            place = read.indices
            own = all(any(occurs(each, variable) for each in place) for variable in point)
            if own and read.source not in asked and not contains(outputs, read.source):
                line = LINE_BITS // read.source.dtype.bits
                count = ceiling(groups[0].extent, line)
                if step(read, groups[0]) == Step.UNIT and isinstance(count, int) and count >= FEWEST_LINES:
                    asked[read.source] = _lines(read, point, groups[0], count, line)
    return list(asked.values())


def _lines(read: TensorLoad, point: Mapping[Var, Expr], group: AxisGroup, count: int, elements: int) -> Stmt:
    """Return requests for `count` lines of so many elements each, along the only group of a row's axes."""
    return loop(count, lambda i: prefetch(substitute(read, {**point, **group.point(i * elements)})))


def _most_work(stages: Sequence[Stage]) -> Extent:
    """Return the work of the largest stage; of those of symbolic size the first, which has a row's elements, too."""
    amounts = [work_of(stage) for stage in stages]
    constant = [amount for amount in amounts if isinstance(amount, int)]
    return max(constant) if len(constant) == len(amounts) else next(a for a in amounts if not isinstance(a, int))


def _long_rows(stages: Sequence[Stage], leading: int) -> int:
    """Return how many leading dimensions to walk: rows that take less than finding them are walked together."""
    while leading > 1:
        extent = as_int(stages[0].output.shape[leading - 1])
        longest = max(_row_work(stage, leading) for stage in stages)
        if extent is None or longest > SHORT_ROW or extent * longest > LONGEST_ROW:
            break
        leading -= 1
    return leading


def _row_work(stage: Stage, leading: int) -> float:
    """Return the work of a stage for one row, infinite where it is symbolic."""
    walked = bind(stage.indices[:leading], stage.indices[:leading])
    work = product([axis.extent for axis in stage.axes if axis.variable not in walked])
    return work if isinstance(work, int) else float("inf")


def _rows_per_task(count: Extent, target: Target) -> int:
    """Return how many rows share one set of row buffers: allocating them costs as much as a short row's work."""
    if not isinstance(count, int):
        return SYMBOLIC_ROWS_PER_TASK
    return max(1, count // (TASKS_PER_CORE * target.cores))


@dataclass(frozen=True, eq=False)
class _RowBuffer:
    """The one-row stand-in of an intermediate buffer."""

    buffer: Var
    local: Var
    leading: int

    @staticmethod
    def of(buffer: Var, leading: int) -> _RowBuffer:
        shape = [_extent(extent) for extent in buffer.shape[leading:]] or [1]
        return _RowBuffer(buffer, local(shape, str(buffer.dtype), f"{buffer.name}_row"), leading)

    def at(self, indices: Sequence[Expr]) -> list[Expr]:
        return list(indices[self.leading :]) or [index(0)]


def _extent(expression: Expr) -> Extent:
    constant = as_int(expression)
    return expression if constant is None else constant


def shared_leading(stages: Sequence[Stage]) -> int:
    """Return how many leading output dimensions all stages share, each reading its own row of the others' outputs."""
    if not stages:
        return 0
    shape = stages[0].output.shape
    count = min(len(stage.output.shape) for stage in stages)
    for stage in stages[1:]:
        count = _common_prefix(shape, stage.output.shape, count)
    for stage in stages:
        for read in stage.loads():
            if any(read.source.same_as(other.output) for other in stages):
                count = _common_prefix(read.indices, stage.indices, count)
    return count


def _common_prefix(left: Sequence[Expr], right: Sequence[Expr], most: int) -> int:
    count = 0
    while count < most and tvm_ffi.structural_equal(left[count], right[count]):
        count += 1
    return count


def _in_one_walk(stages: Sequence[Stage], leading: int) -> list[tuple[Stage | None, Stage]]:
    """Return the stages, each reduction with the one before it where both can walk along the row together."""
    steps: list[tuple[Stage | None, Stage]] = []
    for stage in stages:
        before = steps[-1] if steps else None
        if before is not None and before[0] is None and _walks_with(before[1], stage, leading):
            steps[-1] = (before[1], stage)
        else:
            steps.append((None, stage))
    return steps


def _walks_with(first: Stage, stage: Stage, leading: int) -> bool:
    """Return whether a reduction along the row's only axis reads `first` at its own position alone."""
    if first.is_reduction or len(stage.reduction) != 1 or len(stage.output.shape) > leading:
        return False
    inner = first.indices[leading:]
    axis = stage.reduction[0]
    if len(inner) != 1 or not any(inner[0].same_as(own.variable) and _same(own, axis) for own in first.spatial):
        return False
    reads = [read for read in stage.loads() if read.source.same_as(first.output)]
    along = reducer_of(stage) is not None and walks_in_lanes(stage, group_axes(stage.reduction, [stage])[-1])
    return bool(reads) and along and all(read.indices[-1].same_as(axis.variable) for read in reads)


def _same(left: Axis, right: Axis) -> bool:
    """Return whether two axes have the same extent."""
    return same_extent(index(left.extent), right.extent)


def _step(
    stage: Stage,
    leading: int,
    rows: Sequence[_RowBuffer],
    position: Sequence[Expr],
    lanes: int,
    first: Stage | None = None,
) -> Stmt:
    """Return one stage's code for the row at `position`; `first` is one that is computed on the way."""
    point = bind(stage.indices[:leading], position)
    inner = [axis for axis in stage.spatial if axis.variable not in point]
    stage = _in_row(stage, rows)
    if not stage.is_reduction:
        return _map(stage, group_axes(inner, [stage]), point, lanes)
    if first is None:
        return _reduce(stage, inner, point, lanes)
    own = bind(first.indices[:leading], position)
    walked = first.indices[leading]
    row = _in_row(first, rows)

    def before(values: Mapping[Var, Expr]) -> Stmt:
        indices, value = row.at({**own, walked: values[stage.reduction[0].variable]})
        return store(row.output, value, indices)

    return _reduce(stage, inner, point, lanes, before)


def _in_row(stage: Stage, rows: Sequence[_RowBuffer]) -> Stage:
    """Return `stage` with private buffers replaced by their one-row stand-ins."""

    def stand_in(buffer: Var) -> _RowBuffer | None:
        return next((row for row in rows if row.buffer.same_as(buffer)), None)

    def rewrite(read: TensorLoad) -> Expr | None:
        row = stand_in(read.source)
        return None if row is None else load(row.local, row.at(read.indices))

    own = stand_in(stage.output)
    value = replace_loads(stage.value, rewrite)
    if own is None:
        return replace(stage, value=value)
    return replace(stage, output=own.local, indices=tuple(own.at(stage.indices)), value=value)


def _map(stage: Stage, groups: Sequence[AxisGroup], point: Mapping[Var, Expr], lanes: int) -> Stmt:
    def element(positions: Sequence[Expr]) -> Stmt:
        values = dict(point)
        for group, position in zip(groups, positions, strict=True):
            values.update(group.point(position))
        indices, value = stage.at(values)
        return store(stage.output, value, indices)

    if not groups:
        return element([])
    last = groups[-1]

    def row(outer: list[Expr]) -> Stmt:
        if branches_on(stage.value, last.inner):
            return loop(last.extent, lambda i: element([*outer, i]))
        return overlapping_vectors(last.extent, lanes, lambda i: element([*outer, i]))

    return nest([group.extent for group in groups[:-1]], row)


def _reduce(
    stage: Stage,
    inner: Sequence[Axis],
    point: Mapping[Var, Expr],
    lanes: int,
    before: Callable[[Mapping[Var, Expr]], Stmt] | None = None,
) -> Stmt:
    reduction = tuple(group_axes(stage.reduction, [stage]))
    reducer = reducer_of(stage)
    along = reduction[-1] if reducer is not None and walks_in_lanes(stage, reduction[-1]) else None
    columns = group_axes(inner, [stage])
    if along is None and reducer is not None and columns and walks_in_lanes(stage, columns[-1]):
        return _reduce_columns(stage, reduction, columns, point, lanes)

    def one(positions: Sequence[Expr]) -> Stmt:
        values = {**point, **{axis.variable: p for axis, p in zip(inner, positions, strict=True)}}
        indices, _ = stage.at(values)
        return reduce_element(
            stage, reduction, reducer, along, lanes, values, lambda total: store(stage.output, total, indices), before
        )

    return nest([axis.extent for axis in inner], one)


def _reduce_columns(
    stage: Stage,
    reduction: Sequence[AxisGroup],
    groups: Sequence[AxisGroup],
    point: Mapping[Var, Expr],
    lanes: int,
) -> Stmt:
    """Return code that reduces neighbouring elements of a row, of axes `groups`, side by side in lanes."""
    dtype, initial = accumulator_dtype(stage), stage.initial
    assert initial is not None
    *outer, columns = groups

    def tile(outside: Sequence[Expr], start: Expr, width: int) -> Stmt:
        totals = local([width], dtype, "totals")

        def each(element: Callable[[Expr, Mapping[Var, Expr]], Stmt]) -> Stmt:
            def at(v: Expr) -> Stmt:
                positions = zip(groups, [*outside, start + v], strict=True)
                own = [group.point(position) for group, position in positions]
                return element(v, {**point, **{axis: value for values in own for axis, value in values.items()}})

            return vector(width, at)

        def step_at(positions: list[Expr]) -> Stmt:
            reached = {axis: value for group, position in zip(reduction, positions, strict=True)
                       for axis, value in group.point(position).items()}  # fmt: skip
            return each(
                lambda v, values: store(totals, accumulate(stage, load(totals, [v]), {**values, **reached}), [v])
            )

        def finish(v: Expr, values: Mapping[Var, Expr]) -> Stmt:
            return store(stage.output, load(totals, [v]).astype(stage.output.dtype), stage.at(values)[0])

        start_at = each(lambda v, values: store(totals, substitute(initial, values).astype(dtype), [v]))
        steps = nest([group.extent for group in reduction], step_at)
        return with_local([totals], [start_at, steps, each(finish)])

    return nest(
        [group.extent for group in outer],
        lambda outside: overlapping_tiles(columns.extent, lanes, lambda start, width: tile(outside, start, width)),
    )
