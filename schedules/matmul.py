"""Matrix products: batched, with either operand transposed, pointwise convolutions, with what follows fused in.

The lanes run along the output's contiguous axis (N), a register tile covers several rows (M). The operand that varies
along N is read in place, or copied to a [K][width] panel per task where enough rows reuse it; a transposed one with few
rows is reduced along K in lanes instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import TensorLoad
from tvm.tirx.stmt import Stmt

from schedules import dot, epilogue, tiling
from schedules.access import Access, AxisGroup, Step, branches_on, group_axes
from schedules.block_ahead import block_ahead
from schedules.by_element import multiplies_by_element
from schedules.epilogue import Epilogue
from schedules.family import Choice, Kernel, Parameters, Space, is_large, vector_width, work_of
from schedules.grouped_products import GroupedProducts
from schedules.intrin.bf16_dot import PAIR
from schedules.intrin.byte_dot import FOUR, splits_operands
from schedules.intrin.grouped_call import GroupedDot
from schedules.intrin.grouped_dot import grouped_dot, is_grouped_term
from schedules.intrin.matrix_tiles import BLOCK, matrix_tiles
from schedules.loops import Extent, ceiling, product
from schedules.matrix_division import divides_rows, even_block, rows_of_divided_block, sizes_of_blocks
from schedules.matrix_tile import MatrixOperands, stride_of
from schedules.reducer import NARROW_FLOATS, accumulator_dtype, reducer_of
from schedules.register_tile import SPLIT_TILE, WIDENED_TILE, WORD_TILE, register_tile, wide_block, wide_tile
from schedules.row_blocks import rows_that_stay
from schedules.stages import Stage
from targets.base import Target

# Rows that must reuse a panel before copying it pays: a straight copy costs a few cycles per K and vector, a
# transposing one some dozens, and one row of the tile half a cycle per vector.
ROWS_TO_COPY = 32
ROWS_TO_TRANSPOSE = 48


@dataclass(frozen=True, eq=False)
class MatmulAnalysis:
    """The axes of a contraction: `columns` in lanes, `rows` in registers, and the operand read along the columns.

    `block` is how many columns of the operand lie together where it is packed, 0 where it is not, and `group` how
    many neighbours of K do, for an instruction that adds their products at once.
    """

    stage: Stage
    epilogue: Epilogue
    outer: tuple[AxisGroup, ...]
    rows: AxisGroup | None
    columns: AxisGroup
    reduction: tuple[AxisGroup, ...]
    operand: TensorLoad
    transposed: bool
    block: int
    group: int = 1


class Matmul:
    """Register-tiled contraction of two operands."""

    name = "matmul"
    version = 2

    def takes(self, kernel: Kernel, target: Target) -> MatmulAnalysis | None:
        """Return the analysis of a reduction in which each operand lacks an axis that the other has."""
        analysis = self.analyse(kernel)
        if analysis is not None and analysis.block % vector_width(target, analysis.stage):
            return None
        if analysis is not None and analysis.group > 1 and dot_of(analysis, target) is None:
            return None
        return analysis

    def analyse(self, kernel: Kernel) -> MatmulAnalysis | None:
        """Return the analysis for any target."""
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
        group = group_of(stage, operand, reduction)
        packed = operand.indices[:-1] if group > 1 else operand.indices
        block = Access(operand.source, tuple(packed)).block(columns.inner)
        if along == Step.IRREGULAR and not block:
            return None
        outer = tuple(group for group in groups[:-1] if group is not rows)
        return MatmulAnalysis(
            stage, follows, outer, rows, columns, tuple(reduction), operand, along == Step.STRIDED, block, group
        )

    def space(self, target: Target, analysis: MatmulAnalysis) -> Space:
        """Return the register tile, the rows of a task, and whether the column operand is copied to panels."""
        rows, vectors = _register_tile(analysis, target)
        return (
            Choice("rows", rows, (4, 6, 8, 9, 12, 14)),
            Choice("vectors", vectors, (1, 2, 3, 4)),
            Choice("row_block", _row_block(target, analysis), (16, 32, 64, 128, 256)),
            Choice("panel_rows", _enough_rows(analysis), (0, 16, 32, 64, 1 << 20)),
        )

    def apply(self, analysis: MatmulAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest; two of them, and a choice at run time, where the number of rows is symbolic."""
        enough = parameters["panel_rows"]
        extent: Extent = analysis.rows.extent if analysis.rows is not None else 1

        def few() -> Stmt:
            return _many_rows(analysis, parameters, target, None) if analysis.block else _few_rows(analysis, target)

        if analysis.block and not _widens(analysis, target):
            return few()
        if isinstance(extent, int) and extent < enough:
            return few()
        many = _many_rows(analysis, parameters, target, analysis.operand)
        return many if isinstance(extent, int) else tirx.IfThenElse(extent >= enough, many, few())


