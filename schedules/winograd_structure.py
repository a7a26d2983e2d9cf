"""How a convolution by Winograd's minimal filtering looks as stages: transform, products, transform back.

`winograd` writes it as tensor expressions, and `analyse` knows it again by writing down what the stages ought to be.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import te, tirx
from tvm.ir import Expr, Var

from schedules import epilogue
from schedules.access import as_int
from schedules.epilogue import Epilogue
from schedules.family import Kernel
from schedules.inline import inline
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.bf16_dot import PAIR
from schedules.loops import INDEX, index
from schedules.stage_parsing import parse
from schedules.stages import Stage, StagedFunction, contains, simplify_indices, substitute, variables_of
from schedules.winograd_transforms import SIZES, Matrix, Transforms, transforms

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class WinogradAnalysis:
    """A convolution of `data` [N, C/block, H, W, block] with transformed `weights` [O/block, window^2, C, block].

    Where products are of pairs of bfloat16, `weights` are [O/block, window^2, C/2, block, 2].
    `before` are the rows and columns of padding in front of the image, `size` those of the result, which `epilogue`
    follows. `axes` are the result's five indices.
    """

    data: Var
    weights: Var
    transforms: Transforms
    before: Size
    size: Size
    epilogue: Epilogue
    axes: tuple[Expr, ...]

    @property
    def in_pairs(self) -> bool:
        return str(self.weights.dtype) == BFLOAT16

    @property
    def channels(self) -> int:
        return int(self.weights.shape[2]) * (PAIR if self.in_pairs else 1)

    @property
    def block(self) -> int:
        return int(self.weights.shape[3])

    @property
    def image(self) -> Size:
        return int(self.data.shape[2]), int(self.data.shape[3])

    @property
    def tiles(self) -> Size:
        """The number of tiles along rows and columns."""
        rows, columns = (-(-extent // self.transforms.tile) for extent in self.size)
        return rows, columns


def winograd(data: te.Tensor, weights: te.Tensor, tile: int, before: Size, size: Size, stride: int = 1) -> te.Tensor:
    """Return the convolution [N, O/block, *size, block] of blocked data with weights [O/block, window^2, C > 1, block].

    The data are widened to fp32 where they are read. With weights of bfloat16 [O/block, window^2, C/2, block, 2] the
    transformed data are rounded to it, too; sums are in fp32. Zeros surround the image, `before` of them in front.
    Lanes of the data past the last channel are not read.
    """
    chosen = transforms(tile, stride)
    in_pairs = str(weights.dtype) == BFLOAT16
    window, block = chosen.window, int(weights.shape[3])
    channels = int(weights.shape[2]) * (PAIR if in_pairs else 1)
    tile_rows, tile_columns = (-(-extent // tile) for extent in size)
    y, x = (te.reduce_axis((0, window), name) for name in "yx")

    def transformed(n: Expr, c: Expr, i: Expr, j: Expr, p: Expr, q: Expr, lane: Expr) -> Expr:
        step = tile * stride
        at = (i * step + y.var - before[0], j * step + x.var - before[1])
        inside = [condition for a, e in zip(at, data.shape[2:4], strict=True) for condition in (a >= 0, a < e)]
        read = data(n, c, *at, lane).astype("float32")
        element = tirx.if_then_else(tirx.all(*inside), read, tirx.const(0, "float32"))
        factor = _coefficient(chosen.data, p, y.var) * _coefficient(chosen.data, q, x.var)
        return te.sum(factor * element, axis=[y, x])

    batch, blocks = data.shape[:2]
    spectrum = te.compute((batch, blocks, tile_rows, tile_columns, window, window, block), transformed, name="spectrum")
    c = te.reduce_axis((0, channels), "c")

    def multiplied(n: Expr, o: Expr, i: Expr, j: Expr, p: Expr, q: Expr, lane: Expr) -> Expr:
        read = spectrum(n, tirx.floordiv(c.var, block), i, j, p, q, tirx.floormod(c.var, block))
        if not in_pairs:
            return te.sum(read * weights(o, p * window + q, c.var, lane), axis=[c])
        weight = weights(o, p * window + q, tirx.floordiv(c.var, PAIR), lane, tirx.floormod(c.var, PAIR))
        return te.sum(read.astype(BFLOAT16).astype("float32") * weight.astype("float32"), axis=[c])

    shape = (batch, weights.shape[0], tile_rows, tile_columns, window, window, block)
    products = te.compute(shape, multiplied, name="products")
    p, q = (te.reduce_axis((0, window), name) for name in "pq")

    def result(n: Expr, o: Expr, row: Expr, column: Expr, lane: Expr) -> Expr:
        i, j = tirx.floordiv(row, tile), tirx.floordiv(column, tile)
        factor = _coefficient(chosen.outputs, tirx.floormod(row, tile), p.var) * _coefficient(
            chosen.outputs, tirx.floormod(column, tile), q.var
        )
        return te.sum(factor * products(n, o, i, j, p.var, q.var, lane), axis=[p, q])

    return te.compute((batch, weights.shape[0], *size, block), result, name="conv")


def _coefficient(matrix: Matrix, row: Expr, column: Expr) -> Expr:
    """Return the element of a constant matrix as a choice among its values."""
    value: Expr = tirx.const(0.0, "float32")
    for i, coefficients in enumerate(matrix):
        for j, coefficient in enumerate(coefficients):
            if coefficient:
                here = tirx.all(row == i, column == j)
                value = tirx.Select(here, tirx.const(coefficient, "float32"), value)
    return value


@functools.lru_cache(maxsize=1024)
def whole(staged: StagedFunction) -> Kernel | None:
    """Return the function as one kernel if it is one such convolution, with what follows it in one stage."""
    stages = inline(staged).stages if len(staged.stages) >= 3 else ()
    kernel = Kernel(tuple(stage for stage in stages if isinstance(stage, Stage)), staged.intermediate)
    return kernel if len(kernel.stages) == len(stages) and analyse(kernel) is not None else None


def analyse(kernel: Kernel) -> WinogradAnalysis | None:
    """Return the analysis of a kernel of the three stages of `winograd` and one that may follow them."""
    if len(kernel.stages) not in (3, 4) or not all(stage.is_reduction for stage in kernel.stages[:3]):
        return None
    found = kernel.stages[:3]
    spectrum, products, result = found
    reads = [load.source for load in products.loads() if not load.source.same_as(spectrum.output)]
    data = spectrum.loads()
    if len(reads) != 1 or len(data) != 1 or len(reads[0].shape) not in (4, 5) or len(data[0].indices) != 5:
        return None
    size = tuple(map(as_int, result.output.shape[2:4])) if len(result.output.shape) == 5 else ()
    before = tuple(map(_offset, data[0].indices[2:4]))
    if len(size) != 2 or None in (*size, *before, *map(as_int, data[0].source.shape[1:])):
        return None
    rows, columns = (int(value or 0) for value in size)
    top, left = (-int(value or 0) for value in before)
    known = [transforms(tile, stride) for stride, tiles in SIZES.items() for tile in tiles]
    chosen = next(
        (
            each
            for each in known
            if as_int(reads[0].shape[1]) == each.window**2
            and _same(_expected(data[0].source, reads[0], each, (top, left), (rows, columns)), found)
        ),
        None,
    )
    if chosen is None:
        return None
    follows = epilogue.match(result, kernel.stages[3]) if len(kernel.stages) == 4 else epilogue.plain(result)
    kept = len(kernel.stages) == 3 or contains(kernel.private, result.output)
    if follows is None or not kept or not all(contains(kernel.private, s.output) for s in (spectrum, products)):
        return None
    return WinogradAnalysis(data[0].source, reads[0], chosen, (top, left), (rows, columns), follows, result.indices)


def _offset(position: Expr) -> int | None:
    """Return the constant term of an index."""
    zeros = {variable: index(0) for variable in variables_of(position)}
    return as_int(simplify_indices([substitute(position, zeros)])[0])


def _expected(data: Var, weights: Var, chosen: Transforms, before: Size, size: Size) -> Sequence[Stage]:
    """Return the stages of `winograd`."""
    image = te.placeholder(tuple(data.shape), str(data.dtype), "data")
    filters = te.placeholder(tuple(weights.shape), str(weights.dtype), "weights")
    result = winograd(image, filters, chosen.tile, before, size, chosen.stride)
    staged = parse(te.create_prim_func([image, filters, result], INDEX))
    assert staged is not None
    return [stage for stage in staged.stages if isinstance(stage, Stage)]


def _same(expected: Sequence[Stage], found: Sequence[Stage]) -> bool:
    """Return whether two lists of stages compute the same from their inputs."""
    left, right = ([_content(stage) for stage in stages] for stages in (expected, found))
    return bool(tvm_ffi.structural_equal(left, right, map_free_vars=True))


def _content(stage: Stage) -> list[object]:
    axes = [(axis.variable, axis.extent) for axis in stage.axes]
    return [stage.output, axes, list(stage.indices), stage.initial, stage.value]
