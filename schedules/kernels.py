"""Cutting a function's stages into kernels, the parallel regions that run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tvm.ir import TensorLoad, Var

from schedules import epilogue
from schedules.access import as_int, occurs
from schedules.channel_windows import channel_windows
from schedules.family import Kernel, work_of
from schedules.loops import product
from schedules.rowwise import shared_leading
from schedules.stages import Axis, OpaqueStage, Stage, StagedFunction, contains
from schedules.windows import SlidingRead, sliding_read

# With fewer rows than this, rows of this many elements are better cut than kept in one task.
FEW_ROWS = 8
LONG_ROW = 64 * 1024


@lru_cache(maxsize=1024)
def cut(staged: StagedFunction) -> tuple[Kernel | OpaqueStage, ...]:
    """Return the kernels of `staged` in an order of execution, the same ones each time.

    Consecutive stages over the same rows become one kernel, and of the others each reduction one with what follows it.
    """
    kernels: list[Kernel | OpaqueStage] = []
    loose: list[Stage | OpaqueStage] = []
    for run in row_runs(staged):
        stages = tuple(stage for stage in run if isinstance(stage, Stage))
        private = _private(stages, staged)
        if len(run) == 1 or not private:
            loose.extend(run)
            continue
        kernels.extend(_cut(loose, staged))
        loose = []
        kernels.append(Kernel(stages, private))
    return tuple(_with_producers([*kernels, *_cut(loose, staged)], staged))


def row_runs(staged: StagedFunction) -> list[list[Stage | OpaqueStage]]:
    """Return the stages in order, those that make up one function of rows together in one list."""
    runs: list[list[Stage | OpaqueStage]] = []
    position = 0
    while position < len(staged.stages):
        end = position + 1
        for last in range(position + 2, len(staged.stages) + 1):
            if not _is_row_run(staged.stages[position:last]):
                break
            end = last
        run = list(staged.stages[position:end])
        if sum(isinstance(stage, Stage) and stage.is_reduction for stage in run) == 0 or (
            len(run) == 2 and _is_reduction_with_epilogue(*run)
        ):
            run, end = run[:1], position + 1
        runs.append(run)
        position = end
    return runs


def _is_reduction_with_epilogue(first: Stage | OpaqueStage, second: Stage | OpaqueStage) -> bool:
    if not isinstance(first, Stage) or not isinstance(second, Stage) or not first.is_reduction:
        return False
    return epilogue.match(first, second) is not None


def _is_row_run(stages: Sequence[Stage | OpaqueStage]) -> bool:
    """Return whether the stages share leading axes that make enough rows, and the last reads one of the others."""
    run = [stage for stage in stages if isinstance(stage, Stage)]
    if len(run) != len(stages) or any(stage.is_reduction and reuses_operands(stage) for stage in run):
        return False
    leading = shared_leading(run)
    if not leading or not any(touches(run[-1], other) for other in run[:-1]):
        return False
    rows = product([as_int(extent) or extent for extent in run[0].output.shape[:leading]])
    work = work_of(run[0])
    return not isinstance(rows, int) or not isinstance(work, int) or rows >= FEW_ROWS or work < LONG_ROW


@lru_cache(maxsize=256)  # each form that a function may have asks it of the same stages
def reuses_operands(stage: Stage) -> bool:
    """Return whether the reduction contracts several operands (matmul) or slides over one (convolution, pooling)."""
    if not is_of_matrices(stage):
        return True
    moving = [load for load in stage.loads() if any(occurs_in(load, axis) for axis in stage.reduction)]
    sets = {tuple(occurs_in(load, axis) for axis in stage.spatial) for load in moving}
    return len(sets) > 1


@lru_cache(maxsize=1024)
def is_of_matrices(stage: Stage) -> bool:
    """Return whether a reduction is no convolution or pooling: one whose operands are read without windows."""
    return sliding(stage) is None and channel_windows(None, stage, epilogue.plain(stage)) is None


def occurs_in(load: TensorLoad, axis: Axis) -> bool:
    """Return whether `axis` occurs in the indices of `load`."""
    return any(occurs(position, axis.variable) for position in load.indices)


def sliding(stage: Stage) -> SlidingRead | None:
    """Return the sliding read of a convolution or pooling."""
    read = sliding_read(stage)
    if read is None or not any(window.taps or window.stride > 1 for window in read.windows):
        return None
    return read


def _private(stages: Sequence[Stage], staged: StagedFunction) -> tuple[Var, ...]:
    outside = [other for other in staged.stages if other not in stages]
    return tuple(
        stage.output
        for stage in stages
        if contains(staged.intermediate, stage.output) and not any(touches(other, stage) for other in outside)
    )


def _cut(stages: Sequence[Stage | OpaqueStage], staged: StagedFunction) -> list[Kernel | OpaqueStage]:
    """Return `stages` of `staged` as kernels, each reduction with what follows it one to one."""
    pending = list(stages)
    kernels: list[Kernel | OpaqueStage] = []
    while pending:
        stage = pending.pop(0)
        if isinstance(stage, OpaqueStage):
            kernels.append(stage)
            continue
        follower = _follower(stage, pending, staged)
        if follower is None:
            kernels.append(Kernel((stage,)))
            continue
        # The reduction moves down to what follows it; nothing between them reads its result.
        position = pending.index(follower)
        pending[position] = follower
        kernels.extend(_cut(pending[:position], staged))
        kernels.append(Kernel((stage, follower)))
        pending = pending[position + 1 :]
    return kernels


def _with_producers(kernels: list[Kernel | OpaqueStage], staged: StagedFunction) -> list[Kernel | OpaqueStage]:
    """Return `kernels` with stages that only compute the input of one sliding reduction moved into its kernel."""
    result: list[Kernel | OpaqueStage] = []
    for position, kernel in enumerate(kernels):
        reader = _sliding_reader(kernel, kernels[position + 1 :], staged)
        if reader is None:
            result.append(kernel)
            continue
        assert isinstance(kernel, Kernel)
        kernels[kernels.index(reader)] = Kernel(kernel.stages + reader.stages)
    return result


def _sliding_reader(
    kernel: Kernel | OpaqueStage, later: Sequence[Kernel | OpaqueStage], staged: StagedFunction
) -> Kernel | None:
    if isinstance(kernel, OpaqueStage) or len(kernel.stages) != 1 or kernel.stages[0].is_reduction:
        return None
    stage = kernel.stages[0]
    if not contains(staged.intermediate, stage.output):
        return None
    readers = [other for other in later if _touches(other, stage)]
    if len(readers) != 1 or isinstance(readers[0], OpaqueStage) or not readers[0].stages[0].is_reduction:
        return None
    reduction, *follows = readers[0].stages
    if any(touches(other, stage) for other in follows):
        return None
    read = sliding(reduction)
    if read is not None:
        return readers[0] if read.load.source.same_as(stage.output) else None
    return readers[0] if channel_windows(stage, reduction, epilogue.plain(reduction)) is not None else None


def _touches(kernel: Kernel | OpaqueStage, stage: Stage) -> bool:
    if isinstance(kernel, OpaqueStage):
        return touches(kernel, stage)
    return any(touches(other, stage) for other in kernel.stages)


def _follower(stage: Stage, later: Sequence[Stage | OpaqueStage], staged: StagedFunction) -> Stage | None:
    """Return the only reader of a reduction's result, where it can be computed along with it."""
    if not stage.is_reduction or not contains(staged.intermediate, stage.output):
        return None
    readers = [other for other in staged.stages if other is not stage and touches(other, stage)]
    if len(readers) != 1 or readers[0] not in later or not isinstance(readers[0], Stage):
        return None
    if epilogue.match(stage, readers[0]) is None:
        return None
    return readers[0]


def touches(other: Stage | OpaqueStage, stage: Stage) -> bool:
    """Return whether `other` reads (or writes) what `stage` writes."""
    if isinstance(other, OpaqueStage):
        return contains(other.buffers, stage.output)
    return other.output.same_as(stage.output) or any(load.source.same_as(stage.output) for load in other.loads())
