"""Reductions of one operand: sums, extrema, products, means, argument extrema's parts, along any axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules import column_strips, tiling
from schedules.access import AxisGroup, Step, group_axes
from schedules.elementwise import overlapping_tiles
from schedules.family import Choice, Kernel, Parameters, Space, is_large, vector_width, work_of
from schedules.loops import load, local, nest, parallel, product, store, unflatten, vector, with_local
from schedules.matmul import follows_as_stage, split_epilogue, step, walks_in_lanes
from schedules.reducer import (
    REGISTERS,
    Beside,
    Reducer,
    Requests,
    accumulate,
    accumulator_dtype,
    reduce_contiguous,
    reducer_of,
)
from schedules.reduction_structure import ReductionAnalysis
from schedules.stages import Stage, substitute
from targets.base import Target


class Reduction:
    """Lanes along a contiguous axis: the output's where there is one, else the reduced one."""

    name = "reduction"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ReductionAnalysis | None:
        """Return the analysis of any reduction, with what follows it where that corresponds one to one."""
        stage, follows = split_epilogue(kernel)
        if stage is None or follows is None:
            return None
        groups = tuple(group_axes(stage.spatial, [stage, follows_as_stage(follows)]))
        reduction = tuple(group_axes(stage.reduction, [stage]))
        reducer = reducer_of(stage)
        along = None
        if reducer is not None and walks_in_lanes(stage, reduction[-1]):
            along = reduction[-1]
        columns = groups[-1] if groups and walks_in_lanes(stage, groups[-1]) else None
        if columns is not None and along is not None:
            columns = None if prefer_reduced(stage, columns, along) else columns
        return ReductionAnalysis(stage, follows, groups, reduction, reducer, columns, along)

    def space(self, target: Target, analysis: ReductionAnalysis) -> Space:
        """Return the vectors side by side and the rows of a tile."""
        return (Choice("vectors", 4, (1, 2, 4, 8)), Choice("rows", 1, (1, 2, 4)))

    def apply(self, analysis: ReductionAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        stage = analysis.stage
        lanes = vector_width(target, stage)
        large = is_large(work_of(stage))
        if analysis.columns is None:
            return _rows(analysis, lanes, large)
        if column_strips.applies(analysis, target):
            return column_strips.emit(analysis, lanes, target)
        extent = analysis.columns.extent
        width = lanes * parameters["vectors"]
        if isinstance(extent, int):
            width = min(width, -(-extent // lanes) * lanes)
        outer = analysis.groups[:-1]
        rows = outer[-1] if outer and parameters["rows"] > 1 else None
        return tiling.emit(
            tiling.Tile(
                stage=stage,
                epilogue=analysis.epilogue,
                outer=outer[:-1] if rows is not None else outer,
                vector_group=analysis.columns,
                row_group=rows,
                reduction=analysis.reduction,
                width=width,
                lanes=lanes,
                rows=parameters["rows"],
                row_block=parameters["rows"],
                panel=None,
                parallel=large,
            )
        )


def prefer_reduced(stage: Stage, columns: AxisGroup, along: AxisGroup) -> bool:
    """Return whether lanes along the reduced axis serve better: more reads are contiguous there."""
    by_column = sum(step(load, columns) == Step.UNIT for load in stage.loads())
    by_reduced = sum(step(load, along) == Step.UNIT for load in stage.loads())
    return by_reduced > by_column


def _rows(analysis: ReductionAnalysis, lanes: int, large: bool) -> Stmt:
    extents = [group.extent for group in analysis.groups]

    def task(number: Expr) -> Stmt:
        point: dict[Var, Expr] = {}
        for group, position in zip(analysis.groups, unflatten(number, extents) if extents else [], strict=True):
            point.update(group.point(position))

        def finish(total: Expr) -> Stmt:
            return analysis.epilogue.store(total, point)

        return reduce_element(
            analysis.stage, analysis.reduction, analysis.reducer, analysis.along, lanes, point, finish
        )

    return parallel(product(extents), task, large) if extents else task(tirx.const(0, "int64"))


def reduce_element(
    stage: Stage,
    reduction: tuple[AxisGroup, ...],
    reducer: Reducer | None,
    along: AxisGroup | None,
    lanes: int,
    point: Mapping[Var, Expr],
    finish: Callable[[Expr], Stmt],
    before: Callable[[Mapping[Var, Expr]], Stmt] | None = None,
    beside: Beside | None = None,
    ahead: Requests | None = None,
    registers: int = REGISTERS,
) -> Stmt:
    """Return code that computes one element of a reduction at `point` of its spatial axes.

    `before` is done at each point ahead of its term, where the reduction runs in lanes (`along`), and `beside` is
    another reduction in the same walk, where it has no other axes, and `ahead` requests for lines on the way; so many
    `registers` of lanes are walked at once.
    """
    if along is None or reducer is None:
        return _serial_element(stage, reduction, point, finish)
    others = [group for group in reduction if group is not along]

    def outer(body: Callable[[Mapping[Var, Expr]], Stmt]) -> Stmt:
        def inside(positions: list[Expr]) -> Stmt:
            values = dict(point)
            for group, position in zip(others, positions, strict=True):
                values.update(group.point(position))
            return body(values)

        return nest([group.extent for group in others], inside)

    return reduce_contiguous(
        stage, reducer, along.extent, lanes, outer, along.point, finish, before, beside, ahead, registers
    )


def _serial_element(
    stage: Stage, reduction: tuple[AxisGroup, ...], point: Mapping[Var, Expr], finish: Callable[[Expr], Stmt]
) -> Stmt:
    dtype = accumulator_dtype(stage)
    total, zero = local([1], dtype, "total"), tirx.const(0, "int64")
    assert stage.initial is not None

    def step_at(positions: list[Expr]) -> Stmt:
        values = dict(point)
        for group, position in zip(reduction, positions, strict=True):
            values.update(group.point(position))
        return store(total, accumulate(stage, load(total, [zero]), values), [zero])

    return with_local(
        [total],
        [
            store(total, substitute(stage.initial, point).astype(dtype), [zero]),
            nest([group.extent for group in reduction], step_at),
            finish(load(total, [zero]).astype(stage.output.dtype)),
        ],
    )


def reduce_columns(
    stage: Stage,
    reduction: Sequence[AxisGroup],
    groups: Sequence[AxisGroup],
    point: Mapping[Var, Expr],
    lanes: int,
) -> Stmt:
    """Return code that reduces neighbouring elements of a row, of axes `groups`, side by side in lanes."""
    dtype, initial = accumulator_dtype(stage), stage.initial
    assert initial is not None
    *outer, columns = groups

    def tile(outside: Sequence[Expr], start: Expr, width: int) -> Stmt:
        totals = local([width], dtype, "totals")

        def each(element: Callable[[Expr, Mapping[Var, Expr]], Stmt]) -> Stmt:
            def at(v: Expr) -> Stmt:
                positions = zip(groups, [*outside, start + v], strict=True)
                own = [group.point(position) for group, position in positions]
                return element(v, {**point, **{axis: value for values in own for axis, value in values.items()}})

            return vector(width, at)

        def step_at(positions: list[Expr]) -> Stmt:
            reached = {axis: value for group, position in zip(reduction, positions, strict=True)
                       for axis, value in group.point(position).items()}  # fmt: skip
            return each(
                lambda v, values: store(totals, accumulate(stage, load(totals, [v]), {**values, **reached}), [v])
            )

        def finish(v: Expr, values: Mapping[Var, Expr]) -> Stmt:
            return store(stage.output, load(totals, [v]).astype(stage.output.dtype), stage.at(values)[0])

        start_at = each(lambda v, values: store(totals, substitute(initial, values).astype(dtype), [v]))
        steps = nest([group.extent for group in reduction], step_at)
        return with_local([totals], [start_at, steps, each(finish)])

    return nest(
        [group.extent for group in outer],
        lambda outside: overlapping_tiles(columns.extent, lanes, lambda start, width: tile(outside, start, width)),
    )
