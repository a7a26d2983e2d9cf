"""Convolutions over blocked channels whose sums are computed in tile registers, 32 pixels by 32 channels at once.

A pixel of a block has 64 bytes, which is what one instruction takes of each row: a step is one tap of one block of the
input. A block has 32 channels of bfloat16 or 64 of bytes, whose sums are computed one half after the other. Pixels that
a tile reads one after the other have to lie so. An image of one tap that reads each pixel is read where it lies; others
a task copies first, with a border of zeros, and with the pixels of each remainder modulo the stride together. Rows of
that copy follow each other, so that tiles run on over them: what they compute of pixels of the border is not stored.
(Georganas et al., Harnessing Deep Learning via a Single Building Block, IPDPS 2020.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.direct_convolution import analyse
from schedules.division import Division, even_parts
from schedules.family import Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.matrix_tiles import BLOCK, TILE, MatrixTiles, matrix_tiles
from schedules.loops import index, load, local, loop, parallel, product, tile_choice, unflatten, vector, with_local
from schedules.matmul import branches_on_any
from schedules.matrix_windows import MatrixWindows, matrix_windows
from schedules.stages import sequence
from targets.base import Target

Point = Mapping[Var, Expr]
# A part of the second-level cache for a task's copy of the image; weights need the rest.
IMAGE_SHARE = 2
# Where channels are divided among tasks, each copies the image again.
MOST_COPIES = 4


class MatrixConvolution:
    """Blocks of sums in tile registers, of pixels by channels."""

    name = "matrix-convolution"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> MatrixWindows | None:
        """Return the analysis of a convolution over blocks of as many channels as a step takes."""
        windows = analyse(kernel)
        if windows is None or windows.grouped is None or branches_on_any(windows.stage):
            return None
        tiles = matrix_tiles(target, str(windows.data.source.dtype), str(windows.weights.source.dtype))
        return None if tiles is None or windows.block % BLOCK else matrix_windows(windows, tiles)

    def space(self, target: Target, analysis: MatrixWindows) -> Space:
        """Return the rows of the image, or pixels where these are read in place, and blocks of channels of a task."""
        rows, blocks = _task_shape(target, analysis)
        return Choice("rows", rows, (1, 2, 4, 7, 8, 14, 16, 28, 56)), Choice("blocks", blocks, (1, 2, 4, 8, 16))

    def apply(self, analysis: MatrixWindows, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        return analysis.tiles.imported(_Emitter(analysis, parameters).statement())


def _task_shape(target: Target, analysis: MatrixWindows) -> tuple[int, int]:
    """Return how many rows, of `analysis.height`, by how many blocks of channels make a task."""
    images = product([axis.extent for axis in analysis.images])
    wanted = max(1, target.cores // images) if isinstance(images, int) and images else 1
    height, blocks = analysis.height, analysis.blocks
    most = height
    if analysis.copies:
        most = min(height, max(1, target.caches.level2 // IMAGE_SHARE // analysis.bytes_of_row))
    if analysis.windows.division is Division.IMAGE:
        if analysis.copies:
            return min(most, height // even_parts(height, wanted)), blocks
        return min(height, -(-height // (wanted * BLOCK)) * BLOCK), blocks
    parts = min(wanted, blocks, MOST_COPIES if analysis.copies else wanted)
    rows = -(-height // (wanted // parts))
    return min(most, rows if analysis.copies else -(-rows // BLOCK) * BLOCK), -(-blocks // parts)


@dataclass(frozen=True)
class _Emitter:
    """Emission of one convolution under given parameters."""

    analysis: MatrixWindows
    parameters: Parameters

    @property
    def tiles(self) -> MatrixTiles:
        return self.analysis.tiles

    @property
    def rows(self) -> int:
        return min(self.parameters["rows"], self.analysis.height)

    def statement(self) -> Stmt:
        """Return the parallel loop over images, parts of them, and parts of the channels."""
        analysis = self.analysis
        images = [axis.extent for axis in analysis.images]
        parts, groups = -(-analysis.height // self.rows), -(-analysis.blocks // self.parameters["blocks"])
        by_image = analysis.windows.division is Division.IMAGE
        extents = [*images, *((parts, groups) if by_image else (groups, parts))]

        def task(number: Expr) -> Stmt:
            *outside, first, second = unflatten(number, extents)
            part, group = (first, second) if by_image else (second, first)
            point = {axis.variable: place for axis, place in zip(analysis.images, outside, strict=True)}

            def channels(begin: Expr, count: int) -> Stmt:
                return tile_choice(
                    part, analysis.height, self.rows, lambda y, rows: _Task(analysis, point, y, rows).of(begin, count)
                )

            return tile_choice(group, analysis.blocks, self.parameters["blocks"], channels)

        return parallel(product(extents), task, is_large(work_of(analysis.windows.stage)))


@dataclass(frozen=True)
class _Task:
    """`rows` rows from `first` on of the image at `point`."""

    analysis: MatrixWindows
    point: Point
    first: Expr
    rows: int

    @cached_property
    def sums(self) -> Var:
        return local([BLOCK * self.analysis.lanes], self.analysis.tiles.total, "sums")

    @cached_property
    def copy(self) -> Var:
        """The copied image: [blocks][remainders of rows][remainders of columns][pixels][bytes of a step]."""
        size = self.analysis.depth_blocks * self.analysis.planes * self._pixels_of_plane
        # TVM makes bfloat16 of a task's memory fp32.
        dtype = str(self.analysis.windows.data.source.dtype)
        return local([size * self.analysis.elements], "uint16" if dtype == BFLOAT16 else dtype, "image")

    @property
    def _pixels(self) -> int:
        """The pixels that tiles run over, those of the border among them."""
        return self.rows * self.analysis.pitch

    @property
    def _pixels_of_plane(self) -> int:
        """The pixels of one remainder, as far as the tiles' last ones read."""
        analysis = self.analysis
        beyond = max(analysis.horizontal.reach, -(-analysis.tiles.terms // analysis.elements))
        return -(-self._pixels // TILE) * TILE + analysis.vertical.reach * analysis.pitch + beyond

    def of(self, begin: Expr, count: int) -> Stmt:
        """Return all pixels of `count` blocks of channels from `begin` on."""
        upper, lower = self._heights
        statements = [
            self.analysis.tiles.begin(upper, lower),
            loop(count, lambda number: self._blocks(begin + number)),
            self.analysis.tiles.end(),
        ]
        if not self.analysis.copies:
            return with_local([self.sums], statements)
        return with_local([self.sums, self.copy], [self._copied(), *statements])

    @property
    def _heights(self) -> tuple[int, int]:
        """Return the rows of the upper and the lower tiles: all, but where the image has fewer pixels to read."""
        if self.analysis.copies or self._pixels >= BLOCK:
            return TILE, TILE
        return min(TILE, self._pixels), max(1, self._pixels - TILE)

    def _blocks(self, channel: Expr) -> Stmt:
        """Return one block of channels: all blocks of pixels."""
        whole, rest = divmod(self._pixels, BLOCK)
        statements = [loop(whole, lambda i: self._block(channel, i * BLOCK, BLOCK))] if whole else []
        if rest:
            start, size = whole * BLOCK, rest
            if not self.analysis.copies and self._pixels >= BLOCK:
                # Nothing may be read behind the image: the last tiles begin earlier, and compute some pixels again.
                size = BLOCK if rest > TILE else TILE
                start = self._pixels - size
            statements.append(self._block(channel, index(start), size))
        return sequence(statements)

    def _block(self, channel: Expr, start: Expr, count: int) -> Stmt:
        """Return the sums of `count` pixels from `start` on for all channels of a block, and what follows."""
        parts = [self._sums(channel, lane, start, count) for lane in range(0, self.analysis.lanes, BLOCK)]
        return sequence([*parts, self._finished(channel, start, count)])

    def _sums(self, channel: Expr, lane: int, start: Expr, count: int) -> Stmt:
        """Return the sums of `count` pixels for 32 channels of a block from `lane` on."""
        analysis, tiles, sums = self.analysis, self.analysis.tiles, self.sums
        form = (1 if count <= TILE else 2, 2)
        kernel = analysis.vertical.taps, analysis.horizontal.taps

        def step(block: Expr, row: Expr | int, column: Expr | int) -> Stmt:
            places = [self._place(block, row, column, start + at) for at in (0, TILE)[: form[0]]]
            weights = analysis.weights_at(channel, index(lane), block, row, column)
            return tiles.step(form, places, analysis.bytes_of_pixel, weights, analysis.stride_of_weights)

        def block_of_depth(block: Expr) -> Stmt:
            return loop(
                kernel[0],
                lambda row: sequence(
                    [step(block, row, column) for column in range(0, kernel[1], analysis.taps_of_step)]
                ),
            )

        lanes = analysis.lanes
        ends = [load(sums, [index(place)]) for place in (lane, TILE * lanes + lane, BLOCK * lanes - 1)]
        return sequence(
            [
                tiles.zero(),
                loop(analysis.depth_blocks, block_of_depth),
                tiles.store(form, ends, lanes * 4),
            ]
        )

    def _place(self, block: Expr, row: Expr | int, column: Expr | int, pixel: Expr) -> Expr:
        """Return the read of what a pixel has at a tap, of a block of the input."""
        analysis = self.analysis
        if not analysis.copies:
            return analysis.data_at(self.point, block, self.first + pixel)
        plane_row, down = analysis.vertical.remainder(row)
        if analysis.is_narrow:
            plane = block * analysis.vertical.phases + plane_row
            place = plane * self._pixels_of_plane + pixel + down * analysis.pitch
            return load(self.copy, [place * analysis.elements + column * analysis.block])
        plane_column, right = analysis.horizontal.remainder(column)
        plane = (block * analysis.vertical.phases + plane_row) * analysis.horizontal.phases + plane_column
        place = plane * self._pixels_of_plane + pixel + down * analysis.pitch + right
        return load(self.copy, [place * analysis.tiles.terms])

    def _finished(self, channel: Expr, start: Expr, count: int) -> Stmt:
        """Return what follows the sums of the pixels that are no border."""
        analysis, epilogue = self.analysis, self.analysis.windows.epilogue
        stage, lane = analysis.windows.stage, analysis.windows.lane

        def finish(at: Point, row: Expr) -> Stmt:
            def element(v: Expr) -> Stmt:
                total = load(self.sums, [row * analysis.lanes + v]).astype(stage.output.dtype)
                return epilogue.store(total, {**self.point, **analysis.channel_point(channel), **at, lane.variable: v})

            return vector(analysis.lanes, element)

        if not analysis.copies:
            return loop(count, lambda r: finish(analysis.pixel_point(self.first + start + r), r))
        pitch, width = index(analysis.pitch), index(analysis.horizontal.outputs)
        last = start + (count - 1)

        def of_row(number: Expr) -> Stmt:
            y = tirx.floordiv(start, pitch) + number
            begin = tirx.max(index(0), start - y * pitch)
            end = tirx.min(width, last + 1 - y * pitch)

            def pixel(i: Expr) -> Stmt:
                x = begin + i
                return finish(analysis.place_point(self.first + y, x), y * pitch + x - start)

            return loop(tirx.max(index(0), end - begin), pixel)

        return loop(tirx.floordiv(last, pitch) - tirx.floordiv(start, pitch) + 1, of_row)

    def _copied(self) -> Stmt:
        """Return the copy of all that the task reads, and zeros around it."""
        analysis = self.analysis
        whole, rest = divmod(analysis.channels, analysis.block)
        statements: list[Stmt] = []
        if whole:
            statements.append(loop(whole, lambda block: self._copied_planes(block, analysis.block)))
        if rest:
            statements.append(self._copied_planes(index(whole), rest))
        # TVM gives memory no more room than what is written to it.
        size = analysis.depth_blocks * analysis.planes * self._pixels_of_plane
        last = size * analysis.elements // analysis.block - 1
        return sequence([self._zeros(index(last)), *statements])

    def _copied_planes(self, block: Expr, channels: int) -> Stmt:
        analysis = self.analysis
        statements = []
        for row in range(analysis.vertical.phases):
            for column in range(analysis.column_phases):
                plane = (block * analysis.vertical.phases + row) * analysis.column_phases + column
                statements.append(self._copied_plane(block, channels, plane * self._pixels_of_plane, (row, column)))
        return sequence(statements)

    def _copied_plane(self, block: Expr, channels: int, base: Expr, phase: tuple[int, int]) -> Stmt:
        """Return the pixels of one remainder of rows and columns."""
        analysis, (vertical, horizontal) = self.analysis, (self.analysis.vertical, self.analysis.horizontal)
        if analysis.is_narrow:
            horizontal = replace(horizontal, stride=1)
        # Pixels of the copy are as many elements as blocks have.
        pitch = analysis.pitch * analysis.elements // analysis.block
        begin, end = horizontal.inside(phase[1], pitch)

        def of_row(row: Expr) -> Stmt:
            y = (self.first + row) * vertical.stride + (phase[0] + vertical.offset)
            start = base * (analysis.elements // analysis.block) + row * pitch

            def copied(i: Expr) -> Stmt:
                x = (begin + i) * horizontal.stride + (phase[1] + horizontal.offset)
                return self._pixel(start + begin + i, analysis.image_at(self.point, block, y, x), channels)

            zeros = [
                loop(size, lambda i, b=first: self._zeros(start + b + i))
                for first, size in ((0, begin), (end, pitch - end))
                if size
            ]
            body = sequence([*zeros, loop(end - begin, copied)])
            if vertical.never_misses:
                return body
            inside = tirx.And(y >= index(0), y < index(vertical.size))
            return tirx.IfThenElse(inside, body, loop(pitch, lambda i: self._zeros(start + i)))

        return loop(self.rows + vertical.reach, of_row)

    def _pixel(self, place: Expr, read: Callable[[Expr], TensorLoad], channels: int) -> Stmt:
        """Return the copy of one pixel's channels, and zeros in place of those that there are not."""
        terms, copy = self.analysis.block, self.copy
        statements = [vector(channels, lambda v: tirx.BufferStore(copy, _bits(read(v)), [place * terms + v]))]
        if channels < terms:
            zero = tirx.const(0, str(copy.dtype))
            rest = terms - channels
            statements.append(vector(rest, lambda v: tirx.BufferStore(copy, zero, [place * terms + channels + v])))
        return sequence(statements)

    def _zeros(self, place: Expr) -> Stmt:
        terms, copy = self.analysis.block, self.copy
        return vector(terms, lambda v: tirx.BufferStore(copy, tirx.const(0, str(copy.dtype)), [place * terms + v]))


def _bits(read: TensorLoad) -> Expr:
    return tirx.reinterpret("uint16", read) if str(read.source.dtype) == BFLOAT16 else read