def _register_tile(analysis: MatmulAnalysis, target: Target) -> tuple[int, int]:
    """Return rows and vectors of accumulators that fit the registers beside what a step needs."""
    if _widens(analysis, target):
        return WIDENED_TILE
    if _is_wide(analysis, target):
        return wide_tile(target, analysis.rows.extent if analysis.rows is not None else 1)
    if not splits_operands(target) or analysis.group == 1:
        return register_tile(target)
    return SPLIT_TILE if analysis.group == FOUR else WORD_TILE


def _is_wide(analysis: MatmulAnalysis, target: Target) -> bool:
    """Return whether the column operand is packed for WIDE_TILE."""
    operand, block = str(analysis.operand.source.dtype), analysis.block
    return block > 0 and analysis.group == 1 and wide_block(target, operand, block) == block


def _widens(analysis: MatmulAnalysis, target: Target) -> bool:
    """Return whether instructions would widen a vector of the column operand for every few multiply-adds."""
    narrow = str(analysis.operand.source.dtype) in NARROW_FLOATS and analysis.group == 1
    return narrow and multiplies_by_element(target)


def _enough_rows(analysis: MatmulAnalysis) -> int:
    return ROWS_TO_TRANSPOSE if analysis.transposed else ROWS_TO_COPY


def _row_block(target: Target, analysis: MatmulAnalysis) -> int:
    """Return the most rows of a task that leave every core two tasks; of a symbolic number, where columns alone do."""
    matrix = matrix_operands(analysis, target)
    _, vectors = _register_tile(analysis, target)
    width = vectors * vector_width(target, analysis.stage) if matrix is None else BLOCK
    rows: Extent = analysis.rows.extent if analysis.rows is not None else 1
    others = product([ceiling(analysis.columns.extent, width), *(group.extent for group in analysis.outer)])
    if matrix is not None and _divides_rows(analysis, matrix, target):
        assert isinstance(rows, int)
        assert isinstance(others, int)
        return rows_of_divided_block(rows, others, matrix, target)
    most = rows_that_stay(analysis.stage, analysis.operand, analysis.reduction, target, 128)
    sizes = (most, min(64, most), 32) if matrix is None else sizes_of_blocks(matrix, rows, target)
    for block in sizes[:-1]:
        tasks = product([others, ceiling(rows, block) if isinstance(rows, int) else 1])
        if isinstance(tasks, int) and tasks >= 2 * target.cores:
            return block
    return sizes[-1]


def _divides_rows(analysis: MatmulAnalysis, matrix: MatrixOperands, target: Target) -> bool:
    rows: Extent = analysis.rows.extent if analysis.rows is not None else 1
    return divides_rows(rows, analysis.columns.extent, analysis.outer, matrix, target)


