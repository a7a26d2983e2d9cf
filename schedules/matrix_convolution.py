"""Convolutions over blocked channels whose sums are computed in tile registers, 32 pixels by 32 channels at once.

A pixel of a block has 64 bytes, which is what one instruction takes of each row: a step is one tap of one block of the
input. A block has 32 channels of bfloat16 or 64 of bytes, whose sums are computed one half after the other. Pixels that
a tile reads one after the other have to lie so. An image of one tap that reads each pixel is read where it lies (what
lies behind a last block's channels may be no numbers, and is left out by steps of fewer bytes if that is the only
block); others a task copies first, with a border of zeros, and with the pixels of each remainder modulo the stride
together. Rows of that copy follow each other, so that tiles run on over them: what they compute of pixels of the border
is not stored.
(Georganas et al., Harnessing Deep Learning via a Single Building Block, IPDPS 2020.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.direct_convolution import analyse
from schedules.division import Division, even_parts
from schedules.epilogue import overwritable
from schedules.family import Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.byte_rounding import rounded_in_floats
from schedules.intrin.matrix_tiles import BLOCK, MatrixTiles, matrix_tiles
from schedules.loops import parallel, product, tile_choice, unflatten
from schedules.matmul import branches_on_any
from schedules.matrix_task import MatrixTask
from schedules.matrix_windows import MatrixWindows, matrix_windows
from targets.base import CacheSizes, Target

Point = Mapping[Var, Expr]
# A part of the second-level cache for a task's copy of the image; weights need the rest.
IMAGE_SHARE = 2
# Eighths of it that weights may take which stay there while one image after the other is read.
WEIGHT_EIGHTHS = 5
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
        epilogue = replace(windows.epilogue, value=rounded_in_floats(windows.epilogue.value))
        windows = replace(windows, epilogue=epilogue)
        tiles = matrix_tiles(target, str(windows.data.source.dtype), str(windows.weights.source.dtype))
        return None if tiles is None or windows.block % BLOCK else matrix_windows(windows, tiles)

    def space(self, target: Target, analysis: MatrixWindows) -> Space:
        """Return the rows of the image, or pixels where these are read in place, and blocks of channels of a task."""
        rows, blocks = _task_shape(target, analysis)
        return Choice("rows", rows, (1, 2, 4, 7, 8, 14, 16, 28, 56)), Choice("blocks", blocks, (1, 2, 4, 8, 16))

    def apply(self, analysis: MatrixWindows, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        emitter = _Emitter(analysis, parameters, _groups_that_stay(target, analysis) > 1, target.caches)
        return analysis.tiles.imported(emitter.statement())

    def overwritable(self, analysis: MatrixWindows) -> tuple[Var, ...]:
        """Return what is read only where a result of the same type is written next, which may have its memory."""
        return overwritable(analysis.windows.epilogue)


def _task_shape(target: Target, analysis: MatrixWindows) -> tuple[int, int]:
    """Return how many rows, of `analysis.height`, by how many blocks of channels make a task."""
    images = product([axis.extent for axis in analysis.images])
    wanted = max(1, target.cores // images) if isinstance(images, int) and images else 1
    height, blocks = analysis.height, analysis.blocks
    most = height
    if analysis.copies:
        most = min(height, max(1, target.caches.level2 // IMAGE_SHARE // analysis.bytes_of_row))
    groups = _groups_that_stay(target, analysis)
    if groups > 1:
        return most, -(-blocks // groups)
    if analysis.windows.division is Division.IMAGE:
        if analysis.copies:
            return min(most, height // even_parts(height, wanted)), blocks
        return min(height, -(-height // (wanted * BLOCK)) * BLOCK), blocks
    parts = min(wanted, blocks, MOST_COPIES if analysis.copies else wanted)
    rows = -(-height // (wanted // parts))
    return min(most, rows if analysis.copies else -(-rows // BLOCK) * BLOCK), -(-blocks // parts)


def _groups_that_stay(target: Target, analysis: MatrixWindows) -> int:
    """Return how many groups of channels all images are read for one after the other: 1 but for large weights.

    Weights that do not stay in a core's cache would come from memory again for each image.
    """
    images = product([axis.extent for axis in analysis.images])
    most = target.caches.level2 * WEIGHT_EIGHTHS // 8
    needed = min(-(-analysis.bytes_of_weights // most), analysis.blocks)
    if images == 1 or needed == 1:
        return 1
    even = (groups for groups in range(needed, 2 * needed) if analysis.blocks % groups == 0)
    return next(even, needed)


@dataclass(frozen=True)
class _Emitter:
    """Emission of one convolution under given parameters; `channels_first`: each group of them for all images."""

    analysis: MatrixWindows
    parameters: Parameters
    channels_first: bool
    caches: CacheSizes

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
        inner = (parts, groups) if by_image else (groups, parts)
        extents = [groups, *images, parts] if self.channels_first else [*images, *inner]

        def task(number: Expr) -> Stmt:
            if self.channels_first:
                group, *outside, part = unflatten(number, extents)
            else:
                *outside, first, second = unflatten(number, extents)
                part, group = (first, second) if by_image else (second, first)
            point = {axis.variable: place for axis, place in zip(analysis.images, outside, strict=True)}

            def channels(begin: Expr, count: int) -> Stmt:
                def pixels(y: Expr, rows: int) -> Stmt:
                    task = MatrixTask(analysis, point, y, rows, count, self.caches, self.channels_first)
                    return task.of(begin)

                return tile_choice(part, analysis.height, self.rows, pixels)

            return tile_choice(group, analysis.blocks, self.parameters["blocks"], channels)

        return parallel(product(extents), task, is_large(work_of(analysis.windows.stage)))
