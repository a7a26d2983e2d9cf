"""How many tiles of an image by how many blocks of channels make a task of Winograd's filtering."""

from __future__ import annotations

import math

from schedules.access import as_int
from schedules.division import even_parts
from schedules.intrin.bf16_dot import PAIR
from schedules.winograd_structure import WinogradAnalysis
from targets.base import Target

FLOAT_BYTES = 4
# Blocks of output channels in a register tile: each element of the transformed image is loaded once for them.
BLOCKS = 2
# A part of the second-level cache for the transformed image; products and weights need the rest.
IMAGE_SHARE = 2
# Where registers are few, tasks of fewer tiles than keep multiply-adds busy take more, even if the transforms leave the
# second-level cache: three tiles by two blocks ask for 11 bytes of weights a cycle. With 8 images 256 channels at 14x14
# take 6.4 ms with 3 tiles and 4.9 with 16, 512 at 7x7 28 with one and 5.6 with 16, 128 with stride 2 at 56x56 10.4 with
# 3 and 9.1 with 13 (Zen 3).
FEWEST_COLUMNS, FEWEST_TILES = 4, 16
# Where channels are divided among tasks, each transforms its tiles again: more than this is not worth a core.
MOST_PARTS = 4


def images_together(target: Target, analysis: WinogradAnalysis) -> int:
    """Return of how many images a task takes all tiles: those that fill five eighths of the second-level cache.

    A task reads the weights of its channels, which come from the last cache or from memory where they are larger than
    the second-level one: with the few tiles of a small image that takes longer than the products. Every core gets a
    task, if need be of a part of the channels. With 8 images 512 channels at 7x7 take 9.8 ms with a task for each image
    and 4.0 with tasks of four, 256 at 14x14 4.0 and 2.8 with tasks of two (Granite Rapids; measured only on cores that
    begin two multiply-adds a cycle).
    """
    batch, cache = as_int(analysis.data.shape[0]), target.caches.level2
    weights = math.prod(map(int, analysis.weights.shape)) * _element_bytes(analysis)
    if (target.multiply_adds == 1 and not target.has_few_registers) or batch is None or weights <= cache:
        return 1
    tiles = math.prod(analysis.tiles)
    most = cache * 5 // 8 // (_bytes_of_tile(analysis) * tiles)
    if target.has_few_registers:
        most = max(most, FEWEST_TILES // tiles)
    return even_parts(batch, max(1, min(batch * min(MOST_PARTS, _groups(analysis)) // target.cores, most)))


def task_shape(target: Target, analysis: WinogradAnalysis, columns: int) -> tuple[int, int]:
    """Return how many tiles of the image make a task, and into how many parts its output channels are divided.

    Every core gets a task, and each element of the weights that it loads is used for a register tile of `columns` tiles
    or more, if possible.
    """
    total, together = math.prod(analysis.tiles), images_together(target, analysis)
    if together > 1:
        return together * total, -(-target.cores * together // int(analysis.data.shape[0]))
    most = max(1, target.caches.level2 // IMAGE_SHARE // _bytes_of_tile(analysis))
    groups = _groups(analysis)
    wanted = max(1, target.cores // (as_int(analysis.data.shape[0]) or 1))
    if most < FEWEST_COLUMNS and target.has_few_registers:
        most = FEWEST_TILES
    parts = 1
    while total < 3 * columns * wanted // (4 * parts) and parts < min(MOST_PARTS, groups):
        parts *= 2
    count = max(-(-wanted // parts), -(-total // most))
    return -(-total // count), min(parts, groups)


def _groups(analysis: WinogradAnalysis) -> int:
    return -(-int(analysis.weights.shape[0]) // BLOCKS)


def _bytes_of_tile(analysis: WinogradAnalysis) -> int:
    return analysis.transforms.window**2 * analysis.channels * _element_bytes(analysis)


def _element_bytes(analysis: WinogradAnalysis) -> int:
    return FLOAT_BYTES // PAIR if analysis.in_pairs else FLOAT_BYTES