def _many_rows(analysis: MatmulAnalysis, parameters: Parameters, target: Target, panel: TensorLoad | None) -> Stmt:
    rows, vectors = parameters["rows"], parameters["vectors"]
    block = parameters["row_block"]
    if panel is not None or matrix_operands(analysis, target) is None:
        block = max(rows, block // rows * rows)
    tile = tile_of(analysis, target, (rows, vectors), block, panel)
    extent = tile.row_extent
    if isinstance(extent, int) and -(-extent // tile.row_block) >= tiling.BLOCKS_TO_TAKE_WHOLE:
        tile = with_next_rows(tile, analysis, target)
    if tile.matrix is not None and _divides_rows(analysis, tile.matrix, target):
        tile = replace(tile, by_rows=True)
    return tiling.emit(tile)


def with_next_rows(tile: tiling.Tile, analysis: MatmulAnalysis, target: Target) -> tiling.Tile:
    """Return a tile whose blocks of rows, computed with all columns one after the other, ask for the next one's.

    The same tile where the second-level cache holds all rows, where two blocks would leave too little of it to the
    weights and the results, and where the number of rows or columns is not known. A core that begins two multiply-adds
    a cycle loses more by so many requests at once than by waiting (12000x1536x384 in fp32 6 %, Granite Rapids).
    """
    columns = analysis.columns.extent
    if not isinstance(columns, int) or target.multiply_adds > 1:
        return tile
    parts = -(-columns // tile.width)
    ahead = block_ahead(analysis.stage, analysis.operand, analysis.rows, analysis.reduction, parts)
    if ahead is None or not isinstance(tile.row_extent, int):
        return tile
    cache = target.caches.level2
    if tile.row_extent * ahead.bytes_of_row <= cache or tile.row_block * ahead.bytes_of_row > cache // 4:
        return tile
    return replace(tile, next_rows=ahead)


def _few_rows(analysis: MatmulAnalysis, target: Target) -> Stmt:
    """Return code for fewer rows than pay a copy of the column operand."""
    stage = analysis.stage
    along = analysis.reduction[-1]
    reducer = reducer_of(stage)
    lanes = vector_width(target, stage)
    rows, vectors = register_tile(target)
    extent: Extent = analysis.rows.extent if analysis.rows is not None else 1
    if analysis.transposed and reducer is not None and walks_in_lanes(stage, along):
        side = 4 if rows * vectors >= 16 else 3
        return dot.emit(
            dot.DotTile(
                stage=stage,
                epilogue=analysis.epilogue,
                reducer=reducer,
                outer=analysis.outer,
                row_group=analysis.rows,
                column_group=analysis.columns,
                reduction=analysis.reduction,
                along=along,
                lanes=lanes,
                rows=side,
                columns=side if extent != 1 else 2 * side,
                parallel=is_large(work_of(stage)),
            )
        )
    if not isinstance(extent, int) or extent <= rows // 2:
        rows, vectors = rows // 2, 2 * vectors
    return tiling.emit(tile_of(analysis, target, (rows, vectors), 4 * rows, None))


def tile_of(
    analysis: MatmulAnalysis, target: Target, shape: tuple[int, int], row_block: int, panel: TensorLoad | None
) -> tiling.Tile:
    """Return a register tile of `shape` rows by vectors, no larger than the output."""
    rows, vectors = shape
    sums_in_fp32 = accumulator_dtype(analysis.stage) == "float32"
    lanes = target.vector_lanes(32) if sums_in_fp32 else vector_width(target, analysis.stage)
    width = lanes * vectors
    if analysis.block and panel is None:
        width = math.gcd(width, analysis.block)
    columns = analysis.columns.extent
    if isinstance(columns, int):
        width = min(width, -(-columns // lanes) * lanes)
    extent: Extent = analysis.rows.extent if analysis.rows is not None else 1
    dot = dot_of(analysis, target) if analysis.group > 1 else None
    matrix = matrix_operands(analysis, target) if panel is None else None
    if matrix is not None:
        rows, width = BLOCK, min(BLOCK, analysis.block)
        row_block = max(BLOCK, row_block // BLOCK * BLOCK)
    if isinstance(extent, int):
        row_block = even_block(extent, row_block, rows)
    return tiling.Tile(
        stage=analysis.stage,
        epilogue=analysis.epilogue,
        outer=analysis.outer,
        vector_group=analysis.columns,
        row_group=analysis.rows,
        reduction=analysis.reduction,
        width=width,
        lanes=lanes,
        rows=rows,
        row_block=row_block,
        panel=panel,
        parallel=is_large(work_of(analysis.stage)),
        ahead=analysis.operand if panel is None else None,
        near=analysis.operand if dot is None and panel is None and _comes_late(analysis, target) else None,
        grouped=None
        if dot is None
        else GroupedProducts(dot, analysis.operand, other_operand(analysis.stage, analysis.operand)),
        matrix=matrix,
        by_element=multiplies_by_element(target),
        apart=target if panel is None and _is_wide(analysis, target) else None,
    )


def matrix_operands(analysis: MatmulAnalysis, target: Target) -> MatrixOperands | None:
    """Return the operands of a product that tile registers can compute, None where they can't."""
    if analysis.group == 1 or dot_of(analysis, target) is None:
        return None
    other = other_operand(analysis.stage, analysis.operand)
    types = (str(other.source.dtype), str(analysis.operand.source.dtype))
    tiles, (along,) = matrix_tiles(target, *types), analysis.reduction
    if tiles is None or analysis.rows is None or not isinstance(along.extent, int) or along.extent < tiles.terms:
        return None
    if stride_of(other, analysis.rows) is None or analysis.block % BLOCK:
        return None
    parts = (analysis.operand, other, analysis.rows, analysis.columns, along)
    operands = MatrixOperands(tiles, *parts, target.caches.level1)
    return operands if operands.filled or tiles.total == "int32" else None


def _comes_late(analysis: MatmulAnalysis, target: Target) -> bool:
    """Return whether the column operand, packed, is read by several tiles of rows of a core faster than it comes."""
    rows: Extent = analysis.rows.extent if analysis.rows is not None else 1
    several = not isinstance(rows, int) or rows > register_tile(target)[0]
    return target.multiply_adds > 1 and bool(analysis.block) and len(analysis.reduction) == 1 and several


def split_epilogue(kernel: Kernel) -> tuple[Stage | None, Epilogue | None]:
    """Return the reduction of a kernel of one reduction and what follows it."""
    stage, *following = kernel.stages
    if not stage.is_reduction or len(following) > 1:
        return None, None
    return stage, epilogue.match(stage, following[0]) if following else epilogue.plain(stage)


def follows_as_stage(follows: Epilogue) -> Stage:
    """Return the epilogue as a stage over the reduction's axes, for its accesses."""
    return Stage(follows.stage.output, follows.indices, follows.source.spatial, (), None, follows.value)


def step(load: TensorLoad, group: AxisGroup) -> Step:
    """Return how `load` moves along the fastest axis of `group`."""
    return Access(load.source, tuple(load.indices)).step(group.inner)


def walks_in_lanes(stage: Stage, group: AxisGroup) -> bool:
    """Return whether every read is contiguous or constant along `group`, and no condition or number depends on it."""
    steps = [step(load, group) for load in stage.loads()]
    if any(kind not in (Step.NONE, Step.UNIT) for kind in steps) or Step.UNIT not in steps:
        return False
    return not branches_on(stage.value, group.inner)


def depends(load: TensorLoad, group: AxisGroup) -> bool:
    """Return whether `load` reads another element as `group` advances."""
    return step(load, group) != Step.NONE


def reduces(load: TensorLoad, reduction: Sequence[AxisGroup]) -> bool:
    """Return whether `load` depends on a reduction axis."""
    return any(depends(load, group) for group in reduction)


def other_operand(stage: Stage, operand: TensorLoad) -> TensorLoad:
    """Return the read of a product of two reads that is not `operand`."""
    return next(load for load in stage.loads() if not load.same_as(operand))


def group_of(stage: Stage, operand: TensorLoad, reduction: Sequence[AxisGroup]) -> int:
    """Return g where `operand` is read at [..., k // g, ..., k % g] along the only axis k of a reduction, 1 elsewhere.

    It is the number of neighbours that an instruction takes of such operands.
    """
    if len(reduction) != 1 or len(reduction[0].axes) != 1 or not operand.indices:
        return 1
    reducer = reducer_of(stage)
    if reducer is None or not is_grouped_term(reducer.term):
        return 1
    block = Access(operand.source, tuple(operand.indices)).block(reduction[0].inner)
    return block if block in (PAIR, FOUR) else 1


def dot_of(analysis: MatmulAnalysis, target: Target) -> GroupedDot | None:
    """Return the instruction that adds several terms of a product, whose other operand is contiguous along K.

    None where the target has none.
    """
    if len(analysis.reduction) != 1 or len(analysis.stage.loads()) != 2:
        return None
    along, reducer = analysis.reduction[0], reducer_of(analysis.stage)
    other = other_operand(analysis.stage, analysis.operand)
    if reducer is None or not isinstance(along.extent, int) or step(other, along) != Step.UNIT:
        return None
    dot = grouped_dot(target, analysis.operand, reducer.term)
    return None if dot is None or (analysis.group > 1 and dot.terms != analysis.group) else dot


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
