"""Depthwise convolutions of bytes over blocked channels, by dot products of four taps of a row.

A register tile is some rows by some columns of a channel block's image. Four neighbouring columns of it, turned so that
each lane has its own four bytes side by side, serve every output whose window of a row they hold, by weights moved to
its first column, in every row of the tile: with 3 x 3 taps in four rows, 48 dot products to 12 shuffles. Rows outside
of the image are read from a row of zeros, so that they need no code of their own; columns are left out by the shuffles
of tiles at the border. What follows the reduction is computed on the tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int, linear_coefficient
from schedules.channel_windows import ChannelWindow, ChannelWindows, windows_of
from schedules.convolution_tile import column_extent, task_shape
from schedules.direct_convolution import DirectConvolution
from schedules.direct_convolution_tile import Point, RegisterTile
from schedules.division import Division
from schedules.epilogue import KeptRead, keep_reads
from schedules.family import Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.byte_dot import FOUR, activation_types, is_product_of_bytes, splits_operands
from schedules.intrin.byte_windows import WindowDot
from schedules.loops import (
    ceiling,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    store,
    tile_choice,
    tiles,
    unflatten,
    vector,
    with_local,
)
from schedules.reducer import reducer_of
from schedules.stages import sequence, substitute
from targets.base import Target

# Outputs that share a shuffle's columns. More would need weights from more first columns than there are registers for.
SHARING = 2
# Rows and columns of the register tile: four columns are rounded to bytes together, and of 32 registers half are left
# for weights, columns and what follows.
TILE_ROWS, TILE_COLUMNS = 4, 4


@dataclass(frozen=True, eq=False)
class ByteWindows:
    """A depthwise convolution of bytes, the windows of its rows and columns, and what multiplies them."""

    windows: ChannelWindows
    rows: ChannelWindow
    columns: ChannelWindow
    dot: WindowDot


class DepthwiseBytes:
    """Register tiles of rows by columns of an image."""

    name = "depthwise-bytes"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ByteWindows | None:
        """Return the analysis of a depthwise convolution of images of bytes with int8 weights."""
        windows = DirectConvolution().takes(kernel, target)
        if windows is None or windows.channel is not None or splits_operands(target):
            return None
        reducer = reducer_of(windows.stage)
        if reducer is None or not isinstance(windows.stage.value, tirx.Add) or not is_product_of_bytes(reducer.term):
            return None
        data, weights = windows.data, windows.weights
        types = str(data.source.dtype) in activation_types(target), str(weights.source.dtype) == "int8"
        sliding = windows_of(windows.stage, data)
        if not all(types) or sliding is None or len(sliding) != len(windows.stage.reduction) or len(sliding) != 2:
            return None
        rows, columns = sliding
        lies_so = columns.dilation == 1 and _is_row(data, columns, windows) and _is_row(weights, columns, windows)
        outer = windows.outer[-1].axes if windows.outer else ()
        inner = windows.columns.axes if windows.columns is not None else ()
        if not lies_so or outer != (rows.axis,) or inner != (columns.axis,) or not windows.outer[-1].static:
            return None
        return ByteWindows(windows, rows, columns, WindowDot(windows.block, str(data.source.dtype), target))

    def space(self, target: Target, analysis: ByteWindows) -> Space:
        """Return the rows of a task, and the rows and columns of the register tile."""
        columns = min(TILE_COLUMNS, column_extent(analysis.windows))
        rows, _ = task_shape(analysis.windows, target, 1, columns)
        return (
            Choice("rows", rows, (1, 2, 4, 7, 8, 14, 16)),
            Choice("tile_rows", -(-rows // -(-rows // TILE_ROWS)), (1, 2, 3, 4, 5, 7)),
            Choice("columns", columns, (2, 4, 8)),
        )

    def apply(self, analysis: ByteWindows, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        windows, (rows, columns) = analysis.windows, (analysis.rows.axis, analysis.columns.axis)
        assert rows is not None
        assert columns is not None
        follows, kept = keep_reads(windows.epilogue, windows.lane, (rows, columns))
        analysis = replace(analysis, windows=replace(windows, epilogue=follows))
        return _Emitter(analysis, kept, parameters).statement()


def _is_row(read: TensorLoad, columns: ChannelWindow, windows: ChannelWindows) -> bool:
    """Return whether neighbouring taps of a row are vectors side by side."""
    *_, before, last = read.indices
    whole = last.same_as(windows.lane.variable) and as_int(read.source.shape[-1]) == windows.block
    return whole and linear_coefficient(before, columns.tap.variable) == 1


@dataclass(frozen=True)
class _Emitter:
    """Emission of one convolution under given parameters."""

    analysis: ByteWindows
    kept: tuple[KeptRead, ...]
    parameters: Parameters

    @cached_property
    def block(self) -> int:
        return self.analysis.windows.block

    @cached_property
    def taps(self) -> tuple[int, int]:
        """The rows and columns of the weights."""
        rows, columns = self.analysis.rows.tap.extent, self.analysis.columns.tap.extent
        assert isinstance(rows, int)
        assert isinstance(columns, int)
        return rows, columns

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The taps from which on some four columns are multiplied, below zero where columns before them are not."""
        used = {first for output in range(self._sharing) for _, first in self._parts(output)}
        return tuple(sorted(used))

    @cached_property
    def gathers(self) -> set[tuple[int, int]]:
        """The columns and first columns of the shuffles in use, to which emission adds."""
        return {(self.taps[1], max(first, 0)) for first in self.firsts}

    @cached_property
    def held(self) -> Var:
        """The weights of each row of taps from each first one on."""
        return local([self.taps[0] * len(self.firsts) * self.block], "int32", "weights")

    @cached_property
    def zeros(self) -> Var:
        """A row of the image outside of it."""
        return local([self.analysis.columns.extent * self.block], self.analysis.windows.data.source.dtype, "zeros")

    def statement(self) -> Stmt:
        """Return the parallel loop over images, blocks of channels and rows of tiles."""
        windows, rows = self.analysis.windows, self.analysis.windows.outer[-1]
        images = [group.extent for group in windows.outer[:-1]]
        count = ceiling(rows.extent, self.parameters["rows"])
        by_image = windows.division is Division.IMAGE
        extents = [count, *images] if by_image else [*images, count]

        def task(number: Expr) -> Stmt:
            first, *others = unflatten(number, extents)[:: 1 if by_image else -1]
            point: dict[Var, Expr] = {}
            for group, place in zip(windows.outer[:-1], others[:: 1 if by_image else -1], strict=True):
                point.update(group.point(place))
            assert isinstance(rows.extent, int)
            body = tile_choice(first, rows.extent, self.parameters["rows"], lambda y, n: self._task(point, y, n))
            kept = [
                vector(self.block, lambda v, e=each: e.loaded({**point, windows.lane.variable: v}, v))
                for each in self.kept
            ]
            return with_local([each.buffer for each in self.kept], [*kept, self._prepared(point, body)])

        statement = parallel(product(extents), task, is_large(work_of(windows.stage)))
        return self.analysis.dot.imported(statement, self.gathers)

    @property
    def _sharing(self) -> int:
        """How many outputs read the same four columns."""
        window, (_, taps) = self.analysis.columns, self.taps
        return max(n for n in range(1, SHARING + 1) if n == 1 or (n - 1) * window.stride < FOUR - (taps - 1) % FOUR)

    def _parts(self, output: int) -> Iterator[tuple[int, int]]:
        """Yield where the fours of an output begin after the first of those that share them, and with which tap."""
        shift = output * self.analysis.columns.stride
        for part in range(0, self.taps[1] + shift, FOUR):
            if part - shift + FOUR > 0:
                yield part, part - shift

    def _prepared(self, point: Point, body: Stmt) -> Stmt:
        """Return a task with its weights, and a row of zeros where it may read one."""
        windows, rows = self.analysis.windows, self.analysis.rows
        statements: list[Stmt] = []
        for row in range(self.taps[0]):
            at = {**point, rows.tap.variable: index(row)}
            zero = {self.analysis.columns.tap.variable: index(0), windows.lane.variable: index(0)}
            address = tirx.address_of(substitute(windows.weights, {**at, **zero}))
            for first in self.firsts:
                fours = self.analysis.dot.gathered(address, index(0), self.taps[1], max(first, 0))
                if first < 0:  # The first tap moves up within each lane.
                    fours = fours << tirx.const(-8 * first, fours.ty.dtype)
                statements.append(store(self.held, fours, [self._weights_at(row, first)]))
        if not rows.may_miss:
            return with_local([self.held], [*statements, body])
        zero = tirx.const(0, self.zeros.dtype)
        cleared = loop(
            self.analysis.columns.extent,
            lambda x: vector(self.block, lambda v: store(self.zeros, zero, [x * self.block + v])),
        )
        return with_local([self.held, self.zeros], [*statements, cleared, body])

    def _weights_at(self, row: int, first: int) -> Expr:
        place = row * len(self.firsts) + self.firsts.index(first)
        return tirx.Ramp(index(place * self.block), index(1), self.block)

    def _task(self, point: Point, start: Expr, rows: int) -> Stmt:
        sizes = [self.parameters["tile_rows"]]
        return tiles(rows, sizes, lambda y, count: self._rows(point, start + y, count))

    def _rows(self, point: Point, start: Expr, rows: int) -> Stmt:
        """Return the tiles of `rows` whole rows; those that read no column outside of the image become one loop."""
        width, size = column_extent(self.analysis.windows), self.parameters["columns"]
        spans = [(first, min(size, width - first)) for first in range(0, width, size)]
        statements: list[Stmt] = []
        for (inside, columns), run in itertools.groupby(spans, lambda span: (self._is_inside(*span), span[1])):
            firsts = [first for first, _ in run]
            if inside:
                tile = _Tile(self, point, (start, rows), columns, None)
                statements.append(
                    loop(len(firsts), lambda i, t=tile, b=firsts[0]: t.statement(index(b) + i * size)),
                )
            else:
                statements += [
                    _Tile(self, point, (start, rows), columns, first).statement(index(first)) for first in firsts
                ]
        return sequence(statements)

    def _is_inside(self, first: int, columns: int) -> bool:
        places = [self.column(first) + position for position in self.positions(columns)]
        return min(places) >= 0 and max(places) + FOUR <= self.analysis.columns.extent

    def column(self, output: int) -> int:
        """Return the column of the image with which the window of an output begins."""
        return output * self.analysis.columns.stride + self.analysis.columns.offset

    def positions(self, columns: int) -> list[int]:
        """Return where the fours begin that so many outputs read, after the first one's first column."""
        return sorted({position for column in range(columns) for position, _ in self.fours_of(column)})

    def fours_of(self, column: int) -> Iterator[tuple[int, int]]:
        """Yield where the fours that a column of a tile reads begin, and the first tap of each."""
        shared, own = divmod(column, self._sharing)
        begin = shared * self._sharing * self.analysis.columns.stride
        return ((begin + part, first) for part, first in self._parts(own))


