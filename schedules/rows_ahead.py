"""Requests for the lines of the row after the one that is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, Step, group_axes, occurs
from schedules.family import work_of
from schedules.loops import LINE_BITS, ceiling, loop, prefetch
from schedules.matmul import step
from schedules.stages import Stage, bind, contains, substitute
from targets.base import Target

# Shorter rows the hardware sees coming.
FEWEST_LINES = 8


def lines_ahead(stages: Sequence[Stage], leading: int, position: Sequence[Expr], target: Target) -> list[Stmt]:
    """Return requests for the lines that the row at `position`, past the last one or not, reads, where they are far.

    The first step waits for a row's lines, the others find them in the first-level cache: meanwhile those of the next
    row can come.
    """
    outputs = [stage.output for stage in stages]
    asked: dict[Var, Stmt] = {}
    for stage in stages:
        work = work_of(stage)
        far = isinstance(work, int) and work * stage.output.dtype.bits // 8 > target.caches.level2 // 2
        point = bind(stage.indices[:leading], position)
        groups = group_axes([axis for axis in stage.axes if axis.variable not in point], [stage])
        if not far or len(groups) != 1:
            continue
        for read in stage.loads():
            place = read.indices
            own = all(any(occurs(each, variable) for each in place) for variable in point)
            if own and read.source not in asked and not contains(outputs, read.source):
                line = LINE_BITS // read.source.dtype.bits
                count = ceiling(groups[0].extent, line)
                if step(read, groups[0]) == Step.UNIT and isinstance(count, int) and count >= FEWEST_LINES:
                    asked[read.source] = _lines(read, point, groups[0], count, line)
    return list(asked.values())


def _lines(read: TensorLoad, point: Mapping[Var, Expr], group: AxisGroup, count: int, elements: int) -> Stmt:
    """Return requests for `count` lines of so many elements each, along the only group of a row's axes."""
    return loop(count, lambda i: prefetch(substitute(read, {**point, **group.point(i * elements)})))
