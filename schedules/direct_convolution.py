"""Convolutions and poolings over blocked channels, read where they lie: no copy, no padding, one pass over the output.

A register tile is some blocks of output channels by neighbouring columns of one row of the image, one vector register
for each of them: a step of the reduction loads one vector of weights a block and one element of the image a column.
Taps above and below the image are left out by the bounds of their loop; those beside it by tiles of their own at the
borders, in which each tap of the last axis is unrolled over just the columns it reaches. What follows the reduction is
computed on the tile. (Georganas et al., Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures,
SC 2018.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, as_int, occurs
from schedules.by_element import multiplies_by_element
from schedules.channel_windows import ChannelWindows, channel_windows
from schedules.convolution import split_producer
from schedules.convolution_tile import (
    asks_ahead,
    column_extent,
    follows_positions,
    parts_rows_of_taps,
    register_tile,
    task_shape,
    tiles_together,
)
from schedules.direct_convolution_tile import Point, RegisterTile
from schedules.division import Division
from schedules.epilogue import overwritable
from schedules.family import Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.byte_dot import WORD
from schedules.intrin.byte_rounding import rounded_in_floats
from schedules.intrin.grouped_call import GroupedDot
from schedules.intrin.grouped_dot import grouped_dot
from schedules.intrin.load_fence import with_fences
from schedules.loops import (
    Extent,
    ceiling,
    index,
    loop,
    parallel,
    product,
    tile_choice,
    tiles,
    unflatten,
)
from schedules.matmul import branches_on_any, split_epilogue
from schedules.reducer import reducer_of
from schedules.stages import Stage, sequence
from targets.base import Target

# Steps of the reduction before the one that reads a line of weights, on cores that go through one every few cycles:
# ResNet-50's 1x1 layers in fp32 took 1 to 14 % less with requests but for one, 2 % more (Granite Rapids).
STEPS_AHEAD = 16


class DirectConvolution:
    """Register tiles of blocks of channels by columns of an image."""

    name = "direct-convolution"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ChannelWindows | None:
        """Return the analysis of a sliding reduction over blocked channels of the target's width."""
        analysis = analyse(kernel)
        if analysis is None or branches_on_any(analysis.stage):
            return None
        if str(analysis.data.source.dtype) == WORD:
            value = rounded_in_floats(analysis.epilogue.value)
            analysis = replace(analysis, epilogue=replace(analysis.epilogue, value=value))
        dtype = analysis.stage.output.dtype
        # Bytes lie in blocks of as many channels as what convolutions make of them.
        bits = 32 if str(dtype) in ("int8", "uint8") else max(8, min(32, dtype.bits))
        # Where convolutions read tiles of matrices, blocks are of several vectors.
        layouts = target.layouts
        blocks = (target.vector_lanes(bits), layouts.rounded_block, layouts.byte_block)
        return analysis if analysis.block in blocks else None

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
        dot = _dot(analysis, target)
        statement = emitter(analysis, parameters, target, dot).statement()
        if dot is not None:
            statement = dot.imported(statement)
        return with_fences(statement, target) if dot is not None or parts_rows_of_taps(analysis, target) else statement

    def overwritable(self, analysis: ChannelWindows) -> tuple[Var, ...]:
        """Return what is read only where a result of the same type is written next, which may have its memory."""
        return overwritable(analysis.epilogue)


def _dot(analysis: ChannelWindows, target: Target) -> GroupedDot | None:
    reducer = reducer_of(analysis.stage) if analysis.grouped is not None else None
    return None if reducer is None else grouped_dot(target, analysis.weights, reducer.term)


def emitter(analysis: ChannelWindows, parameters: Parameters, target: Target, dot: GroupedDot | None = None) -> Emitter:
    """Return what emits a convolution's or a pooling's tiles for a target."""
    ahead = STEPS_AHEAD if asks_ahead(analysis, target) else 0
    together = tiles_together(analysis, target, parameters["blocks"])
    by_position = follows_positions(analysis, target)
    by_rows = parts_rows_of_taps(analysis, target)
    return Emitter(analysis, parameters, dot, multiplies_by_element(target), ahead, together, by_position, by_rows)


