"""Functions of rows in several steps: softmax, layer, group and RMS normalization, and what is fused around them.

All steps share leading axes. Each task runs every step for one row, with what the steps hand on kept in buffers of one
row, so that the row stays in the first-level cache from its first read to its last. What comes from further away is the
next row: it is asked for meanwhile, or its first step is done in the walk of one that computes much, such as the sum of
exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules import streaming
from schedules.access import as_int, same_extent
from schedules.family import Choice, Kernel, Parameters, Space, parallel_if_large, vector_width, work_of
from schedules.intrin.elementary_calls import calls_functions
from schedules.intrin.vector_math import NONPOSITIVE
from schedules.loops import (
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    product,
    store,
    tiles,
    unflatten,
    with_local,
)
from schedules.row_folds import RowBlock, folds_together
from schedules.row_steps import Row, RowBuffer, RowCode, RowStep, in_row, is_along_row
from schedules.rows_ahead import lines_ahead, lines_to_write
from schedules.softmax import simplified
from schedules.stages import Axis, Stage, as_extent, bind, sequence
from targets.base import Target

TASKS_PER_CORE = 4
SYMBOLIC_ROWS_PER_TASK = 4
# The work of a row that takes as long as the division that finds its place, and what a row may grow to.
SHORT_ROW = 64
LONGEST_ROW = 8192
# The rows whose steps take turns, so that one computes while another waits for the last lanes of its sums.
ROWS_TOGETHER = 2
# The rows of a task from which on one more first step, that of its last row's next, does not count.
FEWEST_ROWS = 8


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
        stages, private = simplified(kernel.stages, kernel.private)
        return RowwiseAnalysis(stages, _long_rows(stages, leading), private)

    def space(self, target: Target, analysis: RowwiseAnalysis) -> Space:
        """Return how many registers one vector statement spans."""
        return (Choice("vectors", _default_vectors(analysis, target), (1, 2, 4)),)

    def apply(self, analysis: RowwiseAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the parallel loop over rows."""
        if folds_together(analysis.stages, analysis.leading, analysis.private, target):
            return _in_blocks(analysis, target)
        return all_rows(analysis, parameters["vectors"], target, _most_work(analysis.stages))


def _default_vectors(analysis: RowwiseAnalysis, target: Target) -> int:
    """Return two registers, or one where a softmax's exponentials leave none for a second among few.

    The walk of exponentials takes the maximum of the next row along, and LLVM keeps its constants on the stack for two
    registers of AVX2: rows of 197 took 526 us and take 464, of 1024 888 and 805 (a Zen 3's thread). Beyond the caches
    statements of whole lines count for more.
    """
    softmax = any(calls_functions(stage.value, {NONPOSITIVE}) for stage in analysis.stages)
    return 1 if target.has_few_registers and softmax and not _exceeds_caches(analysis) else 2


def row_extents(analysis: RowwiseAnalysis) -> list[Extent]:
    """Return the extents of the leading axes, whose product is the number of rows."""
    return [as_extent(extent) for extent in analysis.stages[0].output.shape[: analysis.leading]]


def all_rows(analysis: RowwiseAnalysis, vectors: int, target: Target, work: Extent) -> Stmt:
    """Return the loop over all rows, parallel where `work` is large."""
    count = product(row_extents(analysis))
    return in_tasks(count, work, target, lambda start, rows: consecutive_rows(analysis, start, rows, vectors, target))


