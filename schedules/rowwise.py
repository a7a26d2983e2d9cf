"""Functions of rows in several steps: softmax, layer, group and RMS normalization, and what is fused around them.

All steps share leading axes. Each task runs every step for one row, with what the steps hand on kept in buffers of one
row, so that the row stays in the first-level cache from its first read to its last. What comes from further away is the
next row: it is asked for meanwhile, or its first step is done in the walk of one that computes much, such as the sum of
exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, as_int, branches_on, group_axes, same_extent
from schedules.elementwise import overlapping_vectors
from schedules.family import Choice, Kernel, Parameters, Space, parallel_if_large, vector_width, work_of
from schedules.loops import (
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    nest,
    product,
    store,
    unflatten,
    with_local,
)
from schedules.matmul import walks_in_lanes
from schedules.reducer import Beside, reducer_of
from schedules.reduction import reduce_columns, reduce_element
from schedules.rows_ahead import lines_ahead
from schedules.softmax import simplified
from schedules.stages import Axis, Stage, as_extent, bind, replace_loads, sequence
from targets.base import Target

TASKS_PER_CORE = 4
SYMBOLIC_ROWS_PER_TASK = 4
# The work of a row that takes as long as the division that finds its place, and what a row may grow to.
SHORT_ROW = 64
LONGEST_ROW = 8192
# The rows of a task from which on one more first step, that of its last row's next, does not count.
FEWEST_ROWS = 8


@dataclass(frozen=True, eq=False)
class RowwiseAnalysis:
    """Stages with `leading` output dimensions in common; `private` are the buffers that only they use."""

    stages: tuple[Stage, ...]
    leading: int
    private: tuple[Var, ...]


# A stage of a row, and one that is computed in its walk.
_RowStep = tuple[Stage | None, Stage]


class Rowwise:
    """Rows in parallel, every step of a row in one task, vectors along the row."""

    name = "rowwise"
    version = 2

    def takes(self, kernel: Kernel, target: Target) -> RowwiseAnalysis | None:
        """Return the analysis of a kernel of several stages with leading axes in common."""
        leading = shared_leading(kernel.stages)
        if not kernel.private or not leading or not any(stage.is_reduction for stage in kernel.stages):
            return None
        stages, private = simplified(kernel.stages, kernel.private)
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
    leading, steps = analysis.leading, _in_one_walk(analysis.stages, analysis.leading)
    count = product(extents)
    rows = extent if isinstance(extent, int) else _rows_per_task(count, target)
    if isinstance(count, int) and rows >= FEWEST_ROWS and _shares_walks(steps, leading):
        return _first_steps_early(steps, leading, buffers, start, extent, extents, lanes)

    def row(number: Expr) -> Stmt:
        position = unflatten(number, extents)
        first, *others = [_step(stage, leading, buffers, position, lanes, before) for before, stage in steps]
        asked = lines_ahead(analysis.stages, leading, unflatten(number + 1, extents), target)
        return sequence([first, *asked, *others])

    return with_local([each.local for each in buffers], [loop(extent, lambda i: row(start + i))])


def _first_steps_early(
    steps: Sequence[_RowStep],
    leading: int,
    buffers: Sequence[_RowBuffer],
    start: Expr,
    extent: Extent,
    extents: Sequence[Extent],
    lanes: int,
) -> Stmt:
    """Return code for rows of which each takes the first step of the next along, in the walk of its second one.

    The first step waits for memory, and its end for its own last lanes; the second one computes meanwhile. After the
    last row of all its first step is done again.
    """
    (_, first), second, *others = steps
    last = index(product(extents)) - 1
    result = _in_row(first, buffers).output
    coming = local([1], str(result.dtype), "coming")

    def row(number: Expr) -> Stmt:
        position, following = (unflatten(each, extents) for each in (number, tirx.min(number + 1, last)))
        beside = _beside(first, leading, buffers, following, coming)
        walk = _step(second[1], leading, buffers, position, lanes, second[0], beside)
        rest = [_step(stage, leading, buffers, position, lanes, before) for before, stage in others]
        return sequence([walk, *rest, store(result, load(coming, [index(0)]), [index(0)])])

    opening = _step(first, leading, buffers, unflatten(start, extents), lanes)
    own = [*(each.local for each in buffers), coming]
    return with_local(own, [opening, loop(extent, lambda i: row(start + i))])


def _beside(stage: Stage, leading: int, buffers: Sequence[_RowBuffer], position: Sequence[Expr], result: Var) -> Beside:
    """Return a reduction along the row at `position`, to be done in the walk of another one, and stored to `result`."""
    point = bind(stage.indices[:leading], position)
    row, axis = _in_row(stage, buffers), stage.reduction[0].variable
    reducer = reducer_of(row)
    assert reducer is not None
    return Beside(row, reducer, lambda i: {**point, axis: i}, lambda total: store(result, total, [index(0)]))


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


def _in_one_walk(stages: Sequence[Stage], leading: int) -> list[_RowStep]:
    """Return the stages, each reduction with the one before it where both can walk along the row together."""
    steps: list[_RowStep] = []
    for stage in stages:
        before = steps[-1] if steps else None
        if before is not None and before[0] is None and _walks_with(before[1], stage, leading):
            steps[-1] = (before[1], stage)
        else:
            steps.append((None, stage))
    return steps


def _walks_with(first: Stage, stage: Stage, leading: int) -> bool:
    """Return whether a reduction along the row's only axis reads `first` at its own position alone."""
    if first.is_reduction or not _is_along_row(stage, leading):
        return False
    inner = first.indices[leading:]
    axis = stage.reduction[0]
    if len(inner) != 1 or not any(inner[0].same_as(own.variable) and _same(own, axis) for own in first.spatial):
        return False
    reads = [read for read in stage.loads() if read.source.same_as(first.output)]
    return bool(reads) and all(read.indices[-1].same_as(axis.variable) for read in reads)


