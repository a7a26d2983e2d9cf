"""Copies of columns that a task reads many times: [reduction][width], with what widens them to fp32 if wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, AxisGroup, Step
from schedules.loops import load, local, loop, nest, product, store, tiles, vector
from schedules.stages import Stage, replaced, substitute, with_value

Point = Mapping[Var, Expr]


@dataclass(frozen=True, eq=False)
class Panel:
    """A copy of what `operand` is, a read or what widens one, over `reduction` and some columns."""

    operand: Expr
    reduction: tuple[AxisGroup, ...]
    columns: AxisGroup

    def copy(self, point: Point, base: Expr, width: int) -> tuple[Var, Stmt]:
        """Return the memory for `width` columns from `base` on at a point of the other axes, and what fills it."""
        extents = [group.extent for group in self.reduction]
        panel = local([product(extents), width], str(self.operand.ty.dtype), "panel")

        def cell(positions: Sequence[Expr], column: Expr) -> Stmt:
            values = {**point, **self.columns.point(base + column)}
            for group, position in zip(self.reduction, positions, strict=True):
                values.update(group.point(position))
            return store(panel, substitute(self.operand, values), [self._row(values), column])

        if self._is_contiguous():

            def row(positions: Sequence[Expr]) -> Stmt:
                return tiles(
                    width,
                    [self._together(width)],
                    lambda first, count: vector(count, lambda column: cell(positions, first + column)),
                )

            return panel, nest(extents, row)
        return panel, loop(width, lambda column: nest(extents, lambda positions: cell(positions, column)))

    def reading(self, stage: Stage, panel: Var, base: Expr) -> Stage:
        """Return the stage with the operand read from the panel; the column is recovered from its axes."""
        row = self._row({axis.variable: axis.variable for group in self.reduction for axis in group.axes})
        column: Expr = tirx.const(0, "int64")
        for axis in self.columns.axes:
            column = column * axis.extent + axis.variable
        return with_value(stage, replaced(stage.value, self.operand, load(panel, [row, column - base])))

    @property
    def _access(self) -> Access:
        read = self.operand.value if isinstance(self.operand, tirx.Cast) else self.operand
        return Access(read.source, tuple(read.indices))

    def _is_contiguous(self) -> bool:
        return self._access.step(self.columns.inner) != Step.STRIDED

    def _together(self, width: int) -> int:
        """Return how many of `width` columns lie together, those of a block where there are blocks."""
        return math.gcd(width, self._access.block(self.columns.inner) or width)

    def _row(self, values: Point) -> Expr:
        """Return the row-major position of the reduction axes' values."""
        flat: Expr = tirx.const(0, "int64")
        for group in self.reduction:
            for axis in group.axes:
                flat = flat * axis.extent + values[axis.variable]
        return flat