def _in_blocks(analysis: RowwiseAnalysis, target: Target) -> Stmt:
    """Return the loop over blocks of rows whose sums are folded together; the last one begins in the one before it."""
    extents = row_extents(analysis)
    rows, lanes = product(extents), target.vector_lanes(32)
    assert isinstance(rows, int)
    steps = tuple(_in_one_walk(analysis.stages, analysis.leading))
    width = next(int(stage.reduction[0].extent) for stage in analysis.stages if stage.is_reduction)
    block = RowBlock(steps, analysis.private, tuple(extents), width, lanes, target)

    def code(number: Expr) -> Stmt:
        return block.code(tirx.min(number * lanes, index(rows - lanes)))

    def task(start: Expr, count: Extent) -> Stmt:
        return loop(count, lambda i: code(start + i))

    return in_tasks(-(-rows // lanes), _most_work(analysis.stages), target, task)


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
    lanes = max(vector_width(target, stage) for stage in analysis.stages) * vectors
    leading, steps = analysis.leading, _in_one_walk(analysis.stages, analysis.leading)
    count = product(extents)
    rows = extent if isinstance(extent, int) else _rows_per_task(count, target)
    if isinstance(count, int) and rows >= FEWEST_ROWS and _shares_walks(steps, leading):
        return _first_steps_early(analysis, steps, RowCode(leading, lanes), start, extent, target)
    together = ROWS_TOGETHER if rows >= ROWS_TOGETHER and _waits_for_folds(analysis, target) else 1
    own = [[RowBuffer.of(buffer, leading) for buffer in analysis.private] for _ in range(together)]
    code = RowCode(leading, lanes, together)
    walks = [number for number, (_, stage) in enumerate(steps) if number and _walks_along_row(stage, leading)]

    def side_by_side(first: Expr, size: int) -> Stmt:
        at = [Row(unflatten(first + row, extents), own[row]) for row in range(size)]
        following = [unflatten(first + row, extents) for row in range(size, 2 * size)]
        ahead = lines_ahead(analysis.stages, leading, following, target)
        return sequence(
            [
                code.step(stage, at, before, ahead=ahead if number in walks[:1] else None)
                for number, (before, stage) in enumerate(steps)
            ]
        )

    sizes = [together, 1] if together > 1 else [1]
    groups = tiles(extent, sizes, lambda offset, size: side_by_side(start + offset, size))
    return with_local([each.local for row in own for each in row], [groups])


def _first_steps_early(
    analysis: RowwiseAnalysis,
    steps: Sequence[RowStep],
    code: RowCode,
    start: Expr,
    extent: Extent,
    target: Target,
) -> Stmt:
    """Return code for rows of which each takes the first step of the next along, in the walk of its second one.

    The first step waits for memory, and its end for its own last lanes; the second one computes meanwhile, and the
    lines that the row's last step writes are asked for. After the last row of all its first step is done again.
    """
    (_, first), second, *others = steps
    extents, private = row_extents(analysis), analysis.private
    buffers = [RowBuffer.of(buffer, code.leading) for buffer in private]
    last = index(product(extents)) - 1
    result = in_row(first, buffers).output
    coming = local([1], str(result.dtype), "coming")

    def row(number: Expr) -> Stmt:
        own, following = (Row(unflatten(each, extents), buffers) for each in (number, tirx.min(number + 1, last)))
        beside = code.beside(first, following, lambda total: store(coming, total, [index(0)]))
        results = lines_to_write(analysis.stages, private, code.leading, own.position, target)
        walk = code.step(second[1], [own], second[0], beside, results)
        rest = [code.step(stage, [own], before) for before, stage in others]
        return sequence([walk, *rest, store(result, load(coming, [index(0)]), [index(0)])])

    opening = code.step(first, [Row(unflatten(start, extents), buffers)])
    own = [*(each.local for each in buffers), coming]
    return with_local(own, [opening, loop(extent, lambda i: row(start + i))])


def _most_work(stages: Sequence[Stage]) -> Extent:
    """Return the work of the largest stage; of those of symbolic size the first, which has a row's elements, too."""
    amounts = [work_of(stage) for stage in stages]
    constant = [amount for amount in amounts if isinstance(amount, int)]
    return max(constant) if len(constant) == len(amounts) else next(a for a in amounts if not isinstance(a, int))


def _waits_for_folds(analysis: RowwiseAnalysis, target: Target) -> bool:
    """Return whether steps wait for the last lanes of a sum along the row, and the caches have room for several rows.

    Arrays beyond the last cache are waited for in any case, and come faster one row after the other.
    """
    stages, leading = analysis.stages, analysis.leading
    if not any(is_along_row(stage, leading) for stage in stages):
        return False
    # As much again is written, or kept between steps.
    return not _exceeds_caches(analysis) and ROWS_TOGETHER * _row_bytes(analysis) <= target.caches.level1 // 2


def _row_bytes(analysis: RowwiseAnalysis) -> float:
    """Return the bytes of the longest row that a stage walks, infinite where it is symbolic."""
    widest = max(read.source.dtype.bits // 8 for stage in analysis.stages for read in stage.loads())
    return max(_row_work(stage, analysis.leading) for stage in analysis.stages) * widest


def _exceeds_caches(analysis: RowwiseAnalysis) -> bool:
    """Return whether all rows, if it is known how many there are, are more than the last cache holds."""
    rows = product(row_extents(analysis))
    return isinstance(rows, int) and rows * _row_bytes(analysis) >= streaming.LAST_CACHE_BYTES


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


def _in_one_walk(stages: Sequence[Stage], leading: int) -> list[RowStep]:
    """Return the stages, each reduction with the one before it where both can walk along the row together."""
    steps: list[RowStep] = []
    for stage in stages:
        before = steps[-1] if steps else None
        if before is not None and before[0] is None and _walks_with(before[1], stage, leading):
            steps[-1] = (before[1], stage)
        else:
            steps.append((None, stage))
    return steps


def _walks_with(first: Stage, stage: Stage, leading: int) -> bool:
    """Return whether a reduction along the row's only axis reads `first` at its own position alone."""
    if first.is_reduction or not is_along_row(stage, leading):
        return False
    inner = first.indices[leading:]
    axis = stage.reduction[0]
    if len(inner) != 1 or not any(inner[0].same_as(own.variable) and _same(own, axis) for own in first.spatial):
        return False
    reads = [read for read in stage.loads() if read.source.same_as(first.output)]
    return bool(reads) and all(read.indices[-1].same_as(axis.variable) for read in reads)


def _shares_walks(steps: Sequence[RowStep], leading: int) -> bool:
    """Return whether the second step can take the next row's first one along: both reduce, and it computes enough."""
    if len(steps) < 2:
        return False
    (before, first), (computed, second) = steps[:2]
    if before is not None or computed is None or not is_along_row(first, leading):
        return False
    return _same(first.reduction[0], second.reduction[0])


def _walks_along_row(stage: Stage, leading: int) -> bool:
    """Return whether a stage goes through all positions of a row."""
    return is_along_row(stage, leading) or (not stage.is_reduction and len(stage.output.shape) > leading)


def _same(left: Axis, right: Axis) -> bool:
    """Return whether two axes have the same extent."""
    return same_extent(index(left.extent), right.extent)
