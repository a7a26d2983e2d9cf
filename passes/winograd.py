"""Where Winograd's minimal filtering pays for a 3x3 convolution, and its weights transformed ahead of time.

F(m, 3) multiplies (m + 2)^2 times for each m x m outputs and pair of channels instead of 9 m^2 times, (2 m + 1)^2 times
with a stride of 2, and adds the transforms of both images. Its weights are (m + 2)^2 / 9 times as large, so too few
tiles make it wait for memory. Errors grow by the transforms' amplification.

With products of pairs of bfloat16 (`in_pairs`) both transformed operands are rounded to it, and the transforms'
arithmetic, in fp32, weighs twice as much beside products that take half the time.

Of bytes with weights of bytes all is exact, as long as no result can be too large for what is left of 32 bits by the
factor that the transforms give it (`schedules.winograd_structure`): the weights are known, and tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from passes.base import Refusal, require
from passes.blocked_operators import Geometry
from schedules.intrin.bf16_dot import PAIR
from schedules.winograd_structure import largest_result
from schedules.winograd_transforms import SIZES, TAPS, integer_transforms, transforms

# The vector instructions of a tile's transforms in terms of its (m + 2)^2 elements, and those of a multiply-add that
# take as long: loads, sums and stores of both axes, as counted in the code for x86.
TRANSFORM_INSTRUCTIONS = 5
# Multiply-adds that each element of the weights has to serve, lest reading them takes longer than a direct convolution.
FEWEST_TILES = 16
# Multiply-adds that take as long as it takes to bring an element of the weights to a core: where tiles are few, they
# wait for memory. As measured on images of 7x7 and 14x14, in fp32 and in pairs of bfloat16, which take half as long.
WEIGHT_COST = 5
# What remains to be gained has to pay for the weights' memory.
LEAST_GAIN = 1.15
# A certificate allows sixteen times the growth of a random walk's error (`optimizer.certificate.tolerance`). A layer
# may use half of that.
ALLOWANCE = 8.0
# Roundings of an element on its way through the transforms, beside those of its sum.
ROUNDINGS = 4
# The largest byte.
_LARGEST = 255


def choose_tile(
    shape: Sequence[int],
    image: tuple[int, int],
    batch: int,
    geometry: Geometry,
    largest: int,
    in_pairs: bool = False,
    bound: int | None = None,
) -> int:
    """Return m for a convolution of an `image` with weights of `shape` [O, I, *kernel]; raises Refusal.

    `batch` is the least number of images, `largest` the largest m that may be chosen. Products are of pairs of bfloat16
    where `in_pairs`, of pairs of words where results are integers, whose magnitudes do not exceed a `bound`.
    """
    outputs, inputs, *kernel = shape
    require(kernel == [TAPS, TAPS], f"its kernel is {'x'.join(map(str, kernel))}, not {TAPS}x{TAPS}")
    stride, *others = set(geometry.strides)
    require(not others and stride in SIZES, f"its strides are {'x'.join(map(str, geometry.strides))}")
    require(geometry.dilations == (1, 1), "it is dilated")
    size, direct = zip(*(_size_and_taps(axis, extent, geometry) for axis, extent in enumerate(image)), strict=True)
    in_words = bound is not None
    instructions = TRANSFORM_INSTRUCTIONS * (PAIR if in_pairs or in_words else 1)
    weight_cost = WEIGHT_COST / PAIR if in_words else WEIGHT_COST
    transforming = 1 + instructions * (inputs + outputs) / (inputs * outputs)
    gains = {}
    reasons = []
    for tile in (each for each in SIZES[stride] if each <= largest):
        count = math.prod(-(-extent // tile) for extent in size) * batch
        elements = transforms(tile, stride).window ** 2
        cost = elements * (count * transforming + WEIGHT_COST)
        gain = (math.prod(direct) * batch + TAPS**2 * weight_cost) / cost
        if bound is not None and bound >= largest_result(tile, stride):
            reasons.append(f"multiples of F({tile}, {TAPS}) could exceed 32 bits")
        elif not in_words and not _is_exact_enough(tile, stride, inputs, in_pairs):
            reasons.append(f"F({tile}, {TAPS}) is not exact enough for {inputs} channels")
        elif count < FEWEST_TILES:
            reasons.append(f"F({tile}, {TAPS}) has {count} tiles, too few for the size of its weights")
        elif gain < LEAST_GAIN:
            reasons.append(f"F({tile}, {TAPS}) would be {gain:.2f} times as fast")
        else:
            gains[tile] = gain
    if not gains:
        raise Refusal("; ".join(reasons) or "no tile is allowed")
    return max(gains, key=lambda tile: gains[tile])


def _size_and_taps(axis: int, extent: int, geometry: Geometry) -> tuple[int, int]:
    """Return how many results there are along an axis of the image, and how many taps of theirs are inside of it."""
    begin, stride = geometry.pads_begin[axis], geometry.strides[axis]
    size = (extent + begin + geometry.pads_end[axis] - TAPS) // stride + 1
    inside = [0 <= at * stride + tap - begin < extent for at in range(size) for tap in range(TAPS)]
    return size, sum(inside)


def _is_exact_enough(tile: int, stride: int, channels: int, in_pairs: bool) -> bool:
    """Return whether a layer stays within its share of the tolerance. Beside bfloat16's roundings others are small."""
    if in_pairs:
        return transforms(tile, stride).amplification <= ALLOWANCE
    return error_growth(tile, channels, stride) <= ALLOWANCE * (1 + math.sqrt(TAPS**2 * channels))


