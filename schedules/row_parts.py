"""Functions that are a product and functions of rows around it: the normalization before it, the one after it.

What rounds each element of the product's rows may stand before it as well.

Each part is a kernel of its own in the eyes of its family. The parts hand on whole matrices: what one stores, the next
reads row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tvm.ir import Var

from schedules.family import Kernel
from schedules.inline import inline
from schedules.kernels import cut, reuses_operands
from schedules.rounded_rows import is_rounding, only_rounds
from schedules.rowwise import shared_leading
from schedules.stages import OpaqueStage, Stage, StagedFunction, contains


@dataclass(frozen=True, eq=False)
class PartedKernel(Kernel):
    """A product, at position `product` of `parts`, and functions of rows before or after it, in order of execution."""

    parts: tuple[Kernel, ...] = ()
    product: int = 0


@functools.lru_cache(maxsize=1024)
def whole(staged: StagedFunction) -> PartedKernel | None:
    """Return a function of one product and functions of rows, or what rounds its rows, as one kernel; None otherwise.

    What follows the product one to one is of its part, where it is computed in registers.
    """
    stages = [stage for stage in staged.stages if isinstance(stage, Stage)]
    products = [position for position, stage in enumerate(stages) if is_product(stage)]
    others = [stage for stage in stages if is_rounding(stage) or (stage.is_reduction and not is_product(stage))]
    if len(stages) != len(staged.stages) or len(products) != 1 or not others:
        return None
    for first in range(products[0], -1, -1):
        for last in range(len(stages), products[0], -1):
            parts = _parts(staged, stages, first, last)
            if parts is not None and len(parts) > 1:
                return _parted(parts, 1 if first else 0)
    return None


def before_product(staged: StagedFunction, stages: Sequence[Stage]) -> PartedKernel | None:
    """Return the first stages of a function, which another product follows: a product, or one of rows before it."""
    position = next(number for number, stage in enumerate(stages) if is_product(stage))
    for first in range(position, -1, -1):
        parts = _parts(staged, stages, first, len(stages))
        if parts is not None:
            return _parted(parts, 1 if first else 0)
    return None


def behind_product(staged: StagedFunction, stages: Sequence[Stage]) -> PartedKernel | None:
    """Return the last stages of a function, behind another product: a product, or one and a function of its rows."""
    for last in range(len(stages), 0, -1):
        parts = _parts(staged, stages, 0, last)
        if parts is not None:
            return _parted(parts, 0)
    return None


def _parted(parts: Sequence[Kernel], product: int) -> PartedKernel:
    every = tuple(stage for part in parts for stage in part.stages)
    private = tuple(buffer for part in parts for buffer in part.private)
    return PartedKernel(every, private, parts=tuple(parts), product=product)


@functools.lru_cache(maxsize=1024)
def kind(staged: StagedFunction) -> Literal["product", "rows"] | None:
    """Return whether a function is a product (with what follows it one to one), or one of rows; None if neither."""
    stages = [stage for stage in staged.stages if isinstance(stage, Stage)]
    kernel = kernel_of(staged, stages) if len(stages) == len(staged.stages) else None
    if kernel is None:
        return None
    return "product" if is_product(kernel.stages[0]) else "rows" if _is_of_rows(kernel) else None


def _parts(staged: StagedFunction, stages: Sequence[Stage], first: int, last: int) -> list[Kernel] | None:
    """Return the rows before stage `first`, the product from there to `last`, and the rows after it; None where not."""
    pieces = [stages[:first], stages[first:last], stages[last:]]
    if pieces[2] and not any(stage.is_reduction for stage in pieces[2]):
        return None  # as functions of rows are, which is told without computing anything where it is read
    parts: list[Kernel] = []
    for number, piece in enumerate(pieces):
        if not piece:
            continue
        kernel = kernel_of(staged, piece)
        if kernel is None or not _is_part(kernel, number):
            return None
        parts.append(kernel)
    return parts


def _is_part(kernel: Kernel, number: int) -> bool:
    """Return whether a kernel may stand at a position: before the product, 0, its own, or behind it."""
    if number == 1:
        return is_product(kernel.stages[0])
    return _is_of_rows(kernel) or (number == 0 and only_rounds(kernel.stages))


def kernel_of(staged: StagedFunction, piece: Sequence[Stage]) -> Kernel | None:
    """Return some stages of a function as one kernel."""
    outside = [stage for stage in staged.stages if not any(stage is own for own in piece)]
    hidden = tuple(buffer for buffer in staged.intermediate if not _occurs(buffer, outside))
    kernels = cut(inline(replace(staged, stages=tuple(piece), intermediate=hidden)))
    kernel = kernels[0] if len(kernels) == 1 else None
    return None if isinstance(kernel, OpaqueStage) else kernel


def _occurs(buffer: Var, stages: Sequence[Stage | OpaqueStage]) -> bool:
    return any(
        contains(stage.buffers, buffer)
        if isinstance(stage, OpaqueStage)
        else stage.output.same_as(buffer) or any(load.source.same_as(buffer) for load in stage.loads())
        for stage in stages
    )


def is_product(stage: Stage) -> bool:
    """Return whether a stage sums products that reuse their operands."""
    return stage.is_reduction and reuses_operands(stage)


def _is_of_rows(kernel: Kernel) -> bool:
    return bool(kernel.private) and shared_leading(kernel.stages) > 0 and any(s.is_reduction for s in kernel.stages)
