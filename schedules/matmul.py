"""Matrix products: batched, with either operand transposed, pointwise convolutions, with what follows fused in.

The lanes run along the output's contiguous axis (N), a register tile covers several rows (M). The operand that varies
along N is read in place, or copied to a [K][width] panel per task where enough rows reuse it; a transposed one with few
rows is reduced along K in lanes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.ir import TensorLoad
from tvm.tirx.stmt import Stmt

from schedules import epilogue, tiling
from schedules.access import Access, AxisGroup, Step, branches_on, group_axes
from schedules.epilogue import Epilogue
from schedules.family import Choice, Kernel, Parameters, Space, is_large, vector_width, work_of
from schedules.stages import Stage
from targets.base import Target

# Rows that must reuse a panel before copying it pays: a straight copy costs a few cycles per K and vector, a
# transposing one some dozens, and one row of the tile half a cycle per vector.
ROWS_TO_COPY = 32
ROWS_TO_TRANSPOSE = 48


@dataclass(frozen=True, eq=False)
class MatmulAnalysis:
    """The axes of a contraction: `columns` in lanes, `rows` in registers, and the operand read along the columns."""

    stage: Stage
    epilogue: Epilogue
    outer: tuple[AxisGroup, ...]
    rows: AxisGroup | None
    columns: AxisGroup
    reduction: tuple[AxisGroup, ...]
    operand: TensorLoad
    transposed: bool


class Matmul:
    """Register-tiled contraction of two operands."""

    name = "matmul"

    def takes(self, kernel: Kernel, target: Target) -> MatmulAnalysis | None:
        """Return the analysis of a reduction in which each operand lacks an axis that the other has."""
        stage, follows = split_epilogue(kernel)
        if stage is None or follows is None or branches_on_any(stage):
            return None
        groups = group_axes(stage.spatial, [stage, follows_as_stage(follows)])
        reduction = group_axes(stage.reduction, [stage])
        if not groups:
            return None
        columns = groups[-1]
        varying = [load for load in stage.loads() if step(load, columns) != Step.NONE]
        if len(varying) != 1 or not all(depends(varying[0], group) for group in reduction):
            return None
        operand = varying[0]
        rows = row_group(groups[:-1], stage, operand)
        if rows is None and not any(not load.same_as(operand) and reduces(load, reduction) for load in stage.loads()):
            return None
        along = step(operand, columns)
        if along == Step.IRREGULAR:
            return None
        outer = tuple(group for group in groups[:-1] if group is not rows)
        return MatmulAnalysis(stage, follows, outer, rows, columns, tuple(reduction), operand, along == Step.STRIDED)

    def space(self, target: Target, analysis: MatmulAnalysis) -> Space:
        """Return the register tile and whether the column operand is copied to panels."""
        rows, vectors = register_tile(target)
        extent = analysis.rows.extent if analysis.rows is not None else 1
        enough = ROWS_TO_TRANSPOSE if analysis.transposed else ROWS_TO_COPY
        copy = int(analysis.rows is not None and (not isinstance(extent, int) or extent >= enough))
        return (
            Choice("rows", rows, (4, 6, 8, 12, 14)),
            Choice("vectors", vectors, (1, 2, 3, 4)),
            Choice("row_block", 64, (16, 32, 64, 128, 256)),
            Choice("panel", copy, (0, 1)),
        )

    def apply(self, analysis: MatmulAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        lanes = vector_width(target, analysis.stage)
        rows = parameters["rows"]
        panel = analysis.operand if parameters["panel"] else None
        extent = analysis.rows.extent if analysis.rows is not None else 1
        block = max(rows, parameters["row_block"] // rows * rows)
        if isinstance(extent, int):
            block = min(block, -(-extent // rows) * rows)
        width = lanes * parameters["vectors"]
        if isinstance(extent, int) and extent < rows:
            width = lanes * max(parameters["vectors"], min(8, rows * parameters["vectors"] // max(1, extent)))
        columns = analysis.columns.extent
        if isinstance(columns, int):
            width = min(width, -(-columns // lanes) * lanes)
        return tiling.emit(
            tiling.Tile(
                stage=analysis.stage,
                epilogue=analysis.epilogue,
                outer=analysis.outer,
                vector_group=analysis.columns,
                row_group=analysis.rows,
                reduction=analysis.reduction,
                width=width,
                lanes=lanes,
                rows=rows,
                row_block=block,
                panel=panel,
                parallel=is_large(work_of(analysis.stage)),
            )
        )


def register_tile(target: Target) -> tuple[int, int]:
    """Return rows and vectors of accumulators that fit the registers beside the operands' (and hide FMA latency)."""
    if target.architecture == "x86_64" and target.vector_bits < 512:
        return 6, 2  # 12 of 16 registers
    return 8, 2  # 16 of 32 registers


def split_epilogue(kernel: Kernel) -> tuple[Stage | None, Epilogue | None]:
    """Return the reduction of a kernel of one reduction and what follows it."""
    if not kernel.stages or not kernel.stages[0].is_reduction or len(kernel.stages) > 2:
        return None, None
    stage = kernel.stages[0]
    if len(kernel.stages) == 1:
        return stage, epilogue.plain(stage)
    return stage, epilogue.match(stage, kernel.stages[1])


def follows_as_stage(follows: Epilogue) -> Stage:
    """Return the epilogue as a stage over the reduction's axes, for its accesses."""
    return Stage(follows.stage.output, follows.indices, follows.source.spatial, (), None, follows.value)


def step(load: TensorLoad, group: AxisGroup) -> Step:
    """Return how `load` moves along the fastest axis of `group`."""
    return Access(load.source, tuple(load.indices)).step(group.inner)


def depends(load: TensorLoad, group: AxisGroup) -> bool:
    """Return whether `load` reads another element as `group` advances."""
    return step(load, group) != Step.NONE


def reduces(load: TensorLoad, reduction: Sequence[AxisGroup]) -> bool:
    """Return whether `load` depends on a reduction axis."""
    return any(depends(load, group) for group in reduction)


def row_group(groups: Sequence[AxisGroup], stage: Stage, operand: TensorLoad) -> AxisGroup | None:
    """Return the longest group along which the other operand moves and the column operand does not."""
    others = [load for load in stage.loads() if not load.same_as(operand)]
    rows = [group for group in groups if not depends(operand, group) and any(depends(load, group) for load in others)]
    if not rows:
        return None
    symbolic = [group for group in rows if not group.static]
    return symbolic[-1] if symbolic else max(rows, key=lambda group: int(group.extent))


def branches_on_any(stage: Stage) -> bool:
    """Return whether the value holds a condition on any axis."""
    return any(branches_on(stage.value, axis) for axis in stage.axes)
