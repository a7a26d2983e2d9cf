"""Cutting a function's stages into kernels, the parallel regions that run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from schedules import epilogue
from schedules.family import Kernel
from schedules.stages import OpaqueStage, Stage, StagedFunction, contains
from schedules.windows import sliding_read


def cut(staged: StagedFunction) -> list[Kernel | OpaqueStage]:
    """Return the kernels of `staged` in an order of execution, each reduction with what follows it fused."""
    return _with_producers(_cut(staged), staged)


def _cut(staged: StagedFunction) -> list[Kernel | OpaqueStage]:
    pending = list(staged.stages)
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
        kernels.extend(_between(pending[:position], staged))
        kernels.append(Kernel((stage, follower)))
        pending = pending[position + 1 :]
    return kernels


def _between(stages: Sequence[Stage | OpaqueStage], staged: StagedFunction) -> list[Kernel | OpaqueStage]:
    return _cut(StagedFunction(staged.function, tuple(stages), staged.intermediate)) if stages else []


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
    read = sliding_read(reduction)
    slides = read is not None and any(window.taps or window.stride > 1 for window in read.windows)
    return readers[0] if slides and read is not None and read.load.source.same_as(stage.output) else None


def _touches(kernel: Kernel | OpaqueStage, stage: Stage) -> bool:
    if isinstance(kernel, OpaqueStage):
        return touches(kernel, stage)
    return any(touches(other, stage) for other in kernel.stages)


def _follower(stage: Stage, later: Sequence[Stage | OpaqueStage], staged: StagedFunction) -> Stage | None:
    """Return the only reader of a reduction's result, where it can be computed along with it."""
    if not stage.is_reduction or not contains(staged.intermediate, stage.output):
        return None
    readers = [other for other in later if touches(other, stage)]
    if len(readers) != 1 or not isinstance(readers[0], Stage) or epilogue.match(stage, readers[0]) is None:
        return None
    return readers[0]


def touches(other: Stage | OpaqueStage, stage: Stage) -> bool:
    """Return whether `other` reads (or writes) what `stage` writes."""
    if isinstance(other, OpaqueStage):
        return contains(other.buffers, stage.output)
    return other.output.same_as(stage.output) or any(load.source.same_as(stage.output) for load in other.loads())
