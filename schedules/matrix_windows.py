"""What a convolution in tile registers reads: pixels along rows and columns of an image of blocked channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.access import as_int, linear_coefficient, occurs
from schedules.channel_windows import ChannelWindows, constant_term
from schedules.intrin.matrix_tiles import BYTES, MatrixTiles
from schedules.loops import index, load
from schedules.stages import Axis

Point = Mapping[Var, Expr]
# Of an image: batch, blocks, at least one spatial dimension, the channels of a block; of its weights two more.
FEWEST_DIMENSIONS = 4


@dataclass(frozen=True, eq=False)
class Dimension:
    """One of the image: position = output * stride + tap * dilation + offset, of `size` positions.

    `axis` is None where there is one output. Outside of the image are zeros.
    """

    axis: Axis | None
    stride: int
    taps: int
    dilation: int
    offset: int
    size: int

    @property
    def outputs(self) -> int:
        """How many positions the output has."""
        extent = 1 if self.axis is None else self.axis.extent
        assert isinstance(extent, int)
        return extent

    @property
    def phases(self) -> int:
        """How many remainders modulo the stride are read."""
        return self.stride if self.taps > 1 else 1

    @property
    def reach(self) -> int:
        """How many positions of one remainder the last tap lies behind the first."""
        return (self.taps - 1) * self.dilation // self.stride

    @property
    def is_plain(self) -> bool:
        """Whether each output reads its own position."""
        return (self.stride, self.taps, self.offset) == (1, 1, 0) and self.outputs == self.size

    @property
    def never_misses(self) -> bool:
        """Whether no position of any remainder is outside."""
        last = (self.outputs - 1 + self.reach) * self.stride + self.phases - 1 + self.offset
        return self.offset >= 0 and last < self.size

    def remainder(self, tap: Expr | int) -> tuple[Expr | int, Expr | int]:
        """Return the remainder that a tap reads, and how many positions of it further on."""
        distance = tap * self.dilation
        if isinstance(distance, int):
            return distance % self.stride, distance // self.stride
        return tirx.floormod(distance, index(self.stride)), tirx.floordiv(distance, index(self.stride))

    def inside(self, phase: int, positions: int) -> tuple[int, int]:
        """Return [first, last) of the first `positions` of a remainder that are inside the image."""
        places = [n for n in range(positions) if 0 <= n * self.stride + phase + self.offset < self.size]
        return (places[0], places[-1] + 1) if places else (0, 0)


@dataclass(frozen=True, eq=False)
class MatrixWindows:
    """A convolution over blocks of as many channels as `tiles` takes in a step.

    `channels` are those of the input; `images` the axes that are neither of channels nor of one image.
    """

    windows: ChannelWindows
    tiles: MatrixTiles
    channels: int
    images: tuple[Axis, ...]
    vertical: Dimension
    horizontal: Dimension

    @property
    def block(self) -> int:
        """The channels of a block of the input."""
        return int(self.windows.data.source.shape[-1])

    @property
    def lanes(self) -> int:
        """The channels of a block of the output, for which there may be several blocks of sums."""
        return self.windows.block

    @property
    def taps_of_step(self) -> int:
        """How many neighbouring taps of a row one step takes: several where blocks are narrow."""
        return self.tiles.terms // self.block

    @property
    def is_narrow(self) -> bool:
        """Whether the pixels of all remainders of columns lie together in a copy."""
        return self.taps_of_step > 1

    @property
    def elements(self) -> int:
        """How many elements of a copy lie between what neighbouring pixels of the output read."""
        return self.block * self.horizontal.stride if self.is_narrow else self.block

    @property
    def blocks(self) -> int:
        """The blocks of output channels."""
        return int(self.windows.weights.source.shape[0])

    @property
    def depth_blocks(self) -> int:
        """The blocks of input channels."""
        return -(-self.channels // self.block)

    @property
    def copies(self) -> bool:
        """Whether tasks copy the image."""
        plain = self.vertical.is_plain and self.horizontal.is_plain
        # Of channels that there are not the weights are zero, and so are their products of integers.
        whole = self.channels % self.tiles.terms == 0 or (not self.is_narrow and self.tiles.total == "int32")
        return not plain or not (whole or self._is_shallow)

    @property
    def _is_shallow(self) -> bool:
        """Whether a step can take all channels, which are fewer than a block, and leave out what lies behind them."""
        return not self.is_narrow and self.depth_blocks == 1 and self.channels % self.windows.terms == 0

    @property
    def bytes_of_step(self) -> int:
        """The bytes of the reduction that a step takes: those of a block, but where an image in place has fewer."""
        if self.copies or not self._is_shallow:
            return BYTES
        return self.channels * self.windows.data.source.dtype.bits // 8

    @property
    def height(self) -> int:
        """The rows of the image; where these are read in place its pixels, as rows of one pixel each."""
        return self.vertical.outputs if self.copies else self.vertical.outputs * self.horizontal.outputs

    @property
    def pitch(self) -> int:
        """The pixels from one row to the next."""
        return self.horizontal.outputs + self.horizontal.reach if self.copies else 1

    @property
    def column_phases(self) -> int:
        """How many remainders of columns are apart in a copy."""
        return 1 if self.is_narrow else self.horizontal.phases

    @property
    def planes(self) -> int:
        """How many images of remainders a copy has for each block."""
        return self.vertical.phases * self.column_phases

    @property
    def bytes_of_pixel(self) -> int:
        """The bytes between what neighbouring pixels of the output read."""
        return self.elements * self.windows.data.source.dtype.bits // 8

    @property
    def bytes_of_row(self) -> int:
        """The bytes of a row of the copy."""
        return self.bytes_of_pixel * self.pitch * self.planes * self.depth_blocks

    @property
    def bytes_of_weights(self) -> int:
        """The bytes of all weights."""
        source = self.windows.weights.source
        return math.prod(int(extent) for extent in source.shape) * source.dtype.bits // 8

    @cached_property
    def stride_of_weights(self) -> int:
        """The bytes from the weights of some neighbouring channels of the input to the next ones."""
        return self.lanes * self.windows.terms * self.windows.weights.source.dtype.bits // 8

    def weights_at(self, channel: Expr, lane: Expr, block: Expr, row: Expr | int, column: Expr | int) -> TensorLoad:
        """Return the read of the first weight of a block of outputs, from a lane on, and of inputs, at a tap."""
        source = self.windows.weights.source
        taps = [index(row), index(column)][-(len(source.shape) - 5) :]
        return load(source, [channel, block, *taps, index(0), lane, index(0)])

    def data_at(self, point: Point, block: Expr, pixel: Expr) -> Expr:
        """Return the read of the first channel of a pixel that is counted from the image's first one."""
        rank = len(self.windows.data.source.shape) - 3
        return load(self.windows.data.source, [self._batch(point), block, *[index(0)] * (rank - 1), pixel, index(0)])

    def image_at(self, point: Point, block: Expr, y: Expr, x: Expr) -> Callable[[Expr], TensorLoad]:
        """Return the reads of a pixel's channels."""
        source = self.windows.data.source
        place = [y, x][-(len(source.shape) - 3) :]
        return lambda lane: load(source, [self._batch(point), block, *place, lane])

    def channel_point(self, channel: Expr) -> dict[Var, Expr]:
        """Return the axis of blocks of output channels at one of them."""
        axis = self.windows.channel
        return {} if axis is None else {axis.variable: channel}

    def place_point(self, y: Expr, x: Expr) -> dict[Var, Expr]:
        """Return the axes of the image at a place."""
        places = ((self.vertical.axis, y), (self.horizontal.axis, x))
        return {axis.variable: place for axis, place in places if axis is not None}

    def pixel_point(self, pixel: Expr) -> dict[Var, Expr]:
        """Return the axes of the image at a pixel that is counted from its first one."""
        width = index(self.horizontal.outputs)
        if self.horizontal.outputs == 1:
            return self.place_point(pixel, index(0))
        if self.vertical.outputs == 1:
            return self.place_point(index(0), pixel)
        return self.place_point(tirx.floordiv(pixel, width), tirx.floormod(pixel, width))

    def _batch(self, point: Point) -> Expr:
        first = self.windows.data.indices[0]
        return next((point[axis.variable] for axis in self.images if first.same_as(axis.variable)), index(0))


