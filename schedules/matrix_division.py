"""How the rows of a product in tile registers are cut into tasks, and which cores take which."""

from __future__ import annotations

from collections.abc import Sequence

from schedules.access import AxisGroup
from schedules.intrin.matrix_tiles import BLOCK, BYTES
from schedules.loops import Extent
from schedules.matrix_tile import MatrixOperands
from targets.base import Target

# Rows of a task that read a weight often enough: with 128, 768 x 768 from the last cache take a fifth longer a row
# than with 224 (Granite Rapids).
MATRIX_ROWS = 128


def divides_rows(
    rows: Extent, columns: Extent, outer: Sequence[AxisGroup], matrix: MatrixOperands, target: Target
) -> bool:
    """Return whether cores divide the rows of a product, and each reads all columns' weights.

    Otherwise they divide the columns, and each reads all rows: where these are few, weights are more. Rows that do not
    fit a core's cache are read from the last one, by one core instead of all: this and tasks of whole tiles' rows made
    1500 x 384 by a depth of 1536 13 % faster, 1576 x 768 by 3072 9 % (Granite Rapids).
    """
    if outer or not isinstance(rows, int) or not isinstance(columns, int):
        return False
    return 2 * rows >= columns and rows * matrix.steps * BYTES > target.caches.level2 // 2


def rows_of_divided_block(rows: int, columns: int, matrix: MatrixOperands, target: Target) -> int:
    """Return the rows of a task where cores divide them, given the tasks across the `columns` of a block.

    The blocks fill half of the second-level cache at most and are enough for all cores; of an even number two cores
    take as many each, and no weights of a block twice.
    """
    blocks = max(-(-rows // _most_rows(matrix, target)), -(-2 * target.cores // columns))
    return even_block(rows, -(-rows // (blocks + blocks % 2)), BLOCK)


def sizes_of_blocks(matrix: MatrixOperands, rows: Extent, target: Target) -> Sequence[int]:
    """Return the sizes that tasks may have where cores divide the columns, in rows, the largest first.

    Of more than MATRIX_ROWS rows a task has at least these, and at most those that fill half of the second-level cache.
    """
    most = _most_rows(matrix, target)
    if not isinstance(rows, int):
        return [min(most, 2 * MATRIX_ROWS)]
    counts = range(-(-rows // most), 2 * target.cores + 1)
    even = [even_block(rows, -(-rows // blocks), BLOCK) for blocks in counts]
    return [*(size for size in even if size > MATRIX_ROWS), MATRIX_ROWS]


def _most_rows(matrix: MatrixOperands, target: Target) -> int:
    """Return the most rows of a task: those that fill half of the second-level cache, or MATRIX_ROWS."""
    return max(MATRIX_ROWS, target.caches.level2 // 2 // (matrix.steps * BYTES) // BLOCK * BLOCK)


def even_block(extent: int, most: int, rows: int) -> int:
    """Return the rows of equal blocks, as few as hold `extent` rows by at most `most`, in whole tiles of `rows`."""
    blocks = -(-extent // most)
    return -(-extent // (blocks * rows)) * rows
