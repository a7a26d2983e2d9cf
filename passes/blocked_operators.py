"""Convolutions over blocked channels as tensor expressions: data [N, ceil(C/block), spatial..., block].

Lanes past the last channel hold anything; nothing reads them but what computes the same lanes of another tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from tvm import te, tirx

from schedules.intrin.bf16_dot import PAIR
from schedules.intrin.byte_dot import FOUR, WORD

# What products are summed in: those of integers exactly.
SUM, INTEGER_SUM = "float32", "int32"
BYTES = ("int8", "uint8")


@dataclass(frozen=True)
class Geometry:
    """Strides, dilations and padding by spatial axis."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: tuple[int, ...]
    pads_end: tuple[int, ...]


def blocks(channels: int, block: int) -> int:
    """Return how many blocks hold `channels`."""
    return -(-channels // block)


def pack_dense(weights: np.ndarray, block: int, depth: int | None = None) -> np.ndarray:
    """Return [O, I, *K] as [O/block, I/depth, *K, depth of I, block of O], zeros past the last channel.

    `depth` is the block of what is read, by default that of the result.
    """
    depth = depth or block
    outputs, inputs, *kernel = weights.shape
    padded = np.pad(weights, [(0, -outputs % block), (0, -inputs % depth), *[(0, 0)] * len(kernel)])
    split = padded.reshape(blocks(outputs, block), block, blocks(inputs, depth), depth, *kernel)
    return np.ascontiguousarray(split.transpose(0, 2, *range(4, split.ndim), 3, 1))


def pack_pairs(weights: np.ndarray, block: int, depth: int | None = None) -> np.ndarray:
    """Return `pack_dense` in bfloat16 with pairs of inputs together: [..., depth of I / 2, block of O, 2]."""
    return _grouped(pack_dense(weights, block, depth), PAIR).astype(ml_dtypes.bfloat16)


def pack_bytes(weights: np.ndarray, block: int, depth: int, terms: int = FOUR) -> np.ndarray:
    """Return `pack_dense` of bytes with some inputs together: [..., depth of I / terms, block of O, terms]."""
    return _grouped(pack_dense(weights, block, depth), terms)


def _grouped(packed: np.ndarray, terms: int) -> np.ndarray:
    groups = packed.reshape(*packed.shape[:-2], -1, terms, packed.shape[-1])
    return np.ascontiguousarray(groups.swapaxes(-1, -2))


def sampled(data: te.Tensor, strides: Sequence[int]) -> te.Tensor:
    """Return every `strides`-th position of an image [N, C/block, spatial..., block]."""
    batch, channels, *image, lanes = data.shape
    extents = [(extent + stride - 1) // stride for extent, stride in zip(image, strides, strict=True)]

    def element(*at: tirx.Var) -> tirx.Expr:
        places = [position * stride for position, stride in zip(at[2:-1], strides, strict=True)]
        return data(*at[:2], *places, at[-1])

    return te.compute((batch, channels, *extents, lanes), element, name="sampled")


def with_whole_steps(weights: np.ndarray, geometry: Geometry, taps: int) -> tuple[np.ndarray, Geometry]:
    """Return [O, I, *K] with zeros for as many more columns as make whole steps of `taps`, and its geometry."""
    more = -weights.shape[-1] % taps
    padded = np.pad(weights, [*[(0, 0)] * (weights.ndim - 1), (0, more)])
    return padded, replace(geometry, pads_end=(*geometry.pads_end[:-1], geometry.pads_end[-1] + more))


def pack_shallow(weights: np.ndarray, block: int) -> np.ndarray:
    """Return [O, I, *K] as [O/block, I, *K, block of O], zeros past the last channel."""
    outputs = weights.shape[0]
    padded = np.pad(weights, [(0, -outputs % block), *[(0, 0)] * (weights.ndim - 1)])
    split = padded.reshape(blocks(outputs, block), block, *weights.shape[1:])
    return np.ascontiguousarray(np.moveaxis(split, 1, -1))


def pack_depthwise(weights: np.ndarray, block: int) -> np.ndarray:
    """Return [C, 1, *K] as [C/block, *K, block], zeros past the last channel."""
    return np.ascontiguousarray(pack_shallow(weights, block)[:, 0])


def scattered(weights: np.ndarray, block: int) -> np.ndarray:
    """Return [I, O, *K] of a transposed convolution as those of one with a tap and outputs [*K, O in whole blocks]."""
    inputs, outputs, *kernel = weights.shape
    padded = np.pad(weights, [(0, 0), (0, -outputs % block), *[(0, 0)] * len(kernel)])
    return np.moveaxis(padded, (0, 1), (-1, -2)).reshape(-1, inputs, *[1] * len(kernel))


def dense(data: te.Tensor, weights: te.Tensor, channels: int, groups: int, geometry: Geometry) -> te.Tensor:
    """Return the convolution of blocked `data` of `channels` with weights packed dense, in pairs, or in fours.

    The result is blocked. With `groups`, the channels of a group are whole blocks.
    """
    terms = int(weights.shape[-1]) if len(weights.shape) > len(data.shape) + 1 else 1
    block, lanes = int(data.shape[-1]), int(weights.shape[-1 if terms == 1 else -2])
    kernel = [int(size) for size in weights.shape[2 : len(data.shape) - 1]]
    padded = with_border(data, geometry)
    taps = [te.reduce_axis((0, size), "k") for size in kernel]
    per_group = channels // groups
    outputs = int(weights.shape[0])
    if per_group % block and per_group > block:
        channel = te.reduce_axis((0, per_group), "c")
        inner = [channel]
        outer_at, lane_at = tirx.floordiv(channel.var, block), tirx.floormod(channel.var, block)
        axes = [channel, *taps]
    else:
        outer = te.reduce_axis((0, blocks(per_group, block)), "co")
        inner = [te.reduce_axis((0, min(per_group, block)), "ci")]
        outer_at, lane_at = outer.var, inner[0].var
        axes = [outer, *taps, *inner]

    def element(batch: tirx.Expr, output: tirx.Expr, *rest: tirx.Expr) -> tirx.Expr:
        *position, lane = rest
        first = tirx.floordiv(output, outputs // groups) * (per_group // block) if groups > 1 else 0
        read = padded(batch, first + outer_at, *_taps(position, taps, geometry), lane_at)
        offsets = [tap.var for tap in taps]
        within = [lane_at, lane]
        if terms > 1:
            within = [tirx.floordiv(lane_at, terms), lane, tirx.floormod(lane_at, terms)]
        return _sum(read, weights(output, outer_at, *offsets, *within), axes)

    return te.compute((data.shape[0], outputs, *_extents(padded, 2, kernel, geometry), lanes), element, name="conv")


def shallow(data: te.Tensor, weights: te.Tensor, geometry: Geometry) -> te.Tensor:
    """Return the convolution of plain `data` [N, C, spatial...] with weights of `pack_shallow`, blocked."""
    block = int(weights.shape[-1])
    kernel = [int(size) for size in weights.shape[2:-1]]
    padded = with_border(data, geometry)
    channel = te.reduce_axis((0, int(weights.shape[1])), "c")
    taps = [te.reduce_axis((0, size), "k") for size in kernel]

    def element(batch: tirx.Expr, output: tirx.Expr, *rest: tirx.Expr) -> tirx.Expr:
        *position, lane = rest
        read = padded(batch, channel.var, *_taps(position, taps, geometry))
        offsets = [tap.var for tap in taps]
        return te.sum(read * weights(output, channel.var, *offsets, lane), axis=[channel, *taps])

    shape = (data.shape[0], int(weights.shape[0]), *_extents(padded, 2, kernel, geometry), block)
    return te.compute(shape, element, name="conv")


def depthwise(data: te.Tensor, weights: te.Tensor, geometry: Geometry) -> te.Tensor:
    """Return the convolution of each channel of blocked `data` with its own of `pack_depthwise`, blocked."""
    kernel = [int(size) for size in weights.shape[1:-1]]
    padded = with_border(data, geometry)
    taps = [te.reduce_axis((0, size), "k") for size in kernel]

    def element(batch: tirx.Expr, channel: tirx.Expr, *rest: tirx.Expr) -> tirx.Expr:
        *position, lane = rest
        read = padded(batch, channel, *_taps(position, taps, geometry), lane)
        return _sum(read, weights(channel, *[tap.var for tap in taps], lane), taps)

    shape = (data.shape[0], data.shape[1], *_extents(padded, 2, kernel, geometry), weights.shape[-1])
    return te.compute(shape, element, name="conv")


def _sum(data: tirx.Expr, weights: tirx.Expr, axes: Sequence[tirx.IterVar]) -> tirx.Expr:
    wide = INTEGER_SUM if str(data.ty.dtype) in (*BYTES, WORD) else SUM
    return te.sum(data.astype(wide) * weights.astype(wide), axis=axes)


def sum_with_rounded(sums: te.Tensor, rounded: te.Tensor) -> te.Tensor:
    """Return the sums of a tensor of fp32 and one of another type and the same shape."""
    return te.compute(sums.shape, lambda *at: sums[at] + rounded[at].astype(sums.dtype), name="add")


def less_products(sums: te.Tensor, factor: te.Tensor, factors: te.Tensor) -> te.Tensor:
    """Return blocked `sums` less the products of one number, or one at each position, and one of each channel.

    All lanes hold the number at a position.
    """

    def element(batch: tirx.Expr, channel: tirx.Expr, *rest: tirx.Expr) -> tirx.Expr:
        *position, lane = rest
        number = factor(batch, 0, *rest) if factor.shape else factor()
        return sums(batch, channel, *rest) - number * factors(0, channel, *[0] * len(position), lane)

    return te.compute(sums.shape, element, name="less_products")


def scatter(data: te.Tensor, kernel: Sequence[int]) -> te.Tensor:
    """Return blocks [N, *kernel x C/block, *positions, block] as an image: each position's taps side by side."""
    batch, taps_and_blocks, *positions, block = data.shape
    count = int(taps_and_blocks) // math.prod(kernel)

    def element(n: tirx.Expr, channel: tirx.Expr, *rest: tirx.Expr) -> tirx.Expr:
        *place, lane = rest
        tap: tirx.Expr = tirx.const(0, "int64")
        for at, size in zip(place, kernel, strict=True):
            tap = tap * size + tirx.floormod(at, size)
        read = [tirx.floordiv(at, size) for at, size in zip(place, kernel, strict=True)]
        return data(n, tap * count + channel, *read, lane)

    size = [extent * taps for extent, taps in zip(positions, kernel, strict=True)]
    return te.compute((batch, count, *size, block), element, name="scatter")


def with_border(data: te.Tensor, geometry: Geometry, value: float = 0.0) -> te.Tensor:
    """Return `data` with a border of `value` around its spatial axes, the third and those after it."""
    if not any((*geometry.pads_begin, *geometry.pads_end)):
        return data
    first, outside = 2, tirx.const(int(value) if value.is_integer() else value, data.dtype)
    rank = len(geometry.strides)
    sizes = data.shape[first : first + rank]
    shape = list(data.shape)
    for axis, (begin, end) in enumerate(zip(geometry.pads_begin, geometry.pads_end, strict=True)):
        shape[first + axis] = sizes[axis] + begin + end

    def element(*position: tirx.Expr) -> tirx.Expr:
        inside, at = [], list(position)
        for axis, (begin, end) in enumerate(zip(geometry.pads_begin, geometry.pads_end, strict=True), start=first):
            if begin:
                inside.append(position[axis] >= begin)
                at[axis] = position[axis] - begin
            if end:
                inside.append(position[axis] < data.shape[axis] + begin)
        return tirx.if_then_else(tirx.all(*inside), data(*at), outside)

    return te.compute(shape, element, name="padded")


def _taps(position: Sequence[tirx.Expr], taps: Sequence[tirx.IterVar], geometry: Geometry) -> list[tirx.Expr]:
    steps = zip(position, geometry.strides, taps, geometry.dilations, strict=True)
    return [at * stride + tap.var * dilation for at, stride, tap, dilation in steps]


def _extents(padded: te.Tensor, first: int, kernel: Sequence[int], geometry: Geometry) -> list[tirx.Expr | int]:
    sizes = [int(size) for size in padded.shape[first : first + len(kernel)]]
    rows = zip(sizes, kernel, geometry.strides, geometry.dilations, strict=True)
    return [(size - (taps - 1) * dilation - 1) // stride + 1 for size, taps, stride, dilation in rows]


def pack_tensor(values: np.ndarray, block: int) -> np.ndarray:
    """Return [N, C, spatial...] as [N, C/block, spatial..., block], zeros past the last channel."""
    channels = values.shape[1]
    padded = np.pad(values, [(0, 0), (0, -channels % block), *[(0, 0)] * (values.ndim - 2)])
    split = padded.reshape(values.shape[0], blocks(channels, block), block, *values.shape[2:])
    return np.ascontiguousarray(np.moveaxis(split, 2, -1))


def to_blocks(data: te.Tensor, block: int) -> te.Tensor:
    """Return [N, C, spatial...] as [N, ceil(C/block), spatial..., block], the last channel again past the last one.

    A choice between the channel and zero would not do: TVM drops the bound of an index where the choice's condition
    implies it, and then reads past the end of the data what is not chosen.
    """
    channels = int(data.shape[1])

    def element(batch: tirx.Expr, outer: tirx.Expr, *rest: tirx.Expr) -> tirx.Expr:
        *position, lane = rest
        channel = outer * block + lane
        if channels % block:
            channel = tirx.min(channel, channels - 1)
        return data(batch, channel, *position)

    shape = (data.shape[0], blocks(channels, block), *data.shape[2:], block)
    return te.compute(shape, element, name="to_blocks")


def from_blocks(data: te.Tensor, channels: int) -> te.Tensor:
    """Return blocked `data` as [N, C, spatial...]."""
    block = int(data.shape[-1])

    def element(batch: tirx.Expr, channel: tirx.Expr, *position: tirx.Expr) -> tirx.Expr:
        return data(batch, tirx.floordiv(channel, block), *position, tirx.floormod(channel, block))

    return te.compute((data.shape[0], channels, *data.shape[2:-1]), element, name="from_blocks")


def channels_last(data: te.Tensor, channels: int) -> te.Tensor:
    """Return blocked `data` as [N, spatial..., C]."""
    block = int(data.shape[-1])

    def element(batch: tirx.Expr, *rest: tirx.Expr) -> tirx.Expr:
        *position, channel = rest
        return data(batch, tirx.floordiv(channel, block), *position, tirx.floormod(channel, block))

    return te.compute((data.shape[0], *data.shape[2:-1], channels), element, name="channels_last")
