"""Register tiles of products: how many rows and vectors of columns have their sums in registers."""

from __future__ import annotations

from schedules.loops import Extent
from targets.base import Target

# Rows and vectors of columns where instructions widen 16-bit floats of the rows, as those of the columns are in a panel
# in fp32: 5 for 80 multiply-adds, each in the place of two of these. 20 of 32 registers.
WIDENED_TILE = 5, 4
# Where bytes are split into two vectors of 16 bits: 6 sums, 4 vectors of columns, and 4 registers for a row.
SPLIT_TILE = 3, 2
# Of words, in pairs: 10 sums, 2 vectors of columns, one of a row, and a product.
WORD_TILE = 5, 2
# Of packed weights in fp32, where a core begins two multiply-adds a cycle: 27 of 32 registers, three vectors and two
# elements. Of what tiles of 12 by two read, a step reads four fifths a multiply-add, and the core's clock falls less.
WIDE_TILE = 9, 3
_ROWS_OF_EVEN_TILE = 8


def register_tile(target: Target) -> tuple[int, int]:
    """Return rows and vectors of accumulators that fit the registers beside the operands' (and hide FMA latency)."""
    if target.has_few_registers:
        return 6, 2  # 12 of 16 registers
    # 16 of 32 registers. A core that begins two multiply-adds a cycle would ask for the vectors of columns twice as
    # often, and the second-level cache not keep up: with 24, in 12 rows, it has as long as with 12.
    return (8 if target.multiply_adds == 1 else 12), 2


def wide_block(target: Target, dtype: str, columns: int) -> int | None:
    """Return how many columns of weights of `dtype` lie together for WIDE_TILE, None where tiles are narrower.

    They are where whole blocks would leave some of the `columns`: tiles of one vector ask for too much a multiply-add.
    """
    vectors = target.multiply_adds > 1 and not target.has_few_registers
    width = target.vector_lanes(32) * WIDE_TILE[1]
    return width if vectors and dtype == "float32" and columns % width == 0 else None


def wide_tile(target: Target, rows: Extent) -> tuple[int, int]:
    """Return rows and vectors of the tile for `wide_block` columns: of eight rows where all cores get as many."""
    even = isinstance(rows, int) and rows % (_ROWS_OF_EVEN_TILE * target.cores) == 0
    return (_ROWS_OF_EVEN_TILE if even else WIDE_TILE[0]), WIDE_TILE[1]
