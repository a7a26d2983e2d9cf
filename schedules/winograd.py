"""Convolutions by Winograd's minimal filtering: transform, products and transform back of some tiles in one task.

A task transforms all channels of its tiles of the image into (m + 2)^2 matrices of tiles by channels, multiplies each
with the weights of some blocks of output channels, and computes what follows on the tiles transformed back: nothing
but the result leaves the core's second-level cache. The products are register tiles of blocks of output channels by
tiles of the image, one vector register each, as in `direct_convolution`; with weights of bfloat16 the transformed image
is rounded to pairs of channels, which a dot product adds up in one instruction. Of words all is exact
(`winograd_structure`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step, as_int
from schedules.by_element import terms_at_once
from schedules.convolution_tile import most_columns
from schedules.family import Choice, Kernel, Parameters, Space, is_large
from schedules.intrin.bf16_dot import PAIR, bf16_dot
from schedules.intrin.bf16_pairs import Bf16Pairs, bf16_pairs
from schedules.intrin.byte_dot import WORD, word_dot
from schedules.intrin.byte_rounding import rounded_in_floats
from schedules.intrin.load_fence import fence, with_fences
from schedules.loops import (
    Extent,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    quotient,
    store,
    tile_choice,
    tiles,
    unflatten,
    vector,
    with_local,
)
from schedules.stages import sequence
from schedules.winograd_combination import combined
from schedules.winograd_products import Factors, NarrowProducts
from schedules.winograd_structure import WinogradAnalysis, analyse
from schedules.winograd_task import BLOCKS, images_together, task_shape
from targets.base import Target

# Rows of a transformed matrix whose vectors fit 32 registers with what they are computed of.
MOST_ROWS_AT_ONCE = 4


class Winograd:
    """Tasks of some tiles of the image by some blocks of output channels."""

    name = "winograd"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> WinogradAnalysis | None:
        """Return the analysis of the stages of a Winograd convolution whose blocks are the target's vectors."""
        analysis = analyse(kernel)
        if analysis is None or analysis.block != target.vector_lanes(32):
            return None
        if analysis.in_words:
            if word_dot(target) is None:
                return None
            value = rounded_in_floats(analysis.epilogue.value)
            analysis = replace(analysis, epilogue=replace(analysis.epilogue, value=value))
        elif analysis.in_pairs and bf16_pairs(target) is None:
            return None
        lane = next((a for a in analysis.epilogue.source.spatial if a.variable.same_as(analysis.axes[-1])), None)
        written = Access(analysis.epilogue.stage.output, analysis.epilogue.indices)
        return analysis if lane is not None and written.step(lane) == Step.UNIT else None

    def space(self, target: Target, analysis: WinogradAnalysis) -> Space:
        """Return the register tile, and the tiles of the image and blocks of channels of one task."""
        blocks = min(BLOCKS, int(analysis.weights.shape[0]))
        most = most_columns(target, blocks, words=analysis.in_words)
        count, parts = task_shape(target, analysis, most)
        groups = -(-int(analysis.weights.shape[0]) // blocks)
        return (
            Choice("blocks", blocks, (1, 2, 3, 4)),
            Choice("columns", -(-count // -(-count // most)), (4, 6, 7, 12, 13, 14)),
            Choice("tiles", count, (7, 14, 28, 49, 56)),
            Choice("task_blocks", -(-groups // parts) * blocks, (2, 4, 8, 16, 32)),
        )

    def apply(self, analysis: WinogradAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        terms, together = terms_at_once(target), images_together(target, analysis)
        if parameters["tiles"] < together * math.prod(analysis.tiles):
            together = 1
        products = _narrow(analysis, target)
        statement = _Emitter(analysis, parameters, terms, products, together).statement()
        if products is not None:
            statement = products.imported(statement)
        return with_fences(statement, target) if terms > 1 else statement


def _narrow(analysis: WinogradAnalysis, target: Target) -> NarrowProducts | None:
    """Return how a target multiplies pairs, where the weights are in pairs."""
    if analysis.in_words:
        words = word_dot(target, WORD)
        return None if words is None else NarrowProducts(words)
    pairs, dot = bf16_pairs(target), bf16_dot(target)
    return NarrowProducts(dot, pairs) if analysis.in_pairs and pairs is not None and dot is not None else None


@dataclass(frozen=True)
class _Emitter:
    """Emission of one convolution under given parameters: tasks have the tiles of `together` images, or of one."""

    analysis: WinogradAnalysis
    parameters: Parameters
    terms_at_once: int
    rounded: NarrowProducts | None
    together: int

    @cached_property
    def window(self) -> int:
        return self.analysis.transforms.window

    @cached_property
    def output_blocks(self) -> int:
        return int(self.analysis.weights.shape[0])

    def statement(self) -> Stmt:
        """Return the parallel loop over images, parts of the output channels, and groups of tiles."""
        total = math.prod(self.analysis.tiles)
        count, blocks = self.parameters["tiles"], self.parameters["task_blocks"]
        batch = self.analysis.data.shape[0]
        images: Extent = as_int(batch) or batch
        extents = [
            quotient(images, self.together),
            -(-self.output_blocks // blocks),
            -(-total * self.together // count),
        ]

        def task(number: Expr) -> Stmt:
            images, part, group = unflatten(number, extents)
            image = images * self.together

            def of_tiles(first: Expr, width: int) -> Stmt:
                return tile_choice(
                    part, self.output_blocks, blocks, lambda o, n: _Task(self, image, first, width, o, n).statement()
                )

            return tile_choice(group, total * self.together, count, of_tiles)

        work = product([images, total, self.window**2, self.analysis.channels, self.output_blocks])
        return parallel(product(extents), task, is_large(work))


@dataclass(frozen=True)
class _Task:
    """`width` tiles from number `first` of `image` on, by `blocks` blocks of output channels from `output` on."""

    emitter: _Emitter
    image: Expr
    first: Expr
    width: int
    output: Expr
    blocks: int

    @cached_property
    def analysis(self) -> WinogradAnalysis:
        return self.emitter.analysis

    @cached_property
    def lanes(self) -> int:
        return self.analysis.block

    @cached_property
    def window(self) -> int:
        return self.analysis.transforms.window

    @cached_property
    def spectrum(self) -> Var:
        """The transformed image: [window^2, tiles, channels], or pairs of channels in bfloat16."""
        channels = int(self.analysis.data.shape[1]) * self.lanes
        if self.pairs is not None:
            return local([self.window**2, self.width, channels // PAIR], "int32", "spectrum")
        return local([self.window**2, self.width, channels], self.analysis.element, "spectrum")

    @property
    def pairs(self) -> Bf16Pairs | None:
        """How the transformed image is rounded, if it is."""
        return None if self.emitter.rounded is None else self.emitter.rounded.pairs

    def statement(self) -> Stmt:
        """Return the transform of all channels, and products and transform back for one group of blocks at a time."""
        together = min(self.emitter.parameters["blocks"], self.blocks)
        products = local([self.window**2, together, self.width, self.lanes], self.analysis.total, "products")
        factors = Factors(
            self.analysis,
            self.spectrum,
            self.width,
            self.emitter.parameters["columns"],
            self.emitter.terms_at_once,
            self.emitter.rounded,
        )

        def group(first: Expr, count: int) -> Stmt:
            block = self.output + first
            multiplied = factors.multiply(products, block, count)
            return sequence([multiplied, self._transform_back(products, block, count)])

        return with_local([self.spectrum, products], [self._transform(), tiles(self.blocks, [together], group)])

    def _corner(self, tile: Expr, stride: int = 1) -> tuple[Expr, Expr]:
        """Return the first row and column of the result in a tile of the task, times `stride`."""
        number, columns = self.first + tile, index(self.analysis.tiles[1])
        if self.emitter.together > 1:
            number = tirx.floormod(number, index(math.prod(self.analysis.tiles)))
        size = self.analysis.transforms.tile * stride
        return tirx.floordiv(number, columns) * size, tirx.floormod(number, columns) * size

    def _image_of(self, tile: Expr) -> Expr:
        """Return the number of the image that a tile of the task is of."""
        if self.emitter.together == 1:
            return self.image
        return self.image + tirx.floordiv(self.first + tile, index(math.prod(self.analysis.tiles)))

    def _transform(self) -> Stmt:
        """Return the transform of the image's tiles; those at its borders are copied among zeros first."""
        window, image = self.window, self.analysis.image

        def each(tile: Expr, channels: Expr) -> Stmt:
            first = self._corner(tile, self.analysis.transforms.stride)
            corner = [at - before for at, before in zip(first, self.analysis.before, strict=True)]

            def element(row: Expr, column: Expr, v: Expr) -> Expr:
                position = [self._image_of(tile), channels, corner[0] + row, corner[1] + column, v]
                return load(self.analysis.data, position).astype(self.analysis.element)

            patch = local([window, window, self.lanes], self.analysis.element, "patch")

            def copied(row: Expr, column: Expr) -> Stmt:
                at = zip((corner[0] + row, corner[1] + column), image, strict=True)
                inside = tirx.all(*[bound for a, extent in at for bound in (a >= 0, a < extent)])
                zero = tirx.const(0, self.analysis.element)
                return tirx.IfThenElse(
                    inside,
                    vector(self.lanes, lambda v: store(patch, element(row, column, v), [row, column, v])),
                    vector(self.lanes, lambda v: store(patch, zero, [row, column, v])),
                )

            border = with_local(
                [patch],
                [
                    loop(window, lambda row: loop(window, lambda column: copied(row, column))),
                    self._transform_tile(tile, channels, lambda row, column, v: load(patch, [row, column, v])),
                ],
            )
            whole = tirx.all(
                *[bound for a, extent in zip(corner, image, strict=True) for bound in (a >= 0, a + window <= extent)]
            )
            return tirx.IfThenElse(whole, self._transform_tile(tile, channels, element), border)

        blocks = int(self.analysis.data.shape[1])
        return loop(self.width, lambda tile: loop(blocks, lambda channels: each(tile, channels)))

    def _transform_tile(self, tile: Expr, channels: Expr, element: Callable[[Expr, Expr, Expr], Expr]) -> Stmt:
        first, *others = [self._transform_rows(rows, tile, channels, element) for rows in self._rows_at_once()]
        # What both parts read is read again, or it would be kept in registers that the second one needs.
        return sequence([first, *[each for other in others for each in (fence(), other)]])

    def _rows_at_once(self) -> list[range]:
        """Return the rows of the matrices by parts that are transformed together: as many as Arm's registers hold."""
        parts = 2 if self.window > MOST_ROWS_AT_ONCE and self.emitter.terms_at_once > 1 else 1
        size = -(-self.window // parts)
        return [range(first, min(first + size, self.window)) for first in range(0, self.window, size)]

    def _transform_rows(
        self, rows: range, tile: Expr, channels: Expr, element: Callable[[Expr, Expr, Expr], Expr]
    ) -> Stmt:
        window, matrix = self.window, self.analysis.transforms.data
        dtype = self.analysis.element
        half = local([len(rows), window, self.lanes], dtype, "half")

        def of_column(column: Expr) -> Stmt:
            return combined(
                matrix,
                self.lanes,
                lambda row, v: element(index(row), column, v),
                lambda row, value, v: store(half, value, [index(row - rows.start), column, v]),
                rows,
                dtype,
            )

        def of_row(row: Expr) -> Stmt:
            first = (rows.start + row) * window

            def put(column: int, value: Expr, v: Expr) -> Stmt:
                return store(self.spectrum, value, [first + column, tile, channels * self.lanes + v])

            if self.pairs is not None:
                return self._rounded_row(self.pairs, half, row, first, tile, channels)
            return combined(matrix, self.lanes, lambda column, v: load(half, [row, index(column), v]), put, dtype=dtype)

        return with_local([half], [loop(window, of_column), loop(len(rows), of_row)])

    def _rounded_row(self, pairs: Bf16Pairs, half: Var, row: Expr, first: Expr, tile: Expr, channels: Expr) -> Stmt:
        """Return the transform of row `row` of `half` into the spectrum from frequency `first` on, rounded."""
        window, lanes = self.window, self.lanes
        values = local([window, lanes], "float32", "values")

        def put(column: int, value: Expr, v: Expr) -> Stmt:
            return store(values, value, [index(column), v])

        def finish(column: int) -> Stmt:
            every = load(values, [index(column), tirx.Ramp(index(0), index(1), lanes)])
            place = tirx.Ramp(channels * (lanes // PAIR), index(1), lanes // PAIR)
            return store(self.spectrum, pairs.neighbours(every), [first + column, tile, place])

        matrix = self.analysis.transforms.data
        compute = combined(matrix, self.lanes, lambda column, v: load(half, [row, index(column), v]), put)
        return with_local([values], [compute, *map(finish, range(window))])

    def _transform_back(self, products: Var, block: Expr, count: int) -> Stmt:
        """Return the transform of the products into tiles of the result, and what follows."""
        window, size, matrix = self.window, self.analysis.transforms.tile, self.analysis.transforms.outputs
        dtype = self.analysis.wrapping
        half = local([size, window, self.lanes], dtype, "half")

        def product(*position: Expr) -> Expr:
            value = load(products, position)
            return tirx.reinterpret(dtype, value) if self.analysis.in_words else value

        def each(tile: Expr, o: Expr) -> Stmt:
            corner = self._corner(tile)

            def columns(column: Expr) -> Stmt:
                return combined(
                    matrix,
                    self.lanes,
                    lambda row, v: product(index(row * window) + column, o, tile, v),
                    lambda row, value, v: store(half, value, [index(row), column, v]),
                    dtype=dtype,
                )

            def rows(row: Expr) -> Stmt:
                return self._result_row(half, row, (self._image_of(tile), corner[0] + row, corner[1]), block + o)

            return with_local([half], [loop(window, columns), loop(size, rows)])

        return loop(self.width, lambda tile: loop(count, lambda o: each(tile, o)))

    def _result_row(self, half: Var, row: Expr, corner: tuple[Expr, Expr, Expr], block: Expr) -> Stmt:
        """Return a row of a tile of the result, as far as it lies inside; `corner` has its image, row and column."""
        image, result_row, first_column = corner
        size, matrix = self.analysis.transforms.tile, self.analysis.transforms.outputs
        dtype = self.analysis.wrapping
        result = local([size, self.lanes], dtype, "result")
        compute = combined(
            matrix,
            self.lanes,
            lambda column, v: load(half, [row, index(column), v]),
            lambda column, value, v: store(result, value, [index(column), v]),
            dtype=dtype,
        )

        def finish(column: int) -> Stmt:
            def element(v: Expr) -> Stmt:
                position = [image, block, result_row, first_column + column, v]
                names = zip(self.analysis.axes, position, strict=True)
                point = {axis: value for axis, value in names if isinstance(axis, Var)}
                return self.analysis.epilogue.store(load(result, [index(column), v]), point)

            done = vector(self.lanes, element)
            last = self.analysis.size[1]
            return tirx.IfThenElse(first_column + column < last, done, None) if last % size else done

        rows = self.analysis.size[0]
        body = with_local([result], [compute, *map(finish, range(size))])
        return tirx.IfThenElse(result_row < rows, body, None) if rows % size else body
