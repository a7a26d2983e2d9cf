"""Rows of products in tile registers, of which one block is finished while the next one is computed.

Sums that nothing follows are stored as they are, which is less work than to store them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step
from schedules.epilogue import Epilogue
from schedules.intrin.matrix_tiles import BLOCK, TILE
from schedules.loops import Extent, index, load, local, loop, with_local
from schedules.matrix_tile import (
    MatrixOperands,
    block_of_sums,
    finished_row,
    in_blocks,
    last_terms,
    next_columns,
    pieces_of_row,
    step_of,
    stride_of,
    written_lines,
)
from schedules.stages import Stage, sequence, substitute


def rows_of_sums(
    operands: MatrixOperands,
    stage: Stage,
    epilogue: Epilogue,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    shape: tuple[Extent, int],
    most: int,
) -> Stmt:
    """Return `shape` rows, up to `most`, by columns, up to 32, a block of 32 rows after the other, then what is left.

    `at` gives the axes' values at a row and a column. The blocks ask for the weights of the next 32 columns.
    """
    rows, width = shape
    blocks = -(-most // BLOCK)
    pitch = _pitch_of_result(operands, epilogue, width)
    pieces = pieces_of_row(epilogue, operands.columns, width)
    if Access(epilogue.stage.output, epilogue.indices).step(operands.columns.inner) == Step.STRIDED:
        pieces = ()
    # Two blocks' sums: while those of one are computed the other's are finished.
    sums = local([2 * BLOCK * BLOCK], operands.tiles.total, "sums")

    def finish(number: Expr, row: Expr) -> Stmt:
        first = (number % 2 * BLOCK + row) * BLOCK
        return finished_row(stage, epilogue, sums, first, at_block(number), row, pieces)

    def at_block(number: Expr) -> Callable[[Expr, Expr], Mapping[Var, Expr]]:
        return lambda row, column: at(number * BLOCK + row, column)

    def block(number: Expr, count: Extent) -> Stmt:
        inside = at_block(number)
        ahead = next_columns(operands, inside, number, blocks)
        whole = isinstance(count, int) and count == BLOCK
        if not pieces or not whole:
            return block_of_sums(operands, stage, epilogue, inside, (count, width), whole, ahead)
        lines = written_lines(operands, epilogue, inside, width)

        def asks(step: Expr) -> Stmt:
            return sequence([ahead(step), *lines(step)])

        if pitch is not None:
            return _stored_at_once(operands, epilogue, inside, width, asks, pitch)
        places = [load(sums, [number % 2 * BLOCK * BLOCK + at]) for at in (0, TILE * BLOCK, BLOCK * BLOCK - 1)]
        return sequence(
            [
                operands.tiles.zero(),
                _steps_beside(operands, inside, width, asks, lambda row: finish(number - 1, row), number > 0),
                last_terms(operands, inside, (BLOCK, width)) if operands.rest else tirx.Evaluate(0),
                operands.tiles.store((2, -(-width // TILE)), places, BLOCK * 4),
            ]
        )

    def after(number: Expr) -> Stmt:
        return loop(BLOCK, lambda row: finish(number, row))

    if not pieces or pitch is not None:
        return in_blocks(operands.tiles, rows, block)
    return with_local([sums], [in_blocks(operands.tiles, rows, block, after)])


def _pitch_of_result(operands: MatrixOperands, epilogue: Epilogue, width: int) -> Expr | None:
    """Return how many bytes after a row of results the next one begins, if tiles of sums may be stored there.

    None where anything follows the sums, and where columns do not lie together.
    """
    output = epilogue.stage.output
    alone = epilogue.stage is epilogue.source and str(output.dtype) == operands.tiles.total
    single = len(operands.rows.axes) == len(operands.columns.axes) == 1
    together = Access(output, epilogue.indices).step(operands.columns.inner) == Step.UNIT
    if not alone or not single or not together or width % TILE:
        return None
    stride = stride_of(load(output, list(epilogue.indices)), operands.rows)
    return None if stride is None else stride * index(int(output.dtype.bits) // 8)


def _stored_at_once(
    operands: MatrixOperands,
    epilogue: Epilogue,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    width: int,
    ahead: Callable[[Expr], Stmt],
    pitch: Expr,
) -> Stmt:
    """Return the sums of a block of 32 rows that nothing follows, stored where they belong."""

    def place(row: int, column: int) -> Expr:
        point = at(index(row), index(column))
        return load(epilogue.stage.output, [substitute(each, point) for each in epilogue.indices])

    shape = (2, width // TILE)
    places = [place(0, 0), place(TILE, 0), place(BLOCK - 1, width - 1)]
    step = step_of(operands, at, (BLOCK, width), lambda number: [ahead(number)])
    return sequence(
        [
            operands.tiles.zero(),
            loop(operands.steps, step),
            last_terms(operands, at, (BLOCK, width)) if operands.rest else tirx.Evaluate(0),
            operands.tiles.store(shape, places, pitch),
        ]
    )


def _steps_beside(
    operands: MatrixOperands,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    width: int,
    ahead: Callable[[Expr], Stmt],
    finish: Callable[[Expr], Stmt],
    wanted: Expr,
) -> Stmt:
    """Return the steps of a block of 32 rows, which `finish` the rows of the one before, where that is `wanted`.

    The units for vectors stand still while tiles are multiplied, and the other way round, if one follows the other: a
    core looks ahead no further than a block's sums.
    """
    each = -(-BLOCK // operands.steps)
    busy, left = divmod(BLOCK, each)

    def steps(first: int, count: int, rows: int) -> list[Stmt]:
        def beside(number: Expr) -> list[Stmt]:
            some = tirx.IfThenElse(wanted, loop(rows, lambda row: finish(number * each + row)), None)
            return [ahead(number), *([some] if rows else [])]

        step = step_of(operands, at, (BLOCK, width), beside)
        return [loop(count, lambda number: step(first + number))] if count else []

    last = 1 if left else 0
    idle = operands.steps - busy - last
    return sequence([*steps(0, busy, each), *steps(busy, last, left), *steps(busy + last, idle, 0)])
