"""Requests for what convolutions in tile registers read and write shortly: results, weights, pixels.

A core that multiplies tiles has few instructions in sight, and none of those that read what comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.matrix_tiles import BLOCK
from schedules.loops import LINE_BITS, SECOND_LEVEL, index, load, prefetch
from schedules.matrix_windows import MatrixWindows
from schedules.stages import contains, loads_of, sequence, substitute, variables_of

Point = Mapping[Var, Expr]


@dataclass(frozen=True)
class MatrixAhead:
    """Requests of a convolution, each for a line of memory, past the end or not."""

    analysis: MatrixWindows

    def of_results(self, pixel: Callable[[Expr], Point], row: Expr) -> Stmt:
        """Return what asks for the lines of the results at a row of a block's pixels, and of what is read to finish it.

        Where pixels lie together it is the memory as many pixels behind the first one: of rows with a border that is a
        few lines too far, and takes no quotient for each of them.
        """
        epilogue, lane = self.analysis.windows.epilogue, self.analysis.windows.lane.variable
        written = load(epilogue.stage.output, list(epilogue.indices))

        def lines(read: TensorLoad) -> list[Expr]:
            starts = range(0, self.analysis.lanes, LINE_BITS // int(read.source.dtype.bits))
            if not self._lie_together(read):
                return [substitute(read, {**pixel(row), lane: index(start)}) for start in starts]
            first, lanes = pixel(index(0)), self.analysis.lanes
            return [substitute(read, {**first, lane: row * lanes + start}) for start in starts]

        return sequence(
            [
                *(self.analysis.tiles.own(place) for place in lines(written)),
                *(prefetch(place) for read in self._reads_ahead for place in lines(read)),
            ]
        )

    def _lie_together(self, read: TensorLoad) -> bool:
        """Whether the lanes of the pixels of a row of an image that tasks copy lie one behind the other."""
        across, windows = self.analysis.horizontal.axis, self.analysis.windows
        if not self.analysis.copies or across is None or int(read.source.shape[-1]) != self.analysis.lanes:
            return False
        *_, column, last = read.indices
        return column.same_as(across.variable) and last.same_as(windows.lane.variable)

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

    @property
    def lines_of_weights(self) -> int:
        """The lines of the weights of a block of channels."""
        weights = self.analysis.windows.weights.source
        elements = math.prod(int(extent) for extent in weights.shape[1:])
        return -(-elements * int(weights.dtype.bits) // LINE_BITS)

    def of_weights(self, channel: Expr, line: Expr) -> Stmt:
        """Return what asks for a line of the weights of a block of channels."""
        weights = self.analysis.windows.weights.source
        *first, last = self.analysis.weights_at(channel, index(0), index(0), 0, 0).indices
        place = last + line * (LINE_BITS // int(weights.dtype.bits))
        return prefetch(load(weights, [*first, place]), SECOND_LEVEL)

    def of_pixels(self, point: Point, first: Expr, line: Expr) -> Stmt:
        """Return what asks for a line of 32 pixels from `first` on of an image in place, block of channels by block."""
        depth, pixel = tirx.floordiv(line, index(BLOCK)), tirx.floormod(line, index(BLOCK))
        return prefetch(self.analysis.data_at(point, depth, first + pixel), SECOND_LEVEL)

    @property
    def lines_of_image(self) -> int:
        """The lines of an image."""
        data = self.analysis.windows.data.source
        return math.prod(int(extent) for extent in data.shape[1:]) * int(data.dtype.bits) // LINE_BITS

    def of_next_image(self, point: Point, line: Expr) -> Stmt:
        """Return what asks for a line of the image after that at `point`."""
        data, (axis,) = self.analysis.windows.data.source, self.analysis.images
        inside = [index(0)] * (len(data.shape) - 2)
        place = line * (LINE_BITS // int(data.dtype.bits))
        return prefetch(load(data, [point[axis.variable] + 1, *inside, place]), SECOND_LEVEL)
