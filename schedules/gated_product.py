"""Two products of the same rows, of which the second one's epilogue reads the first one's result: SwiGLU, GeGLU.

A task computes its block of rows and columns of the first product into memory of its own, then the same block of the
second one, whose epilogue reads it there: the first one's matrix is never stored whole. The products are of packed
matrices, both of floats or both of quantized weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules import tiling
from schedules.access import AxisGroup, as_int
from schedules.convolution import Convolution
from schedules.direct_convolution import DirectConvolution
from schedules.epilogue import Epilogue
from schedules.family import Choice, Kernel, Parameters, Space, defaults
from schedules.inline import inline
from schedules.intrin.matrix_tiles import BLOCK
from schedules.kernels import cut, reuses_operands
from schedules.loops import Extent, flatten, index, load, local, tiles, with_local
from schedules.matmul import Matmul, MatmulAnalysis, tile_of
from schedules.quantized_matmul import (
    ROW_BLOCK,
    QuantizedEmitter,
    QuantizedMatmul,
    QuantizedMatmulAnalysis,
    ceiling_int,
    row_alone,
    where_alone,
)
from schedules.quantized_tiles import in_tiles, where_many
from schedules.stages import OpaqueStage, Stage, StagedFunction, contains, replace_loads, substitute
from targets.base import Target

# Tasks for each core. With more and shorter ones the two matrices are read by turns of a few pages, which takes up to
# 12 % longer where they come from memory (8 rows, 2048 x 8192, fp32, Zen 4); with fewer, cores wait for the last one.
TASKS_OF_A_CORE = 4
# The same for a row alone, which takes little beside its weights: whenever a task turns from one matrix to the other,
# memory has to be asked anew.
TASKS_OF_A_ROW = 2
# The part of the second-level cache that may hold what is handed on, beside both matrices' columns.
SCRATCH_PART = 4

Product = MatmulAnalysis | QuantizedMatmulAnalysis


@dataclass(frozen=True, eq=False)
class GatedKernel(Kernel):
    """Two products, in order of execution; the second one's epilogue reads what the first one stores."""

    products: tuple[Kernel, ...] = ()


@dataclass(frozen=True, eq=False)
class GatedProductAnalysis:
    """The two products, both of the same family."""

    first: Product
    second: Product


@functools.lru_cache(maxsize=1024)
def whole(staged: StagedFunction) -> GatedKernel | None:
    """Return a function of two products, the second of which takes in the first one, as one kernel; None if not."""
    stages = [stage for stage in staged.stages if isinstance(stage, Stage)]
    if len(stages) != len(staged.stages) or sum(stage.is_reduction for stage in stages) != 2:
        return None
    kernels = cut(inline(staged))
    products = [kernel for kernel in kernels if not isinstance(kernel, OpaqueStage) and _is_product(kernel)]
    if len(kernels) != 2 or len(products) != 2:
        return None
    first, second = products
    made = first.stages[-1].output
    if not contains(staged.intermediate, made) or any(read.source.same_as(made) for read in second.stages[0].loads()):
        return None
    if not any(read.source.same_as(made) for stage in second.stages[1:] for read in stage.loads()):
        return None
    return GatedKernel((*first.stages, *second.stages), (made,), products=(first, second))


def _is_product(kernel: Kernel) -> bool:
    return kernel.stages[0].is_reduction and reuses_operands(kernel.stages[0])


def columns_of(product: Product) -> AxisGroup:
    """Return the axis of a product whose elements lie in lanes."""
    return product.columns if isinstance(product.columns, AxisGroup) else AxisGroup((product.columns,))


