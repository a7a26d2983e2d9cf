"""Register tiles of products: how many rows and vectors of columns have their sums in registers."""

from __future__ import annotations

from targets.base import Target

# Rows and vectors of columns where instructions widen 16-bit floats of the rows, as those of the columns are in a panel
# in fp32: 5 for 80 multiply-adds, each in the place of two of these. 20 of 32 registers.
WIDENED_TILE = 5, 4
# Where bytes are split into two vectors of 16 bits: 6 sums, 4 vectors of columns, and 4 registers for a row.
SPLIT_TILE = 3, 2


def register_tile(target: Target) -> tuple[int, int]:
    """Return rows and vectors of accumulators that fit the registers beside the operands' (and hide FMA latency)."""
    if target.vector_registers < 32:
        return 6, 2  # 12 of 16 registers
    # 16 of 32 registers. A core that begins two multiply-adds a cycle would ask for the vectors of columns twice as
    # often, and the second-level cache not keep up: with 24, in 12 rows, it has as long as with 12.
    return (8 if target.multiply_adds == 1 else 12), 2
