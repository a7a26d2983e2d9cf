"""Products with the normalizations around them in one launch: layer norm, RMS norm, softmax, before or after.

What rounds the rows of a product in tile registers is such a part, too.

Where there are rows enough for all cores, each thread owns a share of the rows: it computes all columns of them and
normalizes them while they lie in its own caches, and no thread waits for another. Each reads all weights, which is why
it takes many rows. Where there are few, or where their number is unknown, the threads share the columns as in a product
alone, wait for each other, and then share the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules import tiling
from schedules.access import AxisGroup, as_int
from schedules.convolution import Convolution
from schedules.direct_convolution import DirectConvolution
from schedules.family import PARALLEL_THRESHOLD, Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.bf16_rounding import rounds_in_vectors, with_rounding
from schedules.intrin.matrix_tiles import BLOCK
from schedules.loops import Extent, parallel, product, region, then_wait, tile_choice, tiles
from schedules.matmul import Matmul, MatmulAnalysis, matrix_operands, tile_of, with_next_rows
from schedules.quantized_matmul import QuantizedMatmul
from schedules.register_tile import register_tile
from schedules.rounded_rows import leading_of, only_rounds, rounded_rows
from schedules.row_parts import PartedKernel
from schedules.rowwise import Rowwise, RowwiseAnalysis, consecutive_rows, in_tasks, row_extents
from schedules.stages import contains, loads_of, sequence
from targets.base import Target

# Rows for each core from which on it gets blocks of rows: with fewer, reading all weights costs more than waiting (with
# 64 rows for each of two threads products of 3072 x 768 took 9 % longer, Zen 4).
ROWS_TO_OWN = 128
# Rows that are rounded alone lie in a core's own cache then: products of 384 and of 512 cubed take a quarter less time
# than with a kernel before them (Granite Rapids).
ROUNDED_ROWS_TO_OWN = BLOCK + 1
# Rows of a block: enough to read weights seldom, few enough that they stay in the second-level cache.
MOST_ROWS_OF_BLOCK = 128

Part = MatmulAnalysis | RowwiseAnalysis


@dataclass(frozen=True, eq=False)
class NormalizedProductAnalysis:
    """The parts in order of execution, the product among them.

    `same_rows` says that every part reads of the earlier ones only the row that it computes, so that one thread may
    compute some rows of all parts.
    """

    parts: tuple[Part, ...]
    product: MatmulAnalysis
    same_rows: bool


class NormalizedProduct:
    """A product and functions of rows in one parallel region."""

    name = "normalized-product"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> NormalizedProductAnalysis | None:
        """Return the analysis of a kernel of parts whose product is a plain one."""
        if not isinstance(kernel, PartedKernel) or self.refusal(kernel, target) is not None:
            return None
        contraction = kernel.parts[kernel.product]
        taken = [
            Matmul().takes(part, target) if part is contraction else _rows_of(part, target) for part in kernel.parts
        ]
        parts = tuple(part for part in taken if part is not None)
        analysis = parts[kernel.product]
        assert len(parts) == len(kernel.parts)
        assert isinstance(analysis, MatmulAnalysis)
        return NormalizedProductAnalysis(parts, analysis, same_rows(parts, analysis))

    def refusal(self, kernel: PartedKernel, target: Target) -> str | None:
        """Return why the parts are better kernels of their own; None where they make one."""
        contraction = kernel.parts[kernel.product]
        others = (DirectConvolution(), QuantizedMatmul(), Convolution())
        if any(other.takes(contraction, target) for other in others) or Matmul().takes(contraction, target) is None:
            return "the product is not one of plain matrices"
        for part in kernel.parts:
            if part is contraction:
                continue
            rows = _rows_of(part, target)
            if rows is None:
                return "the normalization is not one of rows"
            count = product(row_extents(rows))
            if isinstance(count, int) and count == 1:
                return "there is one row alone: while a thread normalizes it, the others would wait"
            if only_rounds(part.stages) and not _may_round(contraction, target):
                return "the product is none in tile registers of so many rows as are known"
        return None

    def space(self, target: Target, analysis: NormalizedProductAnalysis) -> Space:
        """Return the parameters of the product, whether threads own rows, and the vectors of a statement on rows."""
        return (
            *Matmul().space(target, analysis.product),
            Choice("owned_rows", _rows_of_block(target, analysis), (0, 32, 64, 96, 128, 256)),
            Choice("row_vectors", 2, (1, 2, 4)),
        )

    def apply(self, analysis: NormalizedProductAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the region; without one where there is too little work for several threads."""
        if parameters["owned_rows"] and _may_own(analysis):
            result = in_blocks_of_rows(analysis.parts, parameters, target)
        else:
            result = _by_turns(analysis, parameters, target)
        return with_instructions(analysis.parts, result, target)


