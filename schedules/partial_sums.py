"""Long sums in parts: each added up in registers from zero, then added to the sum so far.

A chain of n additions has an error that grows with n, or with its square root where errors are random; of parts of b
terms it grows with b + n / b (Higham, The Accuracy of Floating Point Summation, SIAM J. Sci. Comput. 14(4), 1993,
section 3). A part is long enough that the few instructions at its end are not felt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.loops import Extent, load, store, tiles
from schedules.reducer import accumulator_dtype, reducer_of
from schedules.stages import Stage, sequence

PART_TERMS = 256
# Where sums fill the registers, and two multiply-adds begin in a cycle: parts of 256 cost 2 to 3 % of ViT-B/16 with
# eight images, Granite Rapids.
LONG_PART_TERMS = 1024
# A statement for every element of a register tile, given what is done at the place of one.
Cells = Callable[[Callable[[Expr], Stmt]], Stmt]


def part_steps(stage: Stage, extents: Sequence[Extent], multiple: int = 1, terms: int = PART_TERMS) -> int | None:
    """Return how many steps of the outermost of the loops over `extents` make a part, a multiple of `multiple`.

    Parts have about `terms` terms or more. None where one chain does: the sum is short, or its length is not known, or
    it is not one of floats.
    """
    lengths = [extent for extent in extents if isinstance(extent, int)]
    is_sum = reducer_of(stage) is not None and isinstance(stage.value, tirx.Add)
    if not is_sum or accumulator_dtype(stage) != "float32" or len(lengths) < len(extents):
        return None
    parts = math.prod(lengths) // terms
    if parts < 2:
        return None
    steps = -(-lengths[0] // (parts * multiple)) * multiple
    return steps if steps < lengths[0] else None


def in_parts(
    registers: Var, totals: Var, extent: int, steps: int, cells: Cells, reduce: Callable[[Expr, int], Stmt]
) -> Stmt:
    """Return the reduction over [0, extent) that adds parts of `steps` to `totals`.

    `reduce` adds a range to `registers`; `cells` makes a statement for every element of both.
    """
    zero = tirx.const(0.0, registers.dtype)

    def add(place: Expr) -> Stmt:
        return store(totals, load(totals, [place]) + load(registers, [place]), [place])

    def part(first: Expr, count: int) -> Stmt:
        return sequence([cells(lambda place: store(registers, zero, [place])), reduce(first, count), cells(add)])

    return tiles(extent, [steps], part)
