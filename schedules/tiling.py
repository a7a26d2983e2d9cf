"""Reductions whose lanes are neighbours in the output: tasks of blocks of rows, and these of register tiles.

`tile_of_sums.py` has the code of one tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.load_fence import with_fences
from schedules.loops import (
    Extent,
    parallel,
    product,
    tile_choice,
    tiles,
    unflatten,
    with_local,
)
from schedules.matrix_rows import rows_of_sums
from schedules.matrix_tile import MatrixOperands
from schedules.panels import Panel
from schedules.reducer import read_in_fp32, widened
from schedules.stages import sequence
from schedules.tile_of_sums import Tile, tile_of_sums

# Parts of the columns that are computed one after the other, all rows of each. Threads take contiguous ranges of tasks:
# so what is left of the rows, whose tasks are shorter, spreads over all ranges.
COLUMN_GROUPS = 4
# With so many blocks of rows these shorter tasks are few: all columns of a block follow each other, so that its rows
# come from memory once and not with every group (12000 rows of 384 by 384 columns took 17 % longer, Zen 4).
BLOCKS_TO_TAKE_WHOLE = 32
# What whole tiles leave of a symbolic number of rows: four by two vectors keep multiply-adds busy, where those of a
# single one wait for each other.
SHORT_TILES = (4, 2, 1)
# Code for the columns of one width that begin at an offset.
Columns = Callable[[Expr, int], Stmt]
# Code for a block of rows at a point of the outer axes, of the columns of one width that begin at an offset.
Block = Callable[[Mapping[Var, Expr], Expr, int, Expr], Stmt]


def emit(tile: Tile, block: Block | None = None) -> Stmt:
    """Return the loop nest of `tile`, whose blocks `block` computes if given."""
    return with_instructions(tile, _nest(tile, block or functools.partial(block_of_rows, tile)))


def with_instructions(tile: Tile, statement: Stmt) -> Stmt:
    """Return a statement that computes blocks of `tile`, with the functions that their code calls."""
    if tile.matrix is not None:
        statement = tile.matrix.tiles.imported(statement)
    if tile.apart is not None:
        statement = with_fences(statement, tile.apart)
    return statement if tile.grouped is None else tile.grouped.dot.imported(statement)


def _nest(tile: Tile, block: Block) -> Stmt:
    columns = tile.vector_group.extent
    if isinstance(columns, int):
        count = -(-columns // tile.width)

        def choose(number: Expr, body: Columns) -> Stmt:
            return tile_choice(number, columns, tile.width, in_whole_vectors(tile, body))

        return _tasks(tile, count, choose, block)
    width = tirx.const(tile.width, "int64")
    full = _tasks(tile, tirx.floordiv(columns, width), lambda number, body: body(number * width, tile.width), block)
    done = tirx.floordiv(columns, width) * width
    sizes = [tile.lanes, 1] if tile.lanes < tile.width else [1]
    rest = _tasks(
        tile, 1, lambda _, body: tiles(columns - done, sizes, lambda base, lanes: body(done + base, lanes)), block
    )
    return sequence([full, rest])


def in_whole_vectors(tile: Tile, body: Columns) -> Columns:
    """Return code that does whole vectors first and then what is left; a vector of 17 lanes is pulled apart by LLVM."""

    def columns(base: Expr, width: int) -> Stmt:
        whole = width // tile.lanes * tile.lanes
        if whole in (0, width):
            return body(base, width)
        return sequence([body(base, whole), body(base + whole, width - whole)])

    return columns


def _tasks(tile: Tile, columns: Extent, choose: Callable[[Expr, Columns], Stmt], compute: Block) -> Stmt:
    """Return the parallel loop over outer axes, groups of column tiles, blocks of rows and tiles of a group."""
    outer = [group.extent for group in tile.outer]
    rows = tile.row_extent
    if isinstance(rows, int):
        blocks: Extent = -(-rows // tile.row_block)
    else:
        blocks = tirx.floordiv(rows + (tile.row_block - 1), tirx.const(tile.row_block, "int64"))
    groups, together = (1, columns) if tile.by_rows else _column_groups(columns, blocks)
    extents = [*outer, groups, blocks, together]

    def task(number: Expr) -> Stmt:
        *outside, part, block, position = unflatten(number, extents)
        column = part * together + position
        point: dict[Var, Expr] = {}
        for group, position in zip(tile.outer, outside, strict=True):
            point.update(group.point(position))
        return choose(column, lambda base, width: compute(point, base, width, block))

    return parallel(product(extents), task, tile.parallel)


def _column_groups(columns: Extent, blocks: Extent) -> tuple[int, Extent]:
    """Return how many groups of how many column tiles: equal ones, at least COLUMN_GROUPS where there are as many.

    It is one where there are many `blocks` of rows.
    """
    many = isinstance(blocks, int) and blocks >= BLOCKS_TO_TAKE_WHOLE
    if many or not isinstance(columns, int) or columns < COLUMN_GROUPS:
        return 1, columns
    groups = next(count for count in range(COLUMN_GROUPS, columns + 1) if columns % count == 0)
    return groups, columns // groups


def block_of_rows(tile: Tile, point: Mapping[Var, Expr], base: Expr, width: int, block: Expr) -> Stmt:
    """Return the micro-kernels of one block of rows by `width` columns at `base`."""
    stage, prepare = widened(tile.stage), []
    panels: list[Var] = []
    if tile.panel is not None:
        # Widened once, what is copied takes fewer instructions than elements of vectors have to multiply by.
        operand = read_in_fp32(stage, tile.panel) if tile.by_element else tile.panel
        panel = Panel(operand, tile.reduction, tile.vector_group)
        memory, copy = panel.copy(point, base, width)
        panels.append(memory)
        prepare.append(copy)
        stage = panel.reading(stage, memory, base)
    rows = tile.row_extent

    def kernels(start: Expr, extent: Extent) -> Stmt:
        if tile.matrix is not None:
            return _in_matrix_tiles(tile, tile.matrix, point, (start, extent), (base, width))
        sizes = [tile.rows] if isinstance(extent, int) else [tile.rows, *(n for n in SHORT_TILES if n < tile.rows)]
        return tiles(
            extent, sizes, lambda row, count: tile_of_sums(tile, stage, point, base, width, start + row, count)
        )

    if isinstance(rows, int):
        body = tile_choice(block, rows, tile.row_block, kernels)
    else:
        start = block * tile.row_block
        body = kernels(start, tirx.min(tirx.const(tile.row_block, "int64"), rows - start))
    return with_local(panels, [*prepare, body]) if panels else body


def _in_matrix_tiles(
    tile: Tile, matrix: MatrixOperands, point: Mapping[Var, Expr], rows: tuple[Expr, Extent], columns: tuple[Expr, int]
) -> Stmt:
    """Return rows and columns, both given by their first and their number, by blocks of tile registers."""
    (start, extent), (base, width) = rows, columns

    def at(r: Expr, v: Expr) -> dict[Var, Expr]:
        return {**point, **tile.vector_group.point(base + v), **matrix.rows.point(start + r)}

    return rows_of_sums(matrix, tile.stage, tile.epilogue, at, (extent, width), tile.row_block)
