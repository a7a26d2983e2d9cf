"""One task of a convolution in tile registers: blocks of channels by pixels, one behind the other.

What follows the sums of a block is computed between the products of the next one: a core multiplies tiles and computes
in vectors at once, but looks for work only a few hundred instructions ahead, and what a tile stored can be read again
only when it has reached the cache. There is memory for the sums of two blocks. Meanwhile the core asks for the lines
that will be written and read when the present block is finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.matrix_tiles import BLOCK, TILE, MatrixTiles
from schedules.loops import LINE_BITS, SECOND_LEVEL, index, load, local, loop, prefetch, vector, with_local
from schedules.matrix_image import CopiedImage
from schedules.matrix_windows import MatrixWindows
from schedules.stages import contains, loads_of, sequence, substitute, variables_of

Point = Mapping[Var, Expr]
# Memory for sums: of the block in registers, and of the one before it.
TURNS = 2


@dataclass(frozen=True)
class PixelBlock:
    """`count` pixels, of one block of channels, from `start` on: the block `number` of the task.

    Of the last one of the channels before there are no more pixels to finish than `present`.
    """

    channel: Expr
    number: Expr
    start: Expr
    count: int
    present: Expr | int = BLOCK

    @property
    def turn(self) -> Expr:
        """Which of the memories of sums is its."""
        return tirx.floormod(self.number, index(TURNS))

    @property
    def rows(self) -> Expr | int:
        """How many of its pixels are to be finished."""
        return self.count if isinstance(self.present, int) else tirx.min(index(self.count), self.present)


@dataclass(frozen=True)
class MatrixTask:
    """`rows` rows from `first` on of the image at `point`."""

    analysis: MatrixWindows
    point: Point
    first: Expr
    rows: int

    @property
    def tiles(self) -> MatrixTiles:
        return self.analysis.tiles

    @cached_property
    def sums(self) -> Var:
        return local([TURNS * BLOCK * self.analysis.lanes], self.tiles.total, "sums")

    def _sum(self, block: PixelBlock, row: Expr | int, lane: Expr | int) -> Expr:
        """Return the read of a sum of a block."""
        return load(self.sums, [(block.turn * BLOCK + row) * self.analysis.lanes + lane])

    @cached_property
    def image(self) -> CopiedImage:
        return CopiedImage(self.analysis, self.point, self.first, self.rows)

    @property
    def _pixels(self) -> int:
        return self.image.pixels

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """The first pixel and the pixels of each block."""
        whole, rest = divmod(self._pixels, BLOCK)
        spans = [(number * BLOCK, BLOCK) for number in range(whole)]
        if rest and not self.analysis.copies and whole:
            # Nothing may be read behind the image: the last tiles begin earlier, and compute some pixels again.
            size = BLOCK if rest > TILE else TILE
            spans.append((self._pixels - size, size))
        elif rest:
            spans.append((whole * BLOCK, rest))
        return spans

    @property
    def _pieces(self) -> int:
        """How many parts of a block's products there are, between which others are finished."""
        parts = self.analysis.lanes // BLOCK
        return parts * self.analysis.depth_blocks * self.analysis.vertical.taps

    @property
    def _rows_of_piece(self) -> int:
        return -(-BLOCK // self._pieces)

    def of(self, begin: Expr, count: int) -> Stmt:
        """Return all pixels of `count` blocks of channels from `begin` on."""
        upper, lower = self._heights
        last = self._block(begin, index(count - 1), len(self._spans) - 1)
        statements = [
            self.tiles.begin(upper, lower),
            loop(count, lambda number: self._channels(begin, number)),
            self.tiles.end(),
            loop(last.count, lambda row: self._finished(last, row)),
        ]
        if not self.analysis.copies:
            return with_local([self.sums], statements)
        return with_local([self.sums, self.image.copy], [self.image.made(), *statements])

    @property
    def _heights(self) -> tuple[int, int]:
        """Return the rows of the upper and the lower tiles: all, but where the image has fewer pixels to read."""
        if self.analysis.copies or self._pixels >= BLOCK:
            return TILE, TILE
        return min(TILE, self._pixels), max(1, self._pixels - TILE)

    def _block(self, begin: Expr, channel: Expr, span: int) -> PixelBlock:
        start, size = self._spans[span]
        return PixelBlock(begin + channel, channel * len(self._spans) + span, index(start), size)

    def _channels(self, begin: Expr, channel: Expr) -> Stmt:
        """Return all pixels of one block of channels; the first ones finish the last ones of the channels before."""
        before = self._block(begin, channel - 1, len(self._spans) - 1)
        before = PixelBlock(before.channel, before.number, before.start, before.count, channel * BLOCK)
        first = self._block(begin, channel, 0)
        whole = sum(size == BLOCK for _, size in self._spans)
        alike = whole if whole * BLOCK <= self._pixels else whole - 1
        statements = [self._products(first, before)]

        def following(number: Expr) -> Stmt:
            blocks = [
                PixelBlock(first.channel, first.number + number + more, (number + more) * BLOCK, BLOCK)
                for more in range(2)
            ]
            return self._products(blocks[1], blocks[0])

        if alike > 1:
            statements.append(loop(alike - 1, following))
        statements += [
            self._products(self._block(begin, channel, span), self._block(begin, channel, span - 1))
            for span in range(max(alike, 1), len(self._spans))
        ]
        return sequence(statements)

    def _products(self, block: PixelBlock, before: PixelBlock) -> Stmt:
        """Return the sums of a block, and what follows those of the one before it."""
        lanes = range(0, self.analysis.lanes, BLOCK)
        return sequence([self._products_of_lanes(block, before, lane) for lane in lanes])

    def _products_of_lanes(self, block: PixelBlock, before: PixelBlock, lane: int) -> Stmt:
        """Return the sums of 32 channels of a block from `lane` on."""
        analysis, tiles = self.analysis, self.tiles
        form = (1 if block.count <= TILE else 2, 2)
        taps = analysis.vertical.taps
        done = lane // BLOCK * analysis.depth_blocks * taps

        def step(depth: Expr, row: Expr | int, column: Expr | int) -> Stmt:
            places = [self._place(depth, row, column, block.start + at) for at in (0, TILE)[: form[0]]]
            weights = analysis.weights_at(block.channel, index(lane), depth, row, column)
            return tiles.step(form, places, analysis.bytes_of_pixel, weights, analysis.stride_of_weights)

        def piece(depth: Expr, row: Expr) -> Stmt:
            columns = range(0, analysis.horizontal.taps, analysis.taps_of_step)
            number = depth * taps + row + done
            first = number * self._rows_of_piece
            return sequence(
                [
                    *(step(depth, row, column) for column in columns),
                    self._requests(block, first),
                    self._weights_ahead(block, number),
                    loop(self._part(before.rows, first), lambda each: self._finished(before, first + each)),
                ]
            )

        ends = [self._sum(block, row, lane) for row in (0, TILE)]
        ends.append(load(self.sums, [index(TURNS * BLOCK * analysis.lanes - 1)]))
        return sequence(
            [
                tiles.zero(),
                loop(analysis.depth_blocks, lambda depth: loop(taps, lambda row: piece(depth, row))),
                tiles.store(form, ends, analysis.lanes * 4),
            ]
        )

    def _part(self, rows: Expr | int, first: Expr) -> Expr | int:
        """Return how many of `rows` pixels a piece finishes from `first` on."""
        each = self._rows_of_piece
        if isinstance(rows, int) and each * self._pieces == rows:
            return each
        return tirx.max(index(0), tirx.min(index(each), index(rows) - first))

    def _place(self, depth: Expr, row: Expr | int, column: Expr | int, pixel: Expr) -> Expr:
        """Return the read of what a pixel has at a tap, of a block of the input."""
        if self.analysis.copies:
            return self.image.place(depth, row, column, pixel)
        return self.analysis.data_at(self.point, depth, self.first + pixel)

    def _finished(self, block: PixelBlock, row: Expr) -> Stmt:
        """Return what follows the sums of a pixel of a block, where it is none of the border."""
        analysis, lane = self.analysis, self.analysis.windows.lane
        output = analysis.windows.stage.output

        def element(v: Expr) -> Stmt:
            total = self._sum(block, row, v).astype(output.dtype)
            point = {**self._pixel(block, row), lane.variable: v}
            return analysis.windows.epilogue.store(total, point)

        finished = vector(analysis.lanes, element)
        if not analysis.copies or analysis.horizontal.reach == 0:
            return finished
        column = tirx.floormod(block.start + row, index(analysis.pitch))
        return tirx.IfThenElse(column < index(analysis.horizontal.outputs), finished, None)

    def _pixel(self, block: PixelBlock, row: Expr) -> Point:
        """Return the axes' values, but for the lane's, at a pixel of a block."""
        analysis, pixel = self.analysis, block.start + row
        if not analysis.copies:
            place = analysis.pixel_point(self.first + pixel)
        else:
            pitch = index(analysis.pitch)
            place = analysis.place_point(self.first + tirx.floordiv(pixel, pitch), tirx.floormod(pixel, pitch))
        return {**self.point, **analysis.channel_point(block.channel), **place}

    def _requests(self, block: PixelBlock, first: Expr) -> Stmt:
        """Return what asks for the lines of some pixels' results and of what follows reads at them."""
        each = self._rows_of_piece
        requests = sequence([self._asked(self._pixel(block, first + row)) for row in range(each)])
        if each * (self._pieces - 1) < BLOCK:
            return requests
        return tirx.IfThenElse(first < index(BLOCK), requests, None)

    def _asked(self, point: Point) -> Stmt:
        """Return what asks for the lines of a pixel's results, and of what is read to finish it."""
        epilogue, lane = self.analysis.windows.epilogue, self.analysis.windows.lane.variable
        written = load(epilogue.stage.output, list(epilogue.indices))

        def lines(read: TensorLoad) -> list[Expr]:
            starts = range(0, self.analysis.lanes, LINE_BITS // int(read.source.dtype.bits))
            return [substitute(read, {**point, lane: index(start)}) for start in starts]

        return sequence(
            [
                *(self.tiles.own(place) for place in lines(written)),
                *(prefetch(place) for read in self._reads_ahead for place in lines(read)),
            ]
        )

    @cached_property
    def _reads_ahead(self) -> list[TensorLoad]:
        """The reads of what follows the sums that move with the pixels, at places that are known before."""
        analysis, epilogue = self.analysis, self.analysis.windows.epilogue
        image = [axis for axis in (analysis.vertical.axis, analysis.horizontal.axis, *analysis.images) if axis]
        own = [axis.variable for axis in analysis.windows.stage.spatial]

        def is_ahead(read: TensorLoad) -> bool:
            used = [variable for place in read.indices for variable in variables_of(place)]
            known = all(contains(own, variable) for variable in used)
            return known and any(contains(used, axis.variable) for axis in image)

        return [
            read
            for read in loads_of(epilogue.value)
            if is_ahead(read) and not contains([epilogue.source.output], read.source)
        ]

    def _weights_ahead(self, block: PixelBlock, piece: Expr) -> Stmt:
        """Return what asks for some weights of the next block of channels."""
        analysis = self.analysis
        weights = analysis.windows.weights.source
        of_line = LINE_BITS // int(weights.dtype.bits)
        lines = -(-math.prod(int(extent) for extent in weights.shape[1:]) // (of_line * self._pieces))
        blocks = len(self._spans)
        each = -(-lines // blocks)
        number = tirx.floordiv(block.start, index(BLOCK))

        def request(line: Expr) -> Stmt:
            *first, last = analysis.weights_at(block.channel + 1, index(0), index(0), 0, 0).indices
            place = (piece * lines + number * each + line) * of_line
            return prefetch(load(weights, [*first, last + place]), SECOND_LEVEL)

        requests = loop(each, request)
        if each * (blocks - 1) < lines:
            return requests
        return tirx.IfThenElse(number * each < index(lines), requests, None)
