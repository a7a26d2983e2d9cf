"""How a convolution by Winograd's minimal filtering looks as stages: transform, products, transform back.

`winograd` writes it as tensor expressions, and `analyse` knows it again by writing down what the stages ought to be.

Of bytes that lie as words, with weights of words, all is exact: transforms are of integers, and sums modulo 2**32, of
which the result is a known multiple. An odd factor of it has an inverse there, and a power of two a shift undoes, where
the multiple by that alone is a number of 32 bits: `largest_result` says what may come out.
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
from schedules.intrin.byte_dot import WORD
from schedules.loops import INDEX, index
from schedules.stage_parsing import parse
from schedules.stages import Stage, StagedFunction, contains, simplify_indices, substitute, variables_of
from schedules.winograd_transforms import SIZES, Matrix, Transforms, integer_transforms, transforms

Size = tuple[int, int]
# Sums of integers: what dot products add to, and the same modulo 2**32.
_SUM, WRAPPING = "int32", "uint32"
_BITS = 32
# Those of weights that are in no pairs.
FEWEST_AXES = 4


@dataclass(frozen=True, eq=False)
class WinogradAnalysis:
    """A convolution of `data` [N, C/block, H, W, block] with transformed `weights` [O/block, window^2, C, block].

    Where products are of pairs of bfloat16 or of words, `weights` are [O/block, window^2, C/2, block, 2].
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
        return len(self.weights.shape) > FEWEST_AXES

    @property
    def in_words(self) -> bool:
        return str(self.weights.dtype) == WORD

    @property
    def element(self) -> str:
        """The type of the image's transform."""
        return WORD if self.in_words else "float32"

    @property
    def total(self) -> str:
        """The type of the products' sums."""
        return _SUM if self.in_words else "float32"

    @property
    def wrapping(self) -> str:
        """The type in which these are transformed back."""
        return WRAPPING if self.in_words else "float32"

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
    transformed data are rounded to it, too; sums are in fp32. With weights of int16 the data are bytes as int16, and
    the result is of int32. Zeros surround the image, `before` of them in front. Lanes of the data past the last channel
    are not read.
    """
    dtype = str(weights.dtype)
    in_pairs, in_words = dtype in (BFLOAT16, WORD), dtype == WORD
    chosen = integer_transforms(tile, stride) if in_words else transforms(tile, stride)
    of_data, of_sums = (WORD, WRAPPING) if in_words else ("float32", "float32")
    window, block = chosen.window, int(weights.shape[3])
    channels = int(weights.shape[2]) * (PAIR if in_pairs else 1)
    tile_rows, tile_columns = (-(-extent // tile) for extent in size)
    y, x = (te.reduce_axis((0, window), name) for name in "yx")

    def transformed(n: Expr, c: Expr, i: Expr, j: Expr, p: Expr, q: Expr, lane: Expr) -> Expr:
        step = tile * stride
        at = (i * step + y.var - before[0], j * step + x.var - before[1])
        inside = [condition for a, e in zip(at, data.shape[2:4], strict=True) for condition in (a >= 0, a < e)]
        read = data(n, c, *at, lane).astype(of_data)
        element = tirx.if_then_else(tirx.all(*inside), read, tirx.const(0, of_data))
        factor = _coefficient(chosen.data, p, y.var, of_data) * _coefficient(chosen.data, q, x.var, of_data)
        return te.sum(factor * element, axis=[y, x])

    batch, blocks = data.shape[:2]
    spectrum = te.compute((batch, blocks, tile_rows, tile_columns, window, window, block), transformed, name="spectrum")
    c = te.reduce_axis((0, channels), "c")

    def multiplied(n: Expr, o: Expr, i: Expr, j: Expr, p: Expr, q: Expr, lane: Expr) -> Expr:
        read = spectrum(n, tirx.floordiv(c.var, block), i, j, p, q, tirx.floormod(c.var, block))
        if not in_pairs:
            return te.sum(read * weights(o, p * window + q, c.var, lane), axis=[c])
        weight = weights(o, p * window + q, tirx.floordiv(c.var, PAIR), lane, tirx.floormod(c.var, PAIR))
        if in_words:
            return te.sum((read.astype(_SUM) * weight.astype(_SUM)).astype(of_sums), axis=[c])
        return te.sum(read.astype(BFLOAT16).astype("float32") * weight.astype("float32"), axis=[c])

    shape = (batch, weights.shape[0], tile_rows, tile_columns, window, window, block)
    products = te.compute(shape, multiplied, name="products")
    p, q = (te.reduce_axis((0, window), name) for name in "pq")

    def result(n: Expr, o: Expr, row: Expr, column: Expr, lane: Expr) -> Expr:
        i, j = tirx.floordiv(row, tile), tirx.floordiv(column, tile)
        factor = _coefficient(chosen.outputs, tirx.floormod(row, tile), p.var, of_sums) * _coefficient(
            chosen.outputs, tirx.floormod(column, tile), q.var, of_sums
        )
        return te.sum(factor * products(n, o, i, j, p.var, q.var, lane), axis=[p, q])

    shape = (batch, weights.shape[0], *size, block)
    if not in_words:
        return te.compute(shape, result, name="conv")
    multiple = te.compute(shape, result, name="multiple")
    return te.compute(shape, lambda *at: _divided(multiple(*at), chosen.scale**2), name="conv")


def largest_result(tile: int, stride: int) -> int:
    """Return the bound that magnitudes of results of integers stay below."""
    return 2 ** (_BITS - 1) >> _factors(integer_transforms(tile, stride).scale ** 2)[1]


def _factors(divisor: int) -> tuple[int, int]:
    """Return the odd factor of a number and the exponent of the power of two."""
    shift = (divisor & -divisor).bit_length() - 1
    return divisor >> shift, shift


def _divided(multiple: Expr, divisor: int) -> Expr:
    """Return a multiple of `divisor`, known modulo 2**32, divided by it."""
    odd, shift = _factors(divisor)
    if odd > 1:
        multiple = multiple * tirx.const(pow(odd, -1, 2**_BITS), WRAPPING)
    number = tirx.reinterpret(_SUM, multiple)
    return tirx.shift_right(number, tirx.const(shift, _SUM)) if shift else number


def _coefficient(matrix: Matrix, row: Expr, column: Expr, dtype: str) -> Expr:
    """Return the element of a constant matrix as a choice among its values."""
    value: Expr = tirx.const(0, dtype)
    for i, coefficients in enumerate(matrix):
        for j, coefficient in enumerate(coefficients):
            if coefficient:
                here = tirx.all(row == i, column == j)
                number = coefficient % 2**_BITS if dtype == WRAPPING else coefficient
                value = tirx.Select(here, tirx.const(number, dtype), value)
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
    axes = (FEWEST_AXES, FEWEST_AXES + 1)
    if len(reads) != 1 or len(data) != 1 or len(reads[0].shape) not in axes or len(data[0].indices) != 5:
        return None
    size = tuple(map(as_int, result.output.shape[2:4])) if len(result.output.shape) == 5 else ()
    before = tuple(map(_offset, data[0].indices[2:4]))
    if len(size) != 2 or None in (*size, *before, *map(as_int, data[0].source.shape[1:])):
        return None
    rows, columns = (int(value or 0) for value in size)
    top, left = (-int(value or 0) for value in before)
    of_type = integer_transforms if str(reads[0].dtype) == WORD else transforms
    known = [of_type(tile, stride) for stride, tiles in SIZES.items() for tile in tiles]
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
    """Return the stages of `winograd` that are sums."""
    image = te.placeholder(tuple(data.shape), str(data.dtype), "data")
    filters = te.placeholder(tuple(weights.shape), str(weights.dtype), "weights")
    result = winograd(image, filters, chosen.tile, before, size, chosen.stride)
    staged = parse(te.create_prim_func([image, filters, result], INDEX))
    assert staged is not None
    return [stage for stage in staged.stages if isinstance(stage, Stage) and stage.is_reduction]


def _same(expected: Sequence[Stage], found: Sequence[Stage]) -> bool:
    """Return whether two lists of stages compute the same from their inputs."""
    left, right = ([_content(stage) for stage in stages] for stages in (expected, found))
    return bool(tvm_ffi.structural_equal(left, right, map_free_vars=True))


def _content(stage: Stage) -> list[object]:
    axes = [(axis.variable, axis.extent) for axis in stage.axes]
    return [stage.output, axes, list(stage.indices), stage.initial, stage.value]