def error_growth(tile: int, channels: int, stride: int = 1) -> float:
    """Return the error of F(`tile`, 3) in units of roundoff, as a random walk over its sums."""
    return transforms(tile, stride).amplification * (ROUNDINGS + math.sqrt(channels))


def bound_of_results(weights: np.ndarray) -> int:
    """Return what magnitudes of sums of uint8 with weights [O, ...] of int8 do not exceed."""
    flat = weights.reshape(len(weights), -1).astype(np.int64)
    sums = np.concatenate([np.maximum(flat, 0).sum(1), np.maximum(-flat, 0).sum(1)])
    return _LARGEST * int(sums.max())


def pack_winograd(weights: np.ndarray, tile: int, block: int, in_pairs: bool = False, stride: int = 1) -> np.ndarray:
    """Return [O, I, 3, 3] transformed, as [O/block, (m + 2)^2, I, block of O], zeros past the last channel.

    With `in_pairs` as pairs of inputs in bfloat16, [O/block, (m + 2)^2, I/2, block of O, 2]; weights of bytes as such
    pairs of words.
    """
    outputs, inputs = weights.shape[:2]
    in_words = weights.dtype == np.int8
    matrix = np.array((integer_transforms if in_words else transforms)(tile, stride).weights)
    of_taps = np.kron(matrix, matrix)  # [(m + 2)^2, 9], rows of the window first, as those of the taps
    padded = np.pad(weights.reshape(outputs, inputs, -1), [(0, -outputs % block), (0, 0), (0, 0)])
    taps = padded.reshape(-1, block, inputs, TAPS**2).transpose(0, 3, 2, 1)  # [O/block, 9, I, block]
    packed = np.empty((len(taps), len(of_taps), inputs, block), np.float32)
    for spectrum, of_block in zip(packed.reshape(*packed.shape[:2], -1), taps, strict=True):  # one needs little memory
        spectrum[:] = of_taps @ of_block.reshape(TAPS**2, -1).astype(np.float64)
    if not in_pairs and not in_words:
        return packed
    pairs = packed.reshape(*packed.shape[:2], inputs // PAIR, PAIR, block)
    return np.ascontiguousarray(pairs.swapaxes(-1, -2)).astype(np.int16 if in_words else ml_dtypes.bfloat16)