@dataclass(frozen=True)
class _Tile:
    """A tile of (first, number) rows; `border` is the first of its columns where some of them miss the image."""

    emitter: _Emitter
    point: Point
    rows: tuple[Expr, int]
    columns: int
    border: int | None

    def statement(self, start: Expr) -> Stmt:
        """Return the tile from column `start` on."""
        windows, row_axis = self.emitter.analysis.windows, self.emitter.analysis.rows.axis
        assert row_axis is not None
        first, count = self.rows
        outputs = [
            RegisterTile(
                windows, None, False, {**self.point, row_axis.variable: first + row}, index(0), index(0), 1,
                start, self.columns, None,
            )
            for row in range(count)
        ]  # fmt: skip
        positions = self.emitter.positions(self.columns)
        fours = local([len(positions) * windows.block], "int32", "fours")
        statements = [
            *(output.started() for output in outputs),
            *self._products([output.registers for output in outputs], fours, positions, start),
            *(output.finished() for output in outputs),
        ]
        return with_local([fours, *(output.registers for output in outputs)], statements)

    def _products(self, sums: list[Var], fours: Var, positions: list[int], start: Expr) -> Iterator[Stmt]:
        """Yield what each row of the image adds to the sums of each row of the tile."""
        rows, block = self.emitter.analysis.rows, self.emitter.block
        reached: dict[int, list[tuple[int, int]]] = {}
        for output, tap in itertools.product(range(len(sums)), range(self.emitter.taps[0])):
            reached.setdefault(output * rows.stride + tap * rows.dilation, []).append((output, tap))
        for row, users in sorted(reached.items()):
            address = self._row(row)
            known = {}
            for number, position in enumerate(positions):
                read = self._fours(address, position, start)
                if read is not None:
                    known[position] = tirx.Ramp(index(number * block), index(1), block)
                    yield store(fours, read, [known[position]])
            for output, tap in users:
                for column in range(self.columns):
                    for position, first in self.emitter.fours_of(column):
                        if position in known:
                            own = self.emitter._weights_at(tap, first)
                            yield self._added(sums[output], column, load(fours, [known[position]]), own)

    def _added(self, sums: Var, column: int, fours: Expr, weights: Expr) -> Stmt:
        place = tirx.Ramp(index(column * self.emitter.block), index(1), self.emitter.block)
        total = self.emitter.analysis.dot.accumulate(load(sums, [place]), fours, load(self.emitter.held, [weights]))
        return store(sums, total, [place])

    def _row(self, number: int) -> Expr:
        """Return the address of a row of the image that the tile reads, of zeros where it is outside."""
        rows, data = self.emitter.analysis.rows, self.emitter.analysis.windows.data
        *outside, _, _, _ = data.indices
        position = self.rows[0] * rows.stride + (rows.offset + number)
        known = [substitute(place, self.point) for place in outside]
        if not rows.may_miss:
            return tirx.address_of(load(data.source, [*known, position, index(0), index(0)]))
        last = index(rows.extent - 1)
        limited = tirx.max(tirx.min(position, last), index(0))
        inside = tirx.all(position >= 0, position <= last)
        address = tirx.address_of(load(data.source, [*known, limited, index(0), index(0)]))
        return self.emitter.analysis.dot.row(inside, address, tirx.address_of(load(self.emitter.zeros, [index(0)])))

    def _fours(self, row: Expr, position: int, start: Expr) -> Expr | None:
        """Return the fours that begin at a position of the tile, None where all are outside of the image."""
        emitter, window = self.emitter, self.emitter.analysis.columns
        width = min(FOUR, window.extent)
        if self.border is None:
            column, first = start * window.stride + (window.offset + position), 0
        else:
            begin = emitter.column(self.border) + position
            inside = max(0, min(begin, window.extent - width))
            column, first = index(inside), begin - inside
            if not -FOUR < first < width:
                return None
        emitter.gathers.add((width, first))
        return emitter.analysis.dot.gathered(row, column * emitter.block, width, first)
