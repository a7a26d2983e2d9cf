"""Where Winograd's minimal filtering pays for a 3x3 convolution, and its weights transformed ahead of time.

F(m, 3) multiplies (m + 2)^2 times for each m x m outputs and pair of channels instead of 9 m^2 times, and adds the
transforms of both images. Its weights are (m + 2)^2 / 9 times as large, so too few tiles make it wait for memory.
Errors grow by the transforms' amplification.

With products of pairs of bfloat16 (`in_pairs`) both transformed operands are rounded to it, and the transforms'
arithmetic, in fp32, weighs twice as much beside products that take half the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from passes.base import Refusal, require
from passes.blocked_operators import Geometry, blocks
from schedules.intrin.bf16_dot import PAIR
from schedules.winograd_transforms import SIZES, TAPS, transforms

# The vector instructions of a tile's transforms in terms of its (m + 2)^2 elements, and those of a multiply-add that
# take as long: loads, sums and stores of both axes, as counted in the code for x86.
TRANSFORM_INSTRUCTIONS = 5
# Multiply-adds that each element of the weights has to serve, lest reading them takes longer: a core that starts 32 of
# them in a cycle and reads 4 bytes in two.
FEWEST_TILES = 24
# The same for weights in bfloat16, as measured on images of 7x7: where tiles are few, a direct convolution waits, too.
FEWEST_TILES_OF_PAIRS = 16
# What remains to be gained has to pay for the weights' memory.
LEAST_GAIN = 1.25
# A certificate allows sixteen times the growth of a random walk's error (`optimizer.certificate.tolerance`). A layer
# may use half of that.
ALLOWANCE = 8.0
# Roundings of an element on its way through the transforms, beside those of its sum.
ROUNDINGS = 4


def choose_tile(
    shape: Sequence[int], image: tuple[int, int], batch: int, geometry: Geometry, largest: int, in_pairs: bool = False
) -> int:
    """Return m for a convolution with weights of `shape` [O, I, *kernel] whose results are `image`s; raises Refusal.

    `batch` is the least number of images, `largest` the largest m that may be chosen. Products are of pairs of bfloat16
    where `in_pairs`.
    """
    outputs, inputs, *kernel = shape
    require(kernel == [TAPS, TAPS], f"its kernel is {'x'.join(map(str, kernel))}, not {TAPS}x{TAPS}")
    require(geometry.strides == (1, 1) and geometry.dilations == (1, 1), "it is strided or dilated")
    direct = math.prod(image) * TAPS**2 * inputs * outputs
    gains = {}
    reasons = []
    for tile in (size for size in SIZES if size <= largest):
        count = math.prod(-(-extent // tile) for extent in image)
        elements = transforms(tile).window ** 2
        instructions = TRANSFORM_INSTRUCTIONS * (PAIR if in_pairs else 1)
        gain = direct / (count * elements * (inputs * outputs + instructions * (inputs + outputs)))
        if not _is_exact_enough(tile, inputs, in_pairs):
            reasons.append(f"F({tile}, {TAPS}) is not exact enough for {inputs} channels")
        elif count * batch < (FEWEST_TILES_OF_PAIRS if in_pairs else FEWEST_TILES):
            reasons.append(f"F({tile}, {TAPS}) has {count * batch} tiles, too few for the size of its weights")
        elif gain < LEAST_GAIN:
            reasons.append(f"F({tile}, {TAPS}) would be {gain:.2f} times as fast")
        else:
            gains[tile] = gain
    if not gains:
        raise Refusal("; ".join(reasons) or "no tile is allowed")
    return max(gains, key=lambda tile: gains[tile])


def _is_exact_enough(tile: int, channels: int, in_pairs: bool) -> bool:
    """Return whether a layer stays within its share of the tolerance. Beside bfloat16's roundings others are small."""
    if in_pairs:
        return transforms(tile).amplification <= ALLOWANCE
    return error_growth(tile, channels) <= ALLOWANCE * (1 + math.sqrt(TAPS**2 * channels))


def error_growth(tile: int, channels: int) -> float:
    """Return the error of F(`tile`, 3) in units of roundoff, as a random walk over its sums."""
    return transforms(tile).amplification * (ROUNDINGS + math.sqrt(channels))


def pack_winograd(weights: np.ndarray, tile: int, block: int, in_pairs: bool = False) -> np.ndarray:
    """Return [O, I, 3, 3] transformed, as [O/block, (m + 2)^2, I, block of O], zeros past the last channel.

    With `in_pairs` as pairs of inputs in bfloat16, [O/block, (m + 2)^2, I/2, block of O, 2].
    """
    outputs, inputs = weights.shape[:2]
    matrix = np.array(transforms(tile).weights)
    columns = np.tensordot(weights.astype(np.float64), matrix, axes=(3, 1))  # [O, I, 3, window]
    spectrum = np.tensordot(columns, matrix, axes=(2, 1))  # [O, I, window of columns, window of rows]
    rows_first = spectrum.swapaxes(2, 3).reshape(outputs, inputs, -1).astype(np.float32)
    padded = np.pad(rows_first, [(0, -outputs % block), (0, 0), (0, 0)])
    split = padded.reshape(blocks(outputs, block), block, inputs, -1)
    packed = np.ascontiguousarray(split.transpose(0, 3, 2, 1))
    if not in_pairs:
        return packed
    pairs = packed.reshape(*packed.shape[:2], inputs // PAIR, PAIR, block)
    return np.ascontiguousarray(pairs.swapaxes(-1, -2)).astype(ml_dtypes.bfloat16)