def with_instructions(parts: Sequence[Part], statement: Stmt, target: Target) -> Stmt:
    """Return a statement that computes parts, with the function that rounds their rows, where one of them does."""
    rounds = any(isinstance(part, RowwiseAnalysis) and only_rounds(part.stages) for part in parts)
    return with_rounding(statement, target) if rounds and rounds_in_vectors(target) else statement


def _by_turns(analysis: NormalizedProductAnalysis, parameters: Parameters, target: Target) -> Stmt:
    """Return all rows of one part after the other, of each of which all threads take some."""
    large = is_large(work_of(analysis.product.stage))

    def rows(part: RowwiseAnalysis) -> Stmt:
        work = PARALLEL_THRESHOLD if large else 0
        return in_tasks(
            product(row_extents(part)),
            work,
            target,
            lambda start, count: _some_rows(part, start, count, parameters, target),
        )

    statements = [
        Matmul().apply(part, parameters, target) if isinstance(part, MatmulAnalysis) else rows(part)
        for part in analysis.parts
    ]
    return region([*map(then_wait, statements[:-1]), statements[-1]]) if large else sequence(statements)


def _some_rows(part: RowwiseAnalysis, start: Expr, count: Extent, parameters: Parameters, target: Target) -> Stmt:
    """Return a part's code for rows [start, start + count)."""
    if only_rounds(part.stages):
        return rounded_rows(part.stages[0], start, count, target)
    return consecutive_rows(part, start, count, parameters["row_vectors"], target)


def _rows_of(part: Kernel, target: Target) -> RowwiseAnalysis | None:
    """Return the analysis of a function of rows, or of what rounds each element of them."""
    if only_rounds(part.stages):
        return RowwiseAnalysis(part.stages, leading_of(part.stages[0]), ())
    return Rowwise().takes(part, target)


def _may_round(contraction: Kernel, target: Target) -> bool:
    """Return whether a product's rows may be rounded in its kernel: where they come rounded to tile registers."""
    analysis = Matmul().takes(contraction, target)
    if analysis is None or matrix_operands(analysis, target) is None:
        return False
    return isinstance(_rows(analysis), int)


def _may_own(analysis: NormalizedProductAnalysis) -> bool:
    """Return whether a task may compute all parts of some rows: their number is known, and the work large."""
    contraction = analysis.product
    static = isinstance(contraction.columns.extent, int) and isinstance(_rows(contraction), int)
    return analysis.same_rows and static and is_large(work_of(contraction.stage))


