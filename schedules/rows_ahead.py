"""Requests for lines that rows read or write later: those of the next rows, and those of a row's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, Step, group_axes, occurs
from schedules.family import work_of
from schedules.loops import LINE_BITS, ceiling, load, prefetch
from schedules.matmul import step
from schedules.reducer import Requests
from schedules.stages import Stage, bind, contains, substitute
from schedules.streaming import LAST_CACHE_BYTES
from targets.base import Target

# Shorter rows the hardware sees coming.
FEWEST_LINES = 8


def lines_ahead(
    stages: Sequence[Stage], leading: int, positions: Sequence[Sequence[Expr]], target: Target
) -> Requests | None:
    """Return requests for the lines that the rows at `positions`, past the last one or not, read, where they are far.

    The first step waits for a row's lines, the others find them in a cache of the core's own: meanwhile those of the
    next rows can come, a few with each vector, since a core has only so many on their way at once.
    """
    outputs = [stage.output for stage in stages]
    asked: dict[Var, list[tuple[TensorLoad, Mapping[Var, Expr], AxisGroup]]] = {}
    for stage in stages:
        work = work_of(stage)
        far = isinstance(work, int) and work * stage.output.dtype.bits // 8 > target.caches.level2 // 2
        points = [bind(stage.indices[:leading], position) for position in positions]
        groups = group_axes([axis for axis in stage.axes if axis.variable not in points[0]], [stage])
        if not far or len(groups) != 1:
            continue
        for read in stage.loads():
            place = read.indices
            own = all(any(occurs(each, variable) for each in place) for variable in points[0])
            if own and read.source not in asked and not contains(outputs, read.source):
                count = ceiling(groups[0].extent, LINE_BITS // read.source.dtype.bits)
                if step(read, groups[0]) == Step.UNIT and isinstance(count, int) and count >= FEWEST_LINES:
                    asked[read.source] = [(read, point, groups[0]) for point in points]
    if not asked:
        return None

    def requests(base: Expr, width: int) -> list[Stmt]:
        return [
            prefetch(substitute(read, {**point, **group.point(base + offset)}), _level(read, group, target))
            for reads in asked.values()
            for read, point, group in reads
            for offset in range(0, width, LINE_BITS // read.source.dtype.bits)
        ]

    return requests


def lines_to_write(
    stages: Sequence[Stage], private: Sequence[Var], leading: int, position: Sequence[Expr], target: Target
) -> Requests | None:
    """Return requests for the lines that the row at `position` writes, where they are far and no store goes past them.

    A store to a line that is elsewhere waits for it: what computes before, such as exponentials, leaves the time.
    """
    asked: list[tuple[TensorLoad, AxisGroup, Mapping[Var, Expr]]] = []
    for stage in stages:
        work = work_of(stage)
        size = work * stage.output.dtype.bits // 8 if isinstance(work, int) else 0
        if stage.is_reduction or contains(private, stage.output):
            continue
        point = bind(stage.indices[:leading], position)
        groups = group_axes([axis for axis in stage.spatial if axis.variable not in point], [stage])
        written = load(stage.output, list(stage.indices))
        is_far = target.caches.level2 // 2 < size < LAST_CACHE_BYTES
        if is_far and len(groups) == 1 and step(written, groups[0]) == Step.UNIT:
            asked.append((written, groups[0], point))
    if not asked:
        return None

    def requests(base: Expr, width: int) -> list[Stmt]:
        return [
            prefetch(substitute(written, {**point, **group.point(base + offset)}))
            for written, group, point in asked
            for offset in range(0, width, LINE_BITS // written.source.dtype.bits)
        ]

    return requests


def _level(access: TensorLoad, group: AxisGroup, target: Target) -> int:
    """Return the level of the cache that a next row is asked for into: the first one where that has room for two."""
    row = group.extent * (access.source.dtype.bits // 8) if isinstance(group.extent, int) else 0
    return 1 if 2 * row <= target.caches.level1 else 2