class GatedProduct:
    """Two register-tiled products in one parallel loop."""

    name = "gated-product"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> GatedProductAnalysis | None:
        """Return the analysis of two products with packed weights and the same rows and columns."""
        return (
            _analyse(kernel, target) if isinstance(kernel, GatedKernel) and not self.refusal(kernel, target) else None
        )

    def refusal(self, kernel: GatedKernel, target: Target) -> str | None:
        """Return why the products are better kernels of their own; None where they make one."""
        analysis = _analyse(kernel, target)
        if analysis is None:
            return "the products are not both of plain matrices, or both of quantized ones"
        first, second = analysis.first, analysis.second
        if isinstance(first, MatmulAnalysis) and isinstance(second, MatmulAnalysis):
            if not first.block or not second.block:
                return "the matrix of one of the products is not constant"
            if _kind(first) != _kind(second):
                return "the products are of different types"
        if not any(contains(_sources(second), source) for source in _sources(first)):
            return "the products read different rows"
        return None if _same_elements(first, second) else "an element of the gate is not one of each product"

    def space(self, target: Target, analysis: GatedProductAnalysis) -> Space:
        """Return the parameters of one of the products, and how many tiles of columns a task computes of each."""
        second = analysis.second
        if isinstance(second, QuantizedMatmulAnalysis):
            own = QuantizedMatmul().space(target, second)
            width = QuantizedEmitter.of(second, defaults(own), target).width
        else:
            own = tuple(choice for choice in Matmul().space(target, second) if choice.name != "panel_rows")
            width = _tiles(analysis, defaults(own), target)[1].width
        return (*own, Choice("strips", _strips(target, second, width), (1, 2, 4, 8, 16, 32)))

    def apply(self, analysis: GatedProductAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the parallel loop over blocks of rows and columns."""
        if isinstance(analysis.second, QuantizedMatmulAnalysis):
            return _of_integers(analysis, parameters, target)
        return _of_floats(analysis, parameters, target)


def _analyse(kernel: GatedKernel, target: Target) -> GatedProductAnalysis | None:
    others = (DirectConvolution(), Convolution())
    if any(other.takes(part, target) is not None for other in others for part in kernel.products):
        return None
    for family in (QuantizedMatmul(), Matmul()):
        first, second = (family.takes(part, target) for part in kernel.products)
        if first is not None and second is not None:
            return GatedProductAnalysis(first, second)
    return None


def _kind(product: MatmulAnalysis) -> tuple[object, ...]:
    """Return what has to agree for both products to have tiles of the same size."""
    return product.block, product.group, str(product.stage.output.dtype), str(product.operand.source.dtype)


def _sources(product: Product) -> list[Var]:
    return [read.source for read in product.stage.loads()]


def _strips(target: Target, product: Product, width: int) -> int:
    """Return how many tiles of `width` columns leave every core its tasks, and fit the cache."""
    columns = columns_of(product).extent
    if not isinstance(columns, int):
        return 1
    scratch = _most_rows(product) * width * 4
    fitting = target.caches.level2 // SCRATCH_PART // scratch
    return max(1, min(-(-columns // width) // (TASKS_OF_A_CORE * target.cores), fitting))


def _most_rows(product: Product) -> int:
    """Return how many rows a task has at most under the defaults."""
    rows: Extent = product.rows.extent if product.rows is not None else 1
    return min(rows, ROW_BLOCK) if isinstance(rows, int) else ROW_BLOCK


def _tiles(analysis: GatedProductAnalysis, parameters: Parameters, target: Target) -> tuple[tiling.Tile, tiling.Tile]:
    first, second = analysis.first, analysis.second
    assert isinstance(first, MatmulAnalysis)
    assert isinstance(second, MatmulAnalysis)
    height, vectors = parameters["rows"], parameters["vectors"]
    block = max(height, parameters["row_block"] // height * height)
    one, other = (tile_of(each, target, (height, vectors), block, None) for each in (first, second))
    return one, other


def _of_floats(analysis: GatedProductAnalysis, parameters: Parameters, target: Target) -> Stmt:
    pair = _tiles(analysis, parameters, target)
    depth, run = pair[1].row_block if pair[1].row_group is not None else 1, pair[1].width * parameters["strips"]

    def both(_: Mapping[Var, Expr], base: Expr, columns: int, number: Expr) -> Stmt:
        scratch, epilogues = _through_scratch(analysis, (depth, run), (number * depth, base))

        def part(tile: tiling.Tile) -> Stmt:
            def block_of_columns(start: Expr, width: int) -> Stmt:
                return tiling.block_of_rows(tile, {}, base + start, width, number)

            return tiles(columns, [tile.width], tiling.in_whole_vectors(tile, block_of_columns))

        first, second = (replace(tile, epilogue=own) for tile, own in zip(pair, epilogues, strict=True))
        return with_local([scratch], [part(replace(first, handed_on=True)), part(second)])

    return tiling.emit(replace(pair[1], width=run), both)


def _of_integers(analysis: GatedProductAnalysis, parameters: Parameters, target: Target) -> Stmt:
    first, second = analysis.first, analysis.second
    assert isinstance(first, QuantizedMatmulAnalysis)
    assert isinstance(second, QuantizedMatmulAnalysis)
    many = _in_strips(first, second, parameters, target)
    tiled = _in_tiles(first, second, target)
    if tiled is not None and second.rows is not None:
        many = where_many(second.rows.extent, tiled, many)
    first_alone, second_alone = row_alone(first), row_alone(second)
    if first_alone is None or second_alone is None:
        return many
    count = ceiling_int(second.columns.extent, QuantizedEmitter.of(second_alone, parameters, target).width)
    strips = ceiling_int(count, TASKS_OF_A_ROW * target.cores)
    return where_alone(second, _in_strips(first_alone, second_alone, {**parameters, "strips": strips}, target), many)


def _in_tiles(first: QuantizedMatmulAnalysis, second: QuantizedMatmulAnalysis, target: Target) -> Stmt | None:
    """Return both products of many rows block by block in tile registers; None where there are none, or for others."""
    one, other = first.operands, second.operands
    same = all(a.source.same_as(b.source) for a, b in ((one.codes, other.codes), (one.scales, other.scales)))
    if not same or first.product.activation_group != second.product.activation_group:
        return None

    def hand_on(row: Expr, column: Expr) -> tuple[Sequence[Var], Sequence[Epilogue]]:
        scratch, epilogues = _through_scratch(GatedProductAnalysis(first, second), (BLOCK, BLOCK), (row, column))
        return [scratch], epilogues

    return in_tiles([first, second], target, hand_on)


def _in_strips(
    first: QuantizedMatmulAnalysis, second: QuantizedMatmulAnalysis, parameters: Parameters, target: Target
) -> Stmt:
    emitter = QuantizedEmitter.of(second, parameters, target)
    depth, run = _most_rows(second), emitter.width * parameters["strips"]

    def both(_: Mapping[Var, Expr], base: Expr, columns: int, number: Expr) -> Stmt:
        pair = GatedProductAnalysis(first, second)
        rows = emitter.rows_of(number)
        scratch, epilogues = _through_scratch(pair, (depth, run), (rows[0], base))

        def part(product: QuantizedMatmulAnalysis, own: Epilogue) -> Stmt:
            each = QuantizedEmitter.of(replace(product, epilogue=own), parameters, target)
            return tiles(columns, [each.width], lambda start, width: each.strip({}, base + start, width, rows))

        return with_local([scratch], [part(first, epilogues[0]), part(second, epilogues[1])])

    return emitter.statement(both, run)


def _through_scratch(
    analysis: GatedProductAnalysis, shape: tuple[int, int], start: tuple[Expr, Expr]
) -> tuple[Var, tuple[Epilogue, Epilogue]]:
    """Return memory of `shape`, whose first element is the one at `start`, and epilogues that hand on through it."""
    first, second = analysis.first, analysis.second
    made = first.epilogue.stage.output
    scratch = local(shape, str(made.dtype), "gated")

    def place(product: Product) -> list[Expr]:
        row = _position(product.rows) if product.rows is not None else start[0]
        return [row - start[0], _position(columns_of(product)) - start[1]]

    def read(other: TensorLoad) -> Expr | None:
        return load(scratch, place(second)) if other.source.same_as(made) else None

    follows = first.epilogue
    # A stage of its own, even where nothing follows: the sum is stored elsewhere than where the reduction stores it.
    value = follows.value if follows.stage is not follows.source else load(made, list(follows.source.indices))
    stored = Epilogue(follows.source, replace(follows.stage, output=scratch), tuple(place(first)), value)
    taken = replace(second.epilogue, value=replace_loads(second.epilogue.value, read))
    return scratch, (stored, taken)


def _position(group: AxisGroup) -> Expr:
    return flatten([axis.variable for axis in group.axes], [axis.extent for axis in group.axes])


def _same_elements(first: Product, second: Product) -> bool:
    """Return whether the second one's epilogue reads the first one's element of the same row and column."""
    if first.outer or second.outer or (first.rows is None) != (second.rows is None):
        return False
    pairs = [(columns_of(first), columns_of(second))]
    if first.rows is not None and second.rows is not None:
        pairs.append((first.rows, second.rows))
    own: dict[Var, Expr] = {}
    for left, right in pairs:
        if len(left.axes) != len(right.axes):
            return False
        for a, b in zip(left.axes, right.axes, strict=True):
            if not _equal(index(a.extent), index(b.extent)):
                return False
            own[a.variable] = b.variable
    made = first.epilogue.stage.output
    expected = [substitute(each, own) for each in first.epilogue.indices]
    return all(_agree(read.indices, expected) for read in _reads(second.epilogue.value, made))


def _reads(value: Expr, buffer: Var) -> list[TensorLoad]:
    reads: list[TensorLoad] = []
    replace_loads(value, lambda other: reads.append(other) if other.source.same_as(buffer) else None)
    return reads


def _agree(left: Sequence[Expr], right: Sequence[Expr]) -> bool:
    return all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(left: Expr, right: Expr) -> bool:
    """Return whether two indices are the same, constants of whatever width."""
    constant = as_int(left)
    return as_int(right) == constant if constant is not None else bool(tvm_ffi.structural_equal(left, right))
