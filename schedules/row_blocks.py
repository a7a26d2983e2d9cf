"""Blocks of rows of a product: how many rows a task computes with one panel of columns after the other."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import TensorLoad

from schedules.access import AxisGroup
from schedules.loops import product
from schedules.stages import Stage
from targets.base import Target

# Rows that read a panel often enough, where longer ones leave the second-level cache for a farther one anyway.
FEWEST_ROWS = 48


def rows_that_stay(stage: Stage, operand: TensorLoad, reduction: Sequence[AxisGroup], target: Target, most: int) -> int:
    """Return at most `most` rows of a block: those that fill five eighths of the second-level cache.

    The rest is for the panel of columns that they are multiplied with, and for the one that is asked for meanwhile. A
    core that begins two multiply-adds a cycle waits for rows from farther away (1024x768x3072 in fp32 takes 8 % longer
    with 132 rows of 12 KiB than with 96, Granite Rapids).
    """
    depth = product([group.extent for group in reduction])
    widths = [int(read.source.dtype.bits) for read in stage.loads() if not read.same_as(operand)]
    if target.multiply_adds == 1 or not isinstance(depth, int) or depth == 0 or not widths:
        return most
    rows = target.caches.level2 * 5 // 8 // -(-depth * max(widths) // 8)
    return min(most, max(FEWEST_ROWS, rows))
