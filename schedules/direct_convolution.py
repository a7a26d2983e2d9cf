"""Convolutions and poolings over blocked channels, read where they lie: no copy, no padding, one pass over the output.

A register tile is some blocks of output channels by neighbouring columns of one row of the image, one vector register
for each of them: a step of the reduction loads one vector of weights a block and one element of the image a column.
Taps above and below the image are left out by the bounds of their loop; those beside it by tiles of their own at the
borders, in which each tap of the last axis is unrolled over just the columns it reaches. What follows the reduction is
computed on the tile. (Georganas et al., Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures,
SC 2018.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, occurs
from schedules.channel_windows import ChannelWindow, ChannelWindows, channel_windows
from schedules.convolution import split_producer
from schedules.convolution_tile import column_extent, register_tile, task_shape
from schedules.family import Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.bf16_dot import PAIR, Bf16Dot, bf16_dot
from schedules.loops import (
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    quotient,
    store,
    tile_choice,
    tiles,
    unflatten,
    unrolled,
    vector,
    with_local,
)
from schedules.matmul import branches_on_any, split_epilogue
from schedules.reducer import accumulate, accumulator_dtype
from schedules.stages import Axis, Stage, replace_loads, sequence, substitute, with_value
from targets.base import Target

Point = Mapping[Var, Expr]


class DirectConvolution:
    """Register tiles of blocks of channels by columns of an image."""

    name = "direct-convolution"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ChannelWindows | None:
        """Return the analysis of a sliding reduction over blocked channels of the target's width."""
        analysis = analyse(kernel)
        if analysis is None or branches_on_any(analysis.stage):
            return None
        lanes = target.vector_lanes(max(8, min(32, analysis.stage.output.dtype.bits)))
        return analysis if analysis.lane.extent == lanes else None

    def space(self, target: Target, analysis: ChannelWindows) -> Space:
        """Return the register tile, and the rows and tiles of columns that make one task."""
        blocks, columns = register_tile(analysis, target)
        rows, column_tiles = task_shape(analysis, target, blocks, columns)
        return (
            Choice("blocks", blocks, (1, 2, 3, 4, 6)),
            Choice("columns", columns, (1, 4, 6, 7, 9, 14, 28)),
            Choice("rows", rows, (1, 2, 4, 8, 16)),
            Choice("column_tiles", column_tiles, (1, 2, 4, 8, 16)),
        )

    def apply(self, analysis: ChannelWindows, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        dot = bf16_dot(target) if analysis.pairs is not None else None
        statement = _Emitter(analysis, parameters, dot).statement()
        return statement if dot is None else dot.imported(statement)


def analyse(kernel: Kernel) -> ChannelWindows | None:
    """Return the analysis of a kernel of one sliding reduction over blocked channels, for any target."""
    producer, rest = split_producer(kernel)
    stage, follows = split_epilogue(rest)
    if stage is None or follows is None:
        return None
    return channel_windows(producer, stage, follows)


@dataclass(frozen=True)
class _Emitter:
    """Emission of one convolution or pooling under given parameters."""

    analysis: ChannelWindows
    parameters: Parameters
    dot: Bf16Dot | None

    @cached_property
    def stage(self) -> Stage:
        return self.analysis.stage

    @property
    def block(self) -> int:
        """The number of lanes."""
        assert isinstance(self.analysis.lane.extent, int)
        return self.analysis.lane.extent

    @property
    def column_window(self) -> ChannelWindow | None:
        """The window of the columns whose taps may miss the image."""
        columns = self.analysis.columns
        if columns is None:
            return None
        return next((w for w in self.analysis.padded if any(w.axis is axis for axis in columns.axes)), None)

    def statement(self) -> Stmt:
        """Return the parallel loop over outer axes, groups, tiles of channels, rows and segments of columns."""
        analysis = self.analysis
        groups, tiles_per_group = self._channel_tiles()
        batch, row_count = self._rows_and_batch()
        rows = self.parameters["rows"]
        width = column_extent(analysis)
        segment = width
        if self.column_window is None:
            segment = min(width, self.parameters["column_tiles"] * self.parameters["columns"])
        extents = [*(g.extent for g in batch), groups, tiles_per_group, ceiling(row_count, rows), -(-width // segment)]

        def task(number: Expr) -> Stmt:
            *outside, group, tile, row_block, part = unflatten(number, extents)
            point: dict[Var, Expr] = {}
            for axes, position in zip(batch, outside, strict=True):
                point.update(axes.point(position))

            def columns(point: Point, first: Expr, count: int) -> Stmt:
                if segment == width:
                    return self._row(point, group, first, count)
                return tile_choice(part, width, segment, lambda x, n: self._segment(point, group, first, count, x, n))

            def channels(first: Expr, count: int) -> Stmt:
                return self._each_row(row_block, row_count, lambda at: columns({**point, **at}, first, count))

            if analysis.channel is None:
                return channels(index(0), 1)
            return tile_choice(tile, analysis.per_group, self.parameters["blocks"], channels)

        return parallel(product(extents), task, is_large(work_of(self.stage)))

    def _channel_tiles(self) -> tuple[int, int]:
        channel, per_group = self.analysis.channel, self.analysis.per_group
        if channel is None:
            return 1, 1
        assert isinstance(channel.extent, int)
        return channel.extent // per_group, -(-per_group // self.parameters["blocks"])

    def _rows_and_batch(self) -> tuple[tuple[AxisGroup, ...], Extent]:
        outer = self.analysis.outer
        return outer[:-1], outer[-1].extent if outer else 1

    def _each_row(self, number: Expr, count: Extent, body: Callable[[Point], Stmt]) -> Stmt:
        """Return the loop over the rows of block `number`."""
        if not self.analysis.outer:
            return body({})
        group, rows = self.analysis.outer[-1], self.parameters["rows"]
        start = number * rows
        steps: Extent = rows
        if not isinstance(count, int) or count % rows:
            steps = tirx.min(index(rows), index(count) - start)
        if rows == 1:
            return body(group.point(start))
        return loop(steps, lambda i: body(group.point(start + i)))

    def _segment(self, point: Point, group: Expr, first: Expr, count: int, start: Expr, width: int) -> Stmt:
        """Return tiles of columns none of which touches the border."""
        sizes = [self.parameters["columns"]]
        return tiles(width, sizes, lambda x, columns: self._tile(point, group, first, count, start + x, columns))

    def _row(self, point: Point, group: Expr, first: Expr, count: int) -> Stmt:
        """Return the tiles of a whole row; those in which every tap is inside the image become one loop."""
        window, size = self.column_window, self.parameters["columns"]
        width = column_extent(self.analysis)
        if window is None:
            return self._segment(point, group, first, count, index(0), width)
        spans = [(start, min(size, width - start)) for start in range(0, width, size)]
        taps = range(int(window.tap.extent))

        def kind(span: tuple[int, int]) -> tuple[bool, int]:
            columns = range(span[0], span[0] + span[1])
            return all(window.reads_inside(x, tap) for x in columns for tap in taps), span[1]

        statements: list[Stmt] = []
        for (inside, columns), run in itertools.groupby(spans, kind):
            starts = [start for start, _ in run]
            if inside:
                begin = starts[0]
                statements.append(
                    loop(
                        len(starts),
                        lambda i, b=begin, c=columns: self._tile(point, group, first, count, index(b) + i * size, c),
                    )
                )
            else:
                statements.extend(
                    self._tile(point, group, first, count, index(start), columns, start) for start in starts
                )
        return sequence(statements)

    def _tile(
        self, point: Point, group: Expr, first: Expr, count: int, start: Expr, columns: int, border: int | None = None
    ) -> Stmt:
        """Return `count` blocks of channels by `columns` at `start` (`border`: the same where taps may miss)."""
        return _Tile(self, point, group, first, count, start, columns, border).statement()


@dataclass(frozen=True)
class _Tile:
    """One register tile: `blocks` from block `first` of group `group` by `columns` from `start`."""

    emitter: _Emitter
    point: Point
    group: Expr
    first: Expr
    blocks: int
    start: Expr
    columns: int
    border: int | None

    @cached_property
    def analysis(self) -> ChannelWindows:
        return self.emitter.analysis

    @cached_property
    def dtype(self) -> str:
        return accumulator_dtype(self.analysis.stage)

    @cached_property
    def registers(self) -> Var:
        return local([self.blocks * self.columns * self.emitter.block], self.dtype, "accumulators")

    @cached_property
    def stage(self) -> Stage:
        """The stage, with the data of the tile's group read as one: their channel does not vary within the tile."""
        channel, data, stage = self.analysis.channel, self.analysis.data, self.analysis.stage
        if channel is None or not any(occurs(position, channel.variable) for position in data.indices):
            return stage
        own = substitute(data, {channel.variable: self.group * self.analysis.per_group})
        return with_value(stage, replace_loads(stage.value, lambda read: own if read.same_as(data) else None))

    def statement(self) -> Stmt:
        """Return initialization, reduction and epilogue."""
        stage = self.analysis.stage
        assert stage.initial is not None

        def start(at: Point, register: Expr) -> Stmt:
            return store(self.registers, substitute(stage.initial, at).astype(self.dtype), [register])

        def finish(at: Point, register: Expr) -> Stmt:
            total = load(self.registers, [register]).astype(stage.output.dtype)
            return self.analysis.epilogue.store(total, at)

        everywhere = (0, self.columns)
        return with_local(
            [self.registers],
            [self._cells(everywhere, start), self._reduction(), self._cells(everywhere, finish)],
        )

    def _cells(self, columns: tuple[int, int], element: Callable[[Point, Expr], Stmt]) -> Stmt:
        """Return `element` for columns [begin, end) and all blocks, each one vector."""
        begin, end = columns

        def cell(j: Expr, o: Expr) -> Stmt:
            return vector(self.emitter.block, lambda v: element(*self._cell(j + begin, o, v)))

        return unrolled(end - begin, lambda j: unrolled(self.blocks, lambda o: cell(j, o)))

    def _cell(self, column: Expr, block: Expr, lane: Expr) -> tuple[Point, Expr]:
        """Return where a lane of a column and a block of the tile is in the output, and among the registers."""
        at = {**self.point, self.analysis.lane.variable: lane}
        if self.analysis.columns is not None:
            at.update(self.analysis.columns.point(self.start + column))
        if self.analysis.channel is not None:
            at[self.analysis.channel.variable] = self.group * self.analysis.per_group + self.first + block
        return at, (block * self.columns + column) * self.emitter.block + lane

    def _reduction(self) -> Stmt:
        depth = self.analysis.depth
        axes = [axis for axis in self.stage.reduction if axis is not depth]
        everywhere = (0, self.columns)
        if depth is None:
            return self._steps(axes, {}, everywhere, None)
        assert isinstance(depth.extent, int)
        block = self.emitter.block
        whole, rest = divmod(depth.extent, block)
        parts = []
        if whole:
            parts.append(loop(whole, lambda i: self._steps(axes, {}, everywhere, (i * block, block))))
        if rest:
            parts.append(self._steps(axes, {}, everywhere, (index(whole * block), rest)))
        return sequence(parts)

    def _steps(
        self, axes: list[Axis], values: Point, columns: tuple[int, int], channels: tuple[Expr, int] | None
    ) -> Stmt:
        """Return the loops over `axes`, and innermost over the `channels` [begin, count) of a block of the data."""
        if not axes:
            if channels is None:
                return self._step(values, columns)
            depth = self.analysis.depth
            assert depth is not None
            begin, count = channels
            terms = self._terms(depth)
            return loop(count // terms, lambda i: self._step({**values, depth.variable: begin + i * terms}, columns))
        axis, *rest = axes

        def inside(position: Expr, reached: tuple[int, int] = columns) -> Stmt:
            return self._steps(rest, {**values, axis.variable: position}, reached, channels)

        window = next((window for window in self.analysis.padded if window.tap is axis), None)
        if window is None:
            return self._plain_loop(axis, inside)
        if window is self.emitter.column_window:
            return self._plain_loop(axis, inside) if self.border is None else self._border(window, inside)
        position = index(0) if window.axis is None else self.point[window.axis.variable]
        first, count = window.taps_inside(position)
        return loop(count, lambda i: inside(first + i))

    def _plain_loop(self, axis: Axis, body: Callable[[Expr], Stmt]) -> Stmt:
        innermost = axis is self.stage.reduction[-1]
        by_lane = any(occurs(position, self.analysis.lane.variable) for position in self.analysis.data.indices)
        if by_lane and innermost and isinstance(axis.extent, int):
            # Lane by lane, neighbouring taps read the same vectors.
            return unrolled(axis.extent, body)
        terms = self._terms(axis)
        return loop(quotient(axis.extent, terms), lambda i: body(i * terms))

    def _terms(self, axis: Axis) -> int:
        """Return how many positions of an axis one step of the reduction takes."""
        return PAIR if self.emitter.dot is not None and axis is self.analysis.pairs else 1

    def _border(self, window: ChannelWindow, body: Callable[[Expr, tuple[int, int]], Stmt]) -> Stmt:
        """Return the taps of a tile at the border, those that reach the same columns of the image as one loop."""

        def reached(tap: int) -> tuple[int, int]:
            assert self.border is not None
            inside = [j for j in range(self.columns) if window.reads_inside(self.border + j, tap)]
            return (inside[0], inside[-1] + 1) if inside else (0, 0)

        statements = []
        for columns, run in itertools.groupby(range(int(window.tap.extent)), reached):
            taps = list(run)
            if columns[0] < columns[1]:
                statements.append(loop(len(taps), lambda i, b=taps[0], c=columns: body(i + b, c)))
        return sequence(statements) if statements else tirx.Evaluate(0)

    def _step(self, values: Point, columns: tuple[int, int]) -> Stmt:
        if self.emitter.dot is not None:
            return self._step_of_pairs(self.emitter.dot, values, columns)

        def update(at: Point, register: Expr) -> Stmt:
            value = accumulate(self.stage, load(self.registers, [register]), {**at, **values})
            return store(self.registers, value, [register])

        return self._cells(columns, update)

    def _step_of_pairs(self, dot: Bf16Dot, values: Point, columns: tuple[int, int]) -> Stmt:
        """Return the step that adds two terms of the reduction to each sum."""
        weights = self.analysis.weights
        data = next(read for read in self.stage.loads() if not read.same_as(weights))

        def update(at: Point, register: Expr) -> Stmt:
            place = [tirx.Ramp(register, index(1), dot.lanes)]
            operands = [substitute(read, {**at, **values}) for read in (weights, data)]
            return store(self.registers, dot.accumulate(load(self.registers, place), *operands), place)

        begin, end = columns
        return unrolled(
            end - begin, lambda j: unrolled(self.blocks, lambda o: update(*self._cell(j + begin, o, index(0))))
        )
