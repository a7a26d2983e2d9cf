"""How many tiles of an image by how many blocks of channels make a task of Winograd's filtering."""

from __future__ import annotations

from schedules.access import as_int
from schedules.intrin.bf16_dot import PAIR
from schedules.winograd_structure import WinogradAnalysis
from targets.base import Target

FLOAT_BYTES = 4
# Blocks of output channels in a register tile: each element of the transformed image is loaded once for them.
BLOCKS = 2
# A part of the second-level cache for the transformed image; products and weights need the rest.
IMAGE_SHARE = 2
# Where channels are divided among tasks, each transforms its tiles again: more than this is not worth a core.
MOST_PARTS = 4


def task_shape(target: Target, analysis: WinogradAnalysis, columns: int) -> tuple[int, int]:
    """Return how many tiles of the image make a task, and into how many parts its output channels are divided.

    Every core gets a task, and each element of the weights that it loads is used for a register tile of `columns` tiles
    or more, if possible.
    """
    element = FLOAT_BYTES // PAIR if analysis.in_pairs else FLOAT_BYTES
    bytes_of_tile = analysis.transforms.window**2 * analysis.channels * element
    most = max(1, target.caches.level2 // IMAGE_SHARE // bytes_of_tile)
    rows, across = analysis.tiles
    total = rows * across
    groups = -(-int(analysis.weights.shape[0]) // BLOCKS)
    wanted = max(1, target.cores // (as_int(analysis.data.shape[0]) or 1))
    parts = 1
    while total < 3 * columns * wanted // (4 * parts) and parts < min(MOST_PARTS, groups):
        parts *= 2
    count = max(-(-wanted // parts), -(-total // most))
    return -(-total // count), min(parts, groups)