@functools.lru_cache(maxsize=1024)
def analyse(kernel: Kernel) -> ChannelWindows | None:
    """Return the analysis of a kernel of one sliding reduction over blocked channels, for any target."""
    producer, rest = split_producer(kernel)
    stage, follows = split_epilogue(rest)
    if stage is None or follows is None:
        return None
    windows = channel_windows(producer, stage, follows)
    return None if windows is None else replace(windows, division=kernel.division)


@dataclass(frozen=True)
class Emitter:
    """Emission of one convolution or pooling under given parameters."""

    analysis: ChannelWindows
    parameters: Parameters
    dot: GroupedDot | None
    by_element: bool
    ahead: int
    together: int = 1
    by_position: bool = False
    rows_apart: bool = False

    @cached_property
    def stage(self) -> Stage:
        return self.analysis.stage

    def statement(self) -> Stmt:
        """Return the parallel loop over outer axes, groups, tiles of channels, rows and segments of columns."""
        analysis = self.analysis
        groups, tiles_per_group = self._channel_tiles()
        batch, row_count = self._rows_and_batch()
        rows = self.parameters["rows"]
        width = column_extent(analysis)
        segment = width
        if self.analysis.column_window is None:
            segment = min(width, self.parameters["column_tiles"] * self.parameters["columns"])
        images = [axes for axes in batch if not self._is_of_channels(axes)]
        channels_apart = [axes for axes in batch if self._is_of_channels(axes)]
        of_image = [ceiling(row_count, rows), -(-width // segment)]
        of_channels = [*(axes.extent for axes in channels_apart), groups, tiles_per_group]
        by_image, together = analysis.division is Division.IMAGE, self.together
        of_groups = [*of_channels[:-1], tiles_per_group // together]
        order = [*of_image, *of_channels] if by_image else [*of_groups, *of_image, together]
        extents = [*(axes.extent for axes in images), *order]

        def task(number: Expr) -> Stmt:
            position = unflatten(number, extents)
            outside, inside = position[: len(images)], position[len(images) :]
            if by_image:
                inside = [*inside[2:], *inside[:2]]
            else:
                *before, some, row_block, part, tile = inside
                inside = [*before, some * together + tile, row_block, part]
            *channel_position, group, tile, row_block, part = inside
            point: dict[Var, Expr] = {}
            for axes, place in zip([*images, *channels_apart], [*outside, *channel_position], strict=True):
                point.update(axes.point(place))

            def columns(point: Point, first: Expr, count: int) -> Stmt:
                if segment == width:
                    return self.row(point, group, first, count)
                return tile_choice(part, width, segment, lambda x, n: self._segment(point, group, first, count, x, n))

            def channels(first: Expr, count: int) -> Stmt:
                return self._each_row(row_block, row_count, lambda at: columns({**point, **at}, first, count))

            if analysis.channel is None:
                return channels(index(0), 1)
            return tile_choice(tile, analysis.per_group, self.parameters["blocks"], channels)

        return parallel(product(extents), task, is_large(work_of(self.stage)))

    def _is_of_channels(self, axes: AxisGroup) -> bool:
        """Return whether axes are those of blocks of channels, each with an image of its own."""
        is_one_image = len(axes.axes) == 1 or as_int(self.stage.output.shape[0]) == 1
        return is_one_image and any(occurs(self.stage.indices[1], axis.variable) for axis in axes.axes)

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

    def row(self, point: Point, group: Expr, first: Expr, count: int) -> Stmt:
        """Return the tiles of a whole row; those in which every tap is inside the image become one loop."""
        window, size = self.analysis.column_window, self.parameters["columns"]
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
        return RegisterTile(
            self.analysis,
            self.dot,
            self.by_element,
            point,
            group,
            first,
            count,
            start,
            columns,
            border,
            self.ahead,
            self.by_position,
            self.rows_apart,
        ).statement()
