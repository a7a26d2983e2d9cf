"""One task of a convolution in tile registers: blocks of channels by pixels, one behind the other.

What follows the sums of a block is computed between the products of the next one: a core multiplies tiles and computes
in vectors at once, but looks for work only a few hundred instructions ahead, and what a tile stored can be read again
only when it has reached the cache. There is memory for the sums of two blocks. Meanwhile the core asks for the lines
that will be written and read when the present block is finished.

Blocks of channels are outside, so that their weights come from memory once. Where an image in place is larger than the
weights its pixels are outside instead, and ask for the next ones: 256 to 128 channels of 8 images of 56x56 took 1190
us, and 640 so (Granite Rapids).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.convolution_tile import bytes_of
from schedules.intrin.matrix_tiles import BLOCK, BYTES, TILE, MatrixTiles, Passing
from schedules.loops import index, load, local, loop, vector, with_local
from schedules.matrix_ahead import MatrixAhead
from schedules.matrix_image import CopiedImage
from schedules.matrix_tile import KEPT_WEIGHTS
from schedules.matrix_windows import MatrixWindows
from schedules.stages import sequence
from targets.base import CacheSizes

Point = Mapping[Var, Expr]
# Memory for sums: of the block in registers, and of the one before it.
TURNS = 2
# The next image may take one part of so many of the second-level cache, beside this one, a copy and the weights.
IMAGE_PARTS = 4


@dataclass(frozen=True)
class PixelBlock:
    """`count` pixels, of one block of channels, from `start` on: the block `number` of the task.

    Of the last one of the channels before there are no more pixels to finish than `present`. The block before has
    finished the first `again` of the pixels.
    """

    channel: Expr
    number: Expr
    start: Expr
    count: int
    present: Expr | int = BLOCK
    again: int = 0

    @property
    def turn(self) -> Expr:
        """Which of the memories of sums is its."""
        return tirx.floormod(self.number, index(TURNS))

    @property
    def rows(self) -> Expr | int:
        """How many of its pixels are to be finished."""
        if isinstance(self.present, int):
            return min(self.count - self.again, self.present)
        return tirx.min(index(self.count - self.again), self.present)


@dataclass(frozen=True)
class MatrixTask:
    """`rows` rows from `first` on of the image at `point`, for `channels` blocks of channels.

    Where `images_follow`, a core reads one image after the other with the same channels.
    """

    analysis: MatrixWindows
    point: Point
    first: Expr
    rows: int
    channels: int
    caches: CacheSizes
    images_follow: bool

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
    def _ahead(self) -> MatrixAhead:
        return MatrixAhead(self.analysis)

    @cached_property
    def image(self) -> CopiedImage:
        return CopiedImage(self.analysis, self.point, self.first, self.rows)

    @property
    def _size(self) -> int:
        """The pixels of all blocks."""
        return self.image.pixels

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """The first pixel and the pixels of each block."""
        whole, rest = divmod(self._size, BLOCK)
        spans = [(number * BLOCK, BLOCK) for number in range(whole)]
        if rest and not self.analysis.copies and whole:
            # Nothing may be read behind the image: the last tiles begin earlier, and compute some pixels again.
            size = BLOCK if rest > TILE else TILE
            spans.append((self._size - size, size))
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

    @property
    def _bytes_of_block(self) -> int:
        """The bytes of the weights of 32 channels."""
        return self._pieces * BLOCK // self.analysis.lanes * self._steps_of_piece * BYTES * BLOCK

    @property
    def _steps_of_piece(self) -> int:
        return -(-self.analysis.horizontal.taps // self.analysis.taps_of_step)

    @property
    def _pixels_first(self) -> bool:
        """Whether all channels of some pixels follow each other: an image in place that is larger than the weights.

        The other ones of the two are read again and again, from the second-level cache if they fit it.
        """
        weights = self._bytes_of_block * self.analysis.lanes // BLOCK * self.channels
        image = self.rows * self.analysis.depth_blocks * BYTES
        return not self.analysis.copies and image > weights and self.channels > 1

    @property
    def _passing(self) -> Passing:
        """Return which operand leaves the first-level cache to the other: one that is not read again soon.

        With one tap these are the pixels where the weights of 32 channels fit: 512 to 512 channels of 8 images of 14x14
        took 319 us, and 258 so, 512 to 1024 with stride 2 780 and 584. Otherwise they are weights that do not fit, and
        where the second-level cache keeps not all that is read, steps ask for them: 1024 to 256 channels of 14x14 took
        346 us, and 302 so, 3x3 filters of 512 to 512 at 7x7 787 and 747. Where it does, 3x3 filters of 256 at 14x14
        took 8 % longer so (Granite Rapids).
        """
        kept = self._bytes_of_block
        if self._pixels_first:
            kept *= self.analysis.lanes // BLOCK * self.channels
        elif self._pixels_pass and kept * KEPT_WEIGHTS[1] <= self.caches.level1 * KEPT_WEIGHTS[0]:
            return Passing.ROWS
        if kept * KEPT_WEIGHTS[1] < self.caches.level1 * KEPT_WEIGHTS[0]:
            return Passing.NEITHER
        read = bytes_of(self.analysis.windows.data.source) + self.analysis.bytes_of_weights
        in_order = self.analysis.lanes == BLOCK and not self._pixels_first
        is_far = in_order and self._bytes_of_block > self.caches.level1 and read > self.caches.level2
        return Passing.FAR_COLUMNS if is_far else Passing.COLUMNS

    @property
    def _pixels_pass(self) -> bool:
        """Whether a pixel is read by one tap, for 32 channels at once, and the cache keeps none for the next ones."""
        is_one = self.analysis.vertical.taps * self.analysis.horizontal.taps == 1 and self.analysis.lanes == BLOCK
        return is_one and self._size * self.analysis.depth_blocks * BYTES > self.caches.level1

    def of(self, begin: Expr) -> Stmt:
        """Return all pixels of the blocks of channels from `begin` on."""
        upper, lower = self._heights
        last = self._block(begin, index(self.channels - 1), len(self._spans) - 1)
        if self._pixels_first:
            products = self._pixels(begin)
        else:
            products = [loop(self.channels, lambda number: self._channels(begin, number))]
        statements = [
            self.tiles.begin(upper, lower, self.analysis.bytes_of_step),
            *products,
            self.tiles.end(),
            loop(last.rows, lambda row: self._finished(last, row)),
        ]
        if not self.analysis.copies:
            return with_local([self.sums], statements)
        return with_local([self.sums, self.image.copy], [self.image.made(), *statements])

    @property
    def _heights(self) -> tuple[int, int]:
        """Return the rows of the upper and the lower tiles: all, but where the image has fewer pixels to read."""
        if self.analysis.copies or self._size >= BLOCK:
            return TILE, TILE
        return min(TILE, self._size), max(1, self._size - TILE)

    def _block(self, begin: Expr, channel: Expr, span: int) -> PixelBlock:
        start, size = self._spans[span]
        number = channel + span * self.channels if self._pixels_first else channel * len(self._spans) + span
        again = sum(self._spans[span - 1]) - start if span else 0
        return PixelBlock(begin + channel, number, index(start), size, again=again)

    @property
    def _alike(self) -> int:
        """How many blocks have 32 pixels, one behind the other."""
        whole = sum(size == BLOCK for _, size in self._spans)
        return whole if whole * BLOCK <= self._size else whole - 1

    def _pixels(self, begin: Expr) -> list[Stmt]:
        """Return all blocks, channels by channels those of some pixels, then those of the next ones."""
        count, alike = self.channels, self._alike

        def at(number: Expr, present: int = BLOCK) -> PixelBlock:
            channel, span = tirx.floormod(number, index(count)), tirx.floordiv(number, index(count))
            return PixelBlock(begin + channel, number, span * BLOCK, BLOCK, present)

        statements: list[Stmt] = []
        if alike:
            statements.append(self._products(at(index(0)), at(index(0), 0)))
            statements.append(loop(alike * count - 1, lambda number: self._products(at(number + 1), at(number))))
        for span in range(alike, len(self._spans)):
            before = self._block(begin, index(count - 1), span - 1) if span else at(index(0), 0)
            statements.append(self._products(self._block(begin, index(0), span), before))

            def following(number: Expr, span: int = span) -> Stmt:
                return self._products(self._block(begin, number + 1, span), self._block(begin, number, span))

            statements.append(loop(count - 1, following))
        return statements

    def _channels(self, begin: Expr, channel: Expr) -> Stmt:
        """Return all pixels of one block of channels; the first ones finish the last ones of the channels before."""
        before = self._block(begin, channel - 1, len(self._spans) - 1)
        before = replace(before, present=channel * BLOCK)
        first = self._block(begin, channel, 0)
        alike = self._alike
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
            return tiles.step(form, places, analysis.bytes_of_pixel, weights, analysis.stride_of_weights, self._passing)

        def piece(depth: Expr, row: Expr) -> Stmt:
            columns = range(0, analysis.horizontal.taps, analysis.taps_of_step)
            number = depth * taps + row + done
            first = number * self._rows_of_piece
            return sequence(
                [
                    *(step(depth, row, column) for column in columns),
                    self._requests(block, first),
                    self._weights_ahead(block, number),
                    self._image_ahead(block, number),
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
        """Return what follows the sums of a row's pixel that is to be finished, where it is none of the border."""
        analysis, lane = self.analysis, self.analysis.windows.lane
        row = row + block.again
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
        requests = sequence(
            [self._ahead.of_results(lambda at: self._pixel(block, at), first + row) for row in range(each)]
        )
        if each * (self._pieces - 1) < BLOCK:
            return requests
        return tirx.IfThenElse(first < index(BLOCK), requests, None)

    def _weights_ahead(self, block: PixelBlock, piece: Expr) -> Stmt:
        """Return what asks for some weights of the next block of channels, once where all images read them."""
        if self._pixels_first:
            return tirx.Evaluate(0)  # They are few, and read again and again.
        blocks = len(self._spans)
        lines = -(-self._ahead.lines_of_weights // self._pieces)
        each = -(-lines // blocks)
        number = tirx.floordiv(block.start, index(BLOCK))
        first = piece * lines + number * each
        requests = loop(each, lambda line: self._ahead.of_weights(block.channel + 1, first + line))
        wanted: list[Expr] = []
        if each * (blocks - 1) >= lines:
            wanted.append(number * each < index(lines))
        if self.images_follow:
            wanted += [self.point[axis.variable] < index(1) for axis in self.analysis.images]
        return tirx.IfThenElse(tirx.all(*wanted), requests, None) if wanted else requests

    def _image_ahead(self, block: PixelBlock, piece: Expr) -> Stmt:
        """Return what asks for some of the pixels that come next: of an image in place, or of the next image."""
        analysis = self.analysis
        if self._pixels_first:
            each = -(-BLOCK * analysis.depth_blocks // (self.channels * self._pieces))
            first = (tirx.floormod(block.number, index(self.channels)) * self._pieces + piece) * each
            pixel = self.first + block.start + BLOCK
            return loop(each, lambda line: self._ahead.of_pixels(self.point, pixel, first + line))
        follows = bool(analysis.images) and self.rows == analysis.height
        if not follows or self._ahead.lines_of_image * BYTES * IMAGE_PARTS > self.caches.level2:
            return tirx.Evaluate(0)
        each = -(-self._ahead.lines_of_image // (self.channels * len(self._spans) * self._pieces))
        first = (block.number * self._pieces + piece) * each
        return loop(each, lambda line: self._ahead.of_next_image(self.point, first + line))