def _is_along_row(stage: Stage, leading: int) -> bool:
    """Return whether a stage reduces a row's only axis to one element, in lanes."""
    if len(stage.reduction) != 1 or len(stage.output.shape) > leading or reducer_of(stage) is None:
        return False
    return walks_in_lanes(stage, group_axes(stage.reduction, [stage])[-1])


def _shares_walks(steps: Sequence[_RowStep], leading: int) -> bool:
    """Return whether the second step can take the next row's first one along: both reduce, and it computes enough."""
    if len(steps) < 2:
        return False
    (before, first), (computed, second) = steps[:2]
    if before is not None or computed is None or not _is_along_row(first, leading):
        return False
    return _same(first.reduction[0], second.reduction[0])


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
    beside: Beside | None = None,
) -> Stmt:
    """Return one stage's code for the row at `position`; `first` and `beside` are computed on the way."""
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

    return _reduce(stage, inner, point, lanes, before, beside)


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
    beside: Beside | None = None,
) -> Stmt:
    reduction = tuple(group_axes(stage.reduction, [stage]))
    reducer = reducer_of(stage)
    along = reduction[-1] if reducer is not None and walks_in_lanes(stage, reduction[-1]) else None
    columns = group_axes(inner, [stage])
    if along is None and reducer is not None and columns and walks_in_lanes(stage, columns[-1]):
        return reduce_columns(stage, reduction, columns, point, lanes)

    def one(positions: Sequence[Expr]) -> Stmt:
        values = {**point, **{axis.variable: p for axis, p in zip(inner, positions, strict=True)}}
        indices, _ = stage.at(values)

        def finish(total: Expr) -> Stmt:
            return store(stage.output, total, indices)

        return reduce_element(stage, reduction, reducer, along, lanes, values, finish, before, beside)

    return nest([axis.extent for axis in inner], one)