def _rows_of_block(target: Target, analysis: NormalizedProductAnalysis) -> int:
    """Return the rows of a task that leave every core equally many; 0 where there are too few."""
    rows = _rows(analysis.product)
    if not _may_own(analysis) or not isinstance(rows, int) or rows < target.cores * _rows_to_own(analysis):
        return 0
    height = register_tile(target)[0] if matrix_operands(analysis.product, target) is None else BLOCK
    tasks = target.cores * -(-rows // (target.cores * MOST_ROWS_OF_BLOCK))
    return -(-rows // (tasks * height)) * height


def _rows_to_own(analysis: NormalizedProductAnalysis) -> int:
    """Return how many rows for each core are worth reading all weights for them."""
    rounds = [isinstance(part, RowwiseAnalysis) and only_rounds(part.stages) for part in analysis.parts]
    return ROUNDED_ROWS_TO_OWN if any(rounds) and len(rounds) == 2 else ROWS_TO_OWN


def _rows(analysis: MatmulAnalysis) -> Extent:
    return 1 if analysis.rows is None else analysis.rows.extent


def same_rows(parts: Sequence[Part], contraction: MatmulAnalysis) -> bool:
    """Return whether row i of each part needs of the other parts row i alone."""
    rows, follows = contraction.rows, contraction.epilogue
    if rows is None or contraction.outer or not isinstance(rows.extent, int):
        return False
    for part in parts:
        if isinstance(part, MatmulAnalysis):
            continue
        leading = part.leading
        made = [stage.output for stage in part.stages]
        read_before = [load for value in (contraction.stage.value, follows.value) for load in loads_of(value)]
        read_after = [
            (load, stage)
            for stage in part.stages
            for load in stage.loads()
            if load.source.same_as(follows.stage.output)
        ]
        count = product(row_extents(part))
        if not isinstance(count, int) or count != rows.extent:
            return False
        if not all(is_row(load.indices, leading, rows) for load in read_before if contains(made, load.source)):
            return False
        if read_after and not is_row(follows.indices, leading, rows):
            return False
        if not all(_agree(load.indices[:leading], stage.indices[:leading]) for load, stage in read_after):
            return False
    return _read_no_further(parts)


def _read_no_further(parts: Sequence[Part]) -> bool:
    """Return whether no two functions of rows read of each other."""
    around = [part for part in parts if isinstance(part, RowwiseAnalysis)]
    return not any(
        load.source.same_as(other.output)
        for part in around
        for stage in part.stages
        for load in stage.loads()
        for elsewhere in around
        if elsewhere is not part
        for other in elsewhere.stages
    )


def is_row(indices: Sequence[Expr], leading: int, rows: AxisGroup) -> bool:
    """Return whether the leading indices are the axes of `rows`, each once and in order, and zeros."""
    moving = [index for index in indices[:leading] if as_int(index) != 0]
    return len(moving) == len(rows.axes) and all(
        index.same_as(axis.variable) for index, axis in zip(moving, rows.axes, strict=True)
    )


def _agree(left: Sequence[Expr], right: Sequence[Expr]) -> bool:
    return all(tvm_ffi.structural_equal(a, b) for a, b in zip(left, right, strict=True))


def in_blocks_of_rows(parts: Sequence[Part], parameters: Parameters, target: Target) -> Stmt:
    """Return the parallel loop over blocks of rows, of each of which a task computes all parts and all columns."""
    products = [part for part in parts if isinstance(part, MatmulAnalysis)]
    tiles_of = [_tile_of_rows(each, parts, parameters, target) for each in products]
    rows, block = _rows(products[0]), tiles_of[0].row_block
    assert isinstance(rows, int)

    def task(number: Expr) -> Stmt:
        def part(analysis: Part) -> Stmt:
            if isinstance(analysis, MatmulAnalysis):
                tile = next(tile for each, tile in zip(products, tiles_of, strict=True) if each is analysis)
                return _columns(tile, number)
            return tile_choice(
                number, rows, block, lambda start, count: _some_rows(analysis, start, count, parameters, target)
            )

        return sequence([part(each) for each in parts])

    return tiling.with_instructions(tiles_of[0], parallel(-(-rows // block), task))


def _tile_of_rows(
    contraction: MatmulAnalysis, parts: Sequence[Part], parameters: Parameters, target: Target
) -> tiling.Tile:
    """Return the register tile of a product, one of the parts that a task computes of its block of rows."""
    height = parameters["rows"] if matrix_operands(contraction, target) is None else BLOCK
    rows = _rows(contraction)
    assert isinstance(rows, int)
    block = height * _even_block(-(-rows // height), max(1, parameters["owned_rows"] // height), target.cores)
    panel = None if contraction.block else contraction.operand
    tile = tile_of(contraction, target, (height, parameters["vectors"]), block, panel)
    made: list[Var] = []
    for part in parts:
        if part is not contraction:
            made += (
                [part.epilogue.stage.output] if isinstance(part, MatmulAnalysis) else [s.output for s in part.stages]
            )
    if any(isinstance(part, MatmulAnalysis) for part in parts[list(parts).index(contraction) + 1 :]):
        tile = replace(tile, handed_on=True)
    comes_from_memory = not any(contains(made, read.source) for read in contraction.stage.loads())
    return with_next_rows(tile, contraction, target) if comes_from_memory else tile


def _columns(tile: tiling.Tile, number: Expr) -> Stmt:
    """Return all columns of a block of rows."""
    columns = tile.vector_group.extent
    assert isinstance(columns, int)

    def of_columns(base: Expr, width: int) -> Stmt:
        return tiling.block_of_rows(tile, {}, base, width, number)

    return tiles(columns, [tile.width], tiling.in_whole_vectors(tile, of_columns))


def _even_block(count: int, most: int, cores: int) -> int:
    """Return the size of blocks of `count` tiles, at most `most`, with which the core that has most has least to do.

    Of several the largest. Only the last block is shorter: sizes that depend on a block's number leave those of the
    rows it computes to be guessed by TVM, whose guess may name a variable of a loop that is yet to come.
    """

    def longest(size: int) -> int:
        return min(count, -(-count // (size * cores)) * size)

    most = min(most, -(-count // cores))
    return min(range(most, max(0, most // 2 - 1), -1), key=longest)