def matrix_windows(windows: ChannelWindows, tiles: MatrixTiles) -> MatrixWindows | None:
    """Return the analysis of a convolution of one group, None where its reads have another form."""
    data, weights, stage = windows.data, windows.weights, windows.stage
    rank, shape = len(data.source.shape), [as_int(extent) for extent in weights.source.shape]
    if rank not in (FEWEST_DIMENSIONS, FEWEST_DIMENSIONS + 1) or len(shape) != rank + 2 or None in shape:
        return None
    block = as_int(data.source.shape[-1]) or 1
    if tiles.terms % block or shape[-3:] != [block // windows.terms, windows.block, windows.terms]:
        return None
    kernel = [int(extent or 0) for extent in shape[2:-3]]
    dimensions = [
        _dimension(windows, position, taps) for position, taps in zip(range(2, rank - 1), kernel, strict=True)
    ]
    if None in dimensions:
        return None
    if len(dimensions) == 1:
        dimensions.insert(0, Dimension(None, 1, 1, 1, 0, 1))
    vertical, horizontal = (dimension for dimension in dimensions if dimension is not None)
    own = [windows.lane, windows.channel, vertical.axis, horizontal.axis]
    images = tuple(axis for axis in stage.spatial if not any(axis is each for each in own))
    batch = data.indices[0]
    in_batch = not images or (len(images) == 1 and batch.same_as(images[0].variable))
    in_batch &= bool(images) or as_int(batch) == 0
    moves = windows.channel is not None and any(occurs(at, windows.channel.variable) for at in data.indices)
    channels = _channels(windows)
    if not in_batch or moves or channels is None or -(-channels // block) != shape[1]:
        return None
    if block < tiles.terms and (kernel[-1] * block % tiles.terms or horizontal.dilation > 1):
        return None
    return MatrixWindows(windows, tiles, channels, images, vertical, horizontal)


def _channels(windows: ChannelWindows) -> int | None:
    """Return how many input channels are summed, None where an axis is not of a known extent."""
    data = windows.data
    axes = [
        axis
        for axis in windows.stage.reduction
        if occurs(data.indices[1], axis.variable) or occurs(data.indices[-1], axis.variable)
    ]
    total = 1
    for axis in axes:
        if not isinstance(axis.extent, int):
            return None
        total *= axis.extent
    return total


def _dimension(windows: ChannelWindows, position: int, count: int) -> Dimension | None:
    """Return what is read along one dimension of the data, with `count` taps."""
    at, size = windows.data.indices[position], as_int(windows.data.source.shape[position])
    axes = [axis for axis in windows.stage.spatial if occurs(at, axis.variable)]
    taps = [axis for axis in windows.stage.reduction if occurs(at, axis.variable)]
    if len(axes) > 1 or len(taps) > 1 or size is None or (count > 1) != bool(taps):
        return None
    stride = linear_coefficient(at, axes[0].variable) if axes else 1
    dilation = linear_coefficient(at, taps[0].variable) if taps else 1
    offset = constant_term(at)
    static = all(axis.static for axis in (*axes, *taps)) and (not taps or taps[0].extent == count)
    if not static or not stride or not dilation or stride < 1 or dilation < 1 or offset is None:
        return None
    return Dimension(axes[0] if axes else None, stride, count, dilation, offset, size)
