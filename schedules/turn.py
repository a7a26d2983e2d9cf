"""Square blocks turned in vector registers: read along rows, written along columns."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.loops import index, load, local, store, unrolled, vector, with_local

# Within so many bits every instruction set interleaves two vectors by one instruction.
INTERLEAVED_BITS = 128


def turned(
    side: int, dtype: str, element: Callable[[Expr, Expr], Expr], write: Callable[[Expr, Expr, Expr], Stmt]
) -> Stmt:
    """Return code that reads `element(row, column)` in vectors along columns and writes in vectors along rows.

    `write(row, column, value)` is the statement for one element. `side`, a power of two, is the number of rows and of
    columns.
    """

    def row_of(block: Var, row: Expr) -> Stmt:
        return vector(side, lambda column: store(block, element(row, column), [row * side + column]))

    def column_of(block: Var, column: Expr) -> Stmt:
        return vector(side, lambda row: write(row, column, load(block, [column * side + row])))

    return _through_block(side, dtype, row_of, column_of)


def turned_vectors(side: int, dtype: str, read: Callable[[Expr], Expr], write: Callable[[Expr, Expr], Stmt]) -> Stmt:
    """Return code that reads the vector `read(row)` of each of `side` rows, and does `write(column, vector)` for each.

    `side`, a power of two, is the number of rows and of columns.
    """

    def row_of(block: Var, row: Expr) -> Stmt:
        return store(block, read(row), [_row(row, side)])

    def column_of(block: Var, column: Expr) -> Stmt:
        return write(column, load(block, [_row(column, side)]))

    return _through_block(side, dtype, row_of, column_of)


def _through_block(
    side: int, dtype: str, row_of: Callable[[Var, Expr], Stmt], column_of: Callable[[Var, Expr], Stmt]
) -> Stmt:
    """Return the rows of a block as they are filled, its transposition, and what is done with its columns."""
    block = local([side * side], dtype, "block")
    fill = unrolled(side, lambda row: row_of(block, row))
    return with_local([block], [fill, *turn_rows(block, side), unrolled(side, lambda column: column_of(block, column))])


def turn_rows(buffer: Var, side: int) -> list[Stmt]:
    """Return the transposition of `side` vectors in log2(side) rounds of as many shuffles as there are vectors."""
    if side * buffer.dtype.bits <= INTERLEAVED_BITS:
        return interleave_rows(buffer, side, side)
    return _swap_blocks(buffer, side)


def interleave_rows(buffer: Var, rows: int, lanes: int) -> list[Stmt]:
    """Return the transposition of `rows` vectors, a power of two of them, to `lanes` rows, one behind the other.

    Each of log2(rows) rounds interleaves the lanes of rows i and i + rows / 2 to rows 2i and 2i + 1: it rotates the
    bits of every element's position by one, from [row, lane] to [lane, row].
    """
    statements: list[Stmt] = []
    half = lanes // 2
    for _ in range(rows.bit_length() - 1):
        vectors = [Var(f"row{row}", f"{buffer.dtype}x{lanes}") for row in range(rows)]
        statements += [tirx.Bind(each, load(buffer, [_row(row, lanes)])) for row, each in enumerate(vectors)]
        for row in range(rows):
            chosen = [
                lane + source * lanes for lane in range(row % 2 * half, (row % 2 + 1) * half) for source in (0, 1)
            ]
            pair = [vectors[row // 2], vectors[row // 2 + rows // 2]]
            turned = tirx.Shuffle(pair, [tirx.IntImm("int32", lane) for lane in chosen])
            statements.append(store(buffer, turned, [_row(row, lanes)]))
    return statements


def _swap_blocks(buffer: Var, side: int) -> list[Stmt]:
    """Return rounds, each of which swaps blocks of half the size.

    A round at distance d exchanges, in every pair of rows i and i + d, the lanes d.. of the one with the lanes 0.. of
    the other, in every 2d lanes (Eklundh, A Fast Computer Method for Matrix Transposing, 1972).
    """
    statements: list[Stmt] = []
    distance = side // 2
    while distance:
        for row in range(side):
            if row & distance:
                continue
            pair = [Var(f"row{row + offset}", f"{buffer.dtype}x{side}") for offset in (0, distance)]
            upper = [lane if not lane & distance else side + lane - distance for lane in range(side)]
            lower = [lane + distance if not lane & distance else side + lane for lane in range(side)]
            statements += [
                tirx.Bind(each, load(buffer, [_row(row + o, side)]))
                for each, o in zip(pair, (0, distance), strict=True)
            ]
            for offset, lanes in ((0, upper), (distance, lower)):
                turned = tirx.Shuffle(pair, [tirx.IntImm("int32", lane) for lane in lanes])
                statements.append(store(buffer, turned, [_row(row + offset, side)]))
        distance //= 2
    return statements


def turn_by_quarters(buffer: Var, result: Var, side: int) -> list[Stmt]:
    """Return the transposition of a block of twice `side` rows to `result`, a quarter after the other in registers."""
    statements: list[Stmt] = []
    for column, row in itertools.product((0, side), (0, side)):
        quarter = local([side * side], str(buffer.dtype), "quarter")
        read = [tirx.Ramp(index((row + k) * 2 * side + column), index(1), side) for k in range(side)]
        written = [tirx.Ramp(index((column + k) * 2 * side + row), index(1), side) for k in range(side)]
        fill = [store(quarter, load(buffer, [place]), [_row(k, side)]) for k, place in enumerate(read)]
        move = [store(result, load(quarter, [_row(k, side)]), [place]) for k, place in enumerate(written)]
        statements.append(with_local([quarter], [*fill, *turn_rows(quarter, side), *move]))
    return statements


def turn_short_rows(buffer: Var, rows: int, lanes: int) -> list[Stmt]:
    """Return the transposition of `lanes` rows of `rows` elements, powers of two, that lie in `rows` vectors.

    Each of log2(rows) rounds takes the even lanes of neighbouring vectors to the first half of the buffer and the odd
    ones to the second half: it rotates the bits of every element's position by one, from [lane, row] to [row, lane].
    """
    statements: list[Stmt] = []
    evens, odds = list(range(0, 2 * lanes, 2)), list(range(1, 2 * lanes, 2))
    for _ in range(rows.bit_length() - 1):
        vectors = [Var(f"vector{row}", f"{buffer.dtype}x{lanes}") for row in range(rows)]
        statements += [tirx.Bind(each, load(buffer, [_row(row, lanes)])) for row, each in enumerate(vectors)]
        for half, chosen in enumerate((evens, odds)):
            for pair in range(rows // 2):
                shuffled = tirx.Shuffle(vectors[2 * pair : 2 * pair + 2], [tirx.IntImm("int32", at) for at in chosen])
                statements.append(store(buffer, shuffled, [_row(half * rows // 2 + pair, lanes)]))
    return statements


def _row(row: int | Expr, side: int) -> Expr:
    start = row * side
    return tirx.Ramp(index(start) if isinstance(start, int) else start, index(1), side)
