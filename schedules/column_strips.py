"""Reductions over rows far larger than the caches, as they lie: long pieces of some rows, then of the next ones.

A register tile of a few columns reads a line or two of every row, each in a page of its own: no hardware foresees that.
Here a task has a strip of columns, whose totals stay in the first-level cache, and reads it in blocks of rows, each of
which is combined in registers before it is added: so errors of sums grow with the number of blocks and not of rows.
Where there are fewer strips than cores the rows are divided, too, and what comes of their parts is combined at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, Step
from schedules.family import work_of
from schedules.loops import (
    LINE_BITS,
    SECOND_LEVEL,
    Extent,
    ceiling,
    flatten,
    in_vectors,
    index,
    load,
    local,
    parallel,
    prefetch,
    product,
    region,
    store,
    then_wait,
    tile_choice,
    tiles,
    unflatten,
    vector,
    with_local,
)
from schedules.matmul import step
from schedules.reducer import accumulator_dtype, term_at
from schedules.reduction_structure import ReductionAnalysis
from schedules.stages import sequence, substitute
from targets.base import Target

# Rows that are combined in registers, as many streams as hardware and its translation of addresses keep up with.
ROWS = 8
# Less than a page of a longer row is no stream: a quarter of one takes twice as long. Totals of more do not stay close.
SHORTEST_STRIP, LONGEST_STRIP = 1024, 4096
# Rows of less than four vectors are better kept in registers; parts of few rows are not worth combining.
SHORTEST_ROW, SHORTEST_PART = 64, 8 * ROWS


def applies(analysis: ReductionAnalysis, target: Target) -> bool:
    """Return whether the kernel reduces long rows of one array that the second-level cache does not hold."""
    stage, columns = analysis.stage, analysis.columns
    work, reads = work_of(stage), stage.loads()
    if columns is None or analysis.reducer is None or len(analysis.reduction) != 1 or len(reads) != 1:
        return False
    rows = analysis.reduction[0].extent
    if not isinstance(work, int) or not isinstance(rows, int) or not isinstance(columns.extent, int):
        return False
    beyond = work * reads[0].source.dtype.bits // 8 > target.caches.level2
    in_rows = step(reads[0], columns) == Step.UNIT and rows >= 2 * ROWS and columns.extent >= SHORTEST_ROW
    return beyond and in_rows


def emit(analysis: ReductionAnalysis, lanes: int, target: Target) -> Stmt:
    """Return the parallel loop over the other axes, parts of the rows, and strips of columns.

    A vector statement spans a line, so that each line is asked for once.
    """
    columns = analysis.columns
    assert columns is not None
    lanes *= max(1, LINE_BITS // target.vector_bits)
    extent, rows = int(columns.extent), int(analysis.reduction[0].extent)
    share = -(-extent // (target.cores * lanes)) * lanes
    width = min(extent, max(SHORTEST_STRIP, min(LONGEST_STRIP, share)))
    tasks = product([*(group.extent for group in analysis.groups[:-1]), -(-extent // width)])
    parts = min(-(-target.cores // tasks), rows // SHORTEST_PART) if isinstance(tasks, int) else 1
    kernel = _Kernel(analysis, columns, lanes, width)
    return kernel.at_once(rows) if parts < 2 else kernel.in_parts(rows, -(-rows // parts))


@dataclass(frozen=True)
class _Kernel:
    """The reduction in strips of `width` columns."""

    analysis: ReductionAnalysis
    columns: AxisGroup
    lanes: int
    width: int

    @property
    def outer(self) -> list[Extent]:
        return [group.extent for group in self.analysis.groups[:-1]]

    @property
    def extent(self) -> int:
        return int(self.columns.extent)

    @property
    def dtype(self) -> str:
        return accumulator_dtype(self.analysis.stage)

    def at_once(self, rows: int) -> Stmt:
        """Return the loop over strips, all rows of each."""
        extents = [*self.outer, ceiling(self.extent, self.width)]

        def task(number: Expr) -> Stmt:
            *outside, strip = unflatten(number, extents)
            point = self._point(outside)

            def columns(first: Expr, count: int) -> Stmt:
                def finish(column: Expr, total: Expr) -> Stmt:
                    return self._finish(point, first + column, total)

                return self._strip(point, (first, count), (index(0), rows), finish)

            return tile_choice(strip, self.extent, self.width, columns)

        return parallel(product(extents), task)

    def in_parts(self, rows: int, height: int) -> Stmt:
        """Return the loop over strips of parts of `height` rows, and the one that combines the parts."""
        count, parts = product(self.outer), -(-rows // height)
        partial = local([count, parts, self.extent], self.dtype, "partial")
        extents = [*self.outer, parts, ceiling(self.extent, self.width)]

        def task(number: Expr) -> Stmt:
            *outside, part, strip = unflatten(number, extents)
            point, place = self._point(outside), flatten(outside, self.outer)

            def block(first_row: Expr, height: int) -> Stmt:
                def columns(first: Expr, count: int) -> Stmt:
                    def finish(column: Expr, total: Expr) -> Stmt:
                        return store(partial, total, [place, part, first + column])

                    return self._strip(point, (first, count), (first_row, height), finish)

                return tile_choice(strip, self.extent, self.width, columns)

            return tile_choice(part, rows, height, block)

        together = [*self.outer, ceiling(self.extent, SHORTEST_STRIP)]

        def combine(number: Expr) -> Stmt:
            *outside, strip = unflatten(number, together)
            point, place = self._point(outside), flatten(outside, self.outer)

            def columns(first: Expr, count: int) -> Stmt:
                def element(column: Expr) -> Stmt:
                    terms = [load(partial, [place, index(part), first + column]) for part in range(parts)]
                    return self._finish(point, first + column, functools.reduce(self._combine, terms))

                return in_vectors(self.lanes, count, element)

            return tile_choice(strip, self.extent, SHORTEST_STRIP, columns)

        phases = [then_wait(parallel(product(extents), task)), parallel(product(together), combine)]
        return with_local([partial], [region(phases)])

    def _point(self, outside: Sequence[Expr]) -> dict[Var, Expr]:
        point: dict[Var, Expr] = {}
        for group, position in zip(self.analysis.groups[:-1], outside, strict=True):
            point.update(group.point(position))
        return point

    def _combine(self, left: Expr, right: Expr) -> Expr:
        assert self.analysis.reducer is not None
        return self.analysis.reducer.combine(left, right)

    def _finish(self, point: Mapping[Var, Expr], column: Expr, total: Expr) -> Stmt:
        """Return the store of a column's total, with what the reduction starts from."""
        stage, values = self.analysis.stage, {**point, **self.columns.point(column)}
        assert stage.initial is not None
        whole = self._combine(substitute(stage.initial, values).astype(self.dtype), total)
        return self.analysis.epilogue.store(whole.astype(stage.output.dtype), values)

    def _strip(
        self,
        point: Mapping[Var, Expr],
        columns: tuple[Expr, int],
        rows: tuple[Expr, int],
        finish: Callable[[Expr, Expr], Stmt],
    ) -> Stmt:
        """Return the reduction of some columns and rows, given as first and count; `finish` takes a column's total."""
        stage, reducer, rows_group = self.analysis.stage, self.analysis.reducer, self.analysis.reduction[0]
        assert reducer is not None
        (first, count), (first_row, height) = columns, rows
        totals = local([count], self.dtype, "totals")

        def at(column: Expr, row: Expr) -> dict[Var, Expr]:
            return {**point, **self.columns.point(first + column), **rows_group.point(first_row + row)}

        def block(row: Expr, height: int) -> Stmt:
            def element(column: Expr) -> Stmt:
                terms = [term_at(stage, reducer, at(column, row + r)) for r in range(height)]
                whole = self._combine(load(totals, [column]), functools.reduce(self._combine, terms))
                return store(totals, whole, [column])

            def vector_at(base: Expr, width: int) -> Stmt:
                following = [at(base, row + (ROWS + r)) for r in range(height)]
                ahead = [prefetch(substitute(read, each), SECOND_LEVEL) for read in stage.loads() for each in following]
                return sequence([*ahead, vector(width, lambda v: element(base + v))])

            return tiles(count, [self.lanes], vector_at)

        identity = reducer.identity.astype(self.dtype)
        clear = in_vectors(self.lanes, count, lambda v: store(totals, identity, [v]))
        done = in_vectors(self.lanes, count, lambda v: finish(v, load(totals, [v])))
        return with_local([totals], [clear, tiles(height, [ROWS], block), done])
