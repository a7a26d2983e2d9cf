"""Reductions whose lanes are neighbouring elements of the output: register tiles of rows by vectors.

One micro-kernel serves matmul, convolution, pooling and reductions over outer axes: a tile of `rows` x `width`
accumulators stays in registers while the reduction axes run, and what follows the reduction is computed on the tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, AxisGroup, Step
from schedules.block_ahead import BlockAhead
from schedules.by_element import element_read, in_terms, with_elements, with_read
from schedules.epilogue import Epilogue
from schedules.grouped_products import GroupedProducts
from schedules.intrin.load_fence import fence, with_fences
from schedules.loops import (
    Element,
    Extent,
    cells,
    cells_in_pieces,
    index,
    load,
    local,
    loop,
    nest,
    parallel,
    prefetch,
    product,
    quotient,
    remainder,
    store,
    tile_choice,
    tiles,
    unflatten,
    vector,
    with_local,
)
from schedules.matrix_rows import rows_of_sums
from schedules.matrix_tile import MatrixOperands
from schedules.near_lines import STEPS_BEFORE, columns_of_line, operand_lines, result_lines
from schedules.panels import Panel
from schedules.partial_sums import LONG_PART_TERMS, PART_TERMS, in_parts, part_steps
from schedules.reducer import accumulate, accumulator_dtype, read_in_fp32, widened
from schedules.stages import Stage, sequence, substitute
from targets.base import Target

# With fewer tiles of rows in a task its columns come from memory all the time, which hardware foresees.
FEWEST_TILES_TO_FETCH = 4
# Parts of the columns that are computed one after the other, all rows of each. Threads take contiguous ranges of tasks:
# so what is left of the rows, whose tasks are shorter, spreads over all ranges.
COLUMN_GROUPS = 4
# With so many blocks of rows these shorter tasks are few: all columns of a block follow each other, so that its rows
# come from memory once and not with every group (12000 rows of 384 by 384 columns took 17 % longer, Zen 4).
BLOCKS_TO_TAKE_WHOLE = 32
# What whole tiles leave of a symbolic number of rows: four by two vectors keep multiply-adds busy, where those of a
# single one wait for each other.
SHORT_TILES = (4, 2, 1)
# Code for the columns of one width that begin at an offset.
Columns = Callable[[Expr, int], Stmt]
# Code for a block of rows at a point of the outer axes, of the columns of one width that begin at an offset.
Block = Callable[[Mapping[Var, Expr], Expr, int, Expr], Stmt]


@dataclass(frozen=True, eq=False)
class Tile:
    """How a reduction is cut: `width` elements of `vector_group` by `rows` of `row_group`, `row_block` rows a task.

    `panel` is the read that is copied to [reduction][width] in the task before its rows are computed, if any; `ahead`
    one whose next columns come into the second-level cache while these are computed, `near` one whose lines are asked
    for shortly before they are read, as are those of the results, but for ones that are `handed_on` within the task.
    With `grouped` the sums are of dot products of several terms, with `matrix` they are computed in tile registers.
    `by_element` is whether instructions multiply by an element of a register. With `next_rows` a block's tiles of
    columns ask for the rows that the next block reads. `by_rows`: all columns of a block of rows follow each other, so
    that cores divide the rows. `apart` is the target where steps have to stay apart for want of registers: LLVM would
    read for the next one before the sums of one are done, and keep sums in memory.
    """

    stage: Stage
    epilogue: Epilogue
    outer: tuple[AxisGroup, ...]
    vector_group: AxisGroup
    row_group: AxisGroup | None
    reduction: tuple[AxisGroup, ...]
    width: int
    lanes: int
    rows: int
    row_block: int
    panel: TensorLoad | None
    parallel: bool
    ahead: TensorLoad | None = None
    near: TensorLoad | None = None
    handed_on: bool = False
    grouped: GroupedProducts | None = None
    matrix: MatrixOperands | None = None
    by_element: bool = False
    next_rows: BlockAhead | None = None
    by_rows: bool = False
    apart: Target | None = None

    @property
    def terms(self) -> int:
        """How many terms of the reduction one step adds."""
        return 1 if self.grouped is None else self.grouped.dot.terms

    @property
    def at_once(self) -> int:
        """How many steps one load brings a row's elements of, where instructions take elements of vectors."""
        return self.lanes if self.grouped is None else self.grouped.dot.at_once

    def request_steps(self, together: int) -> int:
        """Return how many steps of the reduction, some taken `together`, there are from one request to the next."""
        steps = self.row_block // self.rows
        return steps - steps % together or steps

    def part_steps(self, extents: Sequence[Extent], together: int) -> int | None:
        """Return how many steps of the reduction over `extents`, some taken `together`, make a part of a sum, if any.

        The errors of sums in fp32 are small beside those of terms in bfloat16.
        """
        if self.grouped is not None:
            return None
        terms = PART_TERMS if self.apart is None else LONG_PART_TERMS
        return part_steps(self.stage, extents, self.request_steps(together), terms)

    def cells(self, rows: int, width: int, element: Element) -> Stmt:
        """Return `element` for every row by `width` columns: of three vectors, which LLVM splits badly, two and one."""
        return cells(rows, width, element) if self.apart is None else cells_in_pieces(rows, width, element)

    @property
    def row_extent(self) -> Extent:
        return self.row_group.extent if self.row_group is not None else 1


def emit(tile: Tile, block: Block | None = None) -> Stmt:
    """Return the loop nest of `tile`, whose blocks `block` computes if given."""
    return with_instructions(tile, _nest(tile, block or functools.partial(block_of_rows, tile)))


def with_instructions(tile: Tile, statement: Stmt) -> Stmt:
    """Return a statement that computes blocks of `tile`, with the functions that their code calls."""
    if tile.matrix is not None:
        statement = tile.matrix.tiles.imported(statement)
    if tile.apart is not None:
        statement = with_fences(statement, tile.apart)
    return statement if tile.grouped is None else tile.grouped.dot.imported(statement)


def _nest(tile: Tile, block: Block) -> Stmt:
    columns = tile.vector_group.extent
    if isinstance(columns, int):
        count = -(-columns // tile.width)

        def choose(number: Expr, body: Columns) -> Stmt:
            return tile_choice(number, columns, tile.width, in_whole_vectors(tile, body))

        return _tasks(tile, count, choose, block)
    width = tirx.const(tile.width, "int64")
    full = _tasks(tile, tirx.floordiv(columns, width), lambda number, body: body(number * width, tile.width), block)
    done = tirx.floordiv(columns, width) * width
    sizes = [tile.lanes, 1] if tile.lanes < tile.width else [1]
    rest = _tasks(
        tile, 1, lambda _, body: tiles(columns - done, sizes, lambda base, lanes: body(done + base, lanes)), block
    )
    return sequence([full, rest])


def in_whole_vectors(tile: Tile, body: Columns) -> Columns:
    """Return code that does whole vectors first and then what is left; a vector of 17 lanes is pulled apart by LLVM."""

    def columns(base: Expr, width: int) -> Stmt:
        whole = width // tile.lanes * tile.lanes
        if whole in (0, width):
            return body(base, width)
        return sequence([body(base, whole), body(base + whole, width - whole)])

    return columns


def _tasks(tile: Tile, columns: Extent, choose: Callable[[Expr, Columns], Stmt], compute: Block) -> Stmt:
    """Return the parallel loop over outer axes, groups of column tiles, blocks of rows and tiles of a group."""
    outer = [group.extent for group in tile.outer]
    rows = tile.row_extent
    if isinstance(rows, int):
        blocks: Extent = -(-rows // tile.row_block)
    else:
        blocks = tirx.floordiv(rows + (tile.row_block - 1), tirx.const(tile.row_block, "int64"))
    groups, together = (1, columns) if tile.by_rows else _column_groups(columns, blocks)
    extents = [*outer, groups, blocks, together]

    def task(number: Expr) -> Stmt:
        *outside, part, block, position = unflatten(number, extents)
        column = part * together + position
        point: dict[Var, Expr] = {}
        for group, position in zip(tile.outer, outside, strict=True):
            point.update(group.point(position))
        return choose(column, lambda base, width: compute(point, base, width, block))

    return parallel(product(extents), task, tile.parallel)


def _column_groups(columns: Extent, blocks: Extent) -> tuple[int, Extent]:
    """Return how many groups of how many column tiles: equal ones, at least COLUMN_GROUPS where there are as many.

    It is one where there are many `blocks` of rows.
    """
    many = isinstance(blocks, int) and blocks >= BLOCKS_TO_TAKE_WHOLE
    if many or not isinstance(columns, int) or columns < COLUMN_GROUPS:
        return 1, columns
    groups = next(count for count in range(COLUMN_GROUPS, columns + 1) if columns % count == 0)
    return groups, columns // groups


def block_of_rows(tile: Tile, point: Mapping[Var, Expr], base: Expr, width: int, block: Expr) -> Stmt:
    """Return the micro-kernels of one block of rows by `width` columns at `base`."""
    stage, prepare = widened(tile.stage), []
    panels: list[Var] = []
    if tile.panel is not None:
        # Widened once, what is copied takes fewer instructions than elements of vectors have to multiply by.
        operand = read_in_fp32(stage, tile.panel) if tile.by_element else tile.panel
        panel = Panel(operand, tile.reduction, tile.vector_group)
        memory, copy = panel.copy(point, base, width)
        panels.append(memory)
        prepare.append(copy)
        stage = panel.reading(stage, memory, base)
    rows = tile.row_extent

    def kernels(start: Expr, extent: Extent) -> Stmt:
        if tile.matrix is not None:
            return _in_matrix_tiles(tile, tile.matrix, point, (start, extent), (base, width))
        sizes = [tile.rows] if isinstance(extent, int) else [tile.rows, *(n for n in SHORT_TILES if n < tile.rows)]
        return tiles(extent, sizes, lambda row, count: _micro(tile, stage, point, base, width, start + row, count))

    if isinstance(rows, int):
        body = tile_choice(block, rows, tile.row_block, kernels)
    else:
        start = block * tile.row_block
        body = kernels(start, tirx.min(tirx.const(tile.row_block, "int64"), rows - start))
    return with_local(panels, [*prepare, body]) if panels else body


def _in_matrix_tiles(
    tile: Tile, matrix: MatrixOperands, point: Mapping[Var, Expr], rows: tuple[Expr, Extent], columns: tuple[Expr, int]
) -> Stmt:
    """Return rows and columns, both given by their first and their number, by blocks of tile registers."""
    (start, extent), (base, width) = rows, columns

    def at(r: Expr, v: Expr) -> dict[Var, Expr]:
        return {**point, **tile.vector_group.point(base + v), **matrix.rows.point(start + r)}

    return rows_of_sums(matrix, tile.stage, tile.epilogue, at, (extent, width), tile.row_block)


def _micro(tile: Tile, stage: Stage, point: Mapping[Var, Expr], base: Expr, width: int, row: Expr, rows: int) -> Stmt:
    """Return `rows` x `width` elements: accumulators in registers, then the epilogue."""
    dtype = accumulator_dtype(tile.stage)
    # Instructions on several terms have no narrower form: lanes past the columns multiply what pads the weights.
    pitch = width if tile.grouped is None else -(-width // tile.lanes) * tile.lanes
    registers = local([rows * pitch], dtype, "accumulators")

    def at(r: Expr, v: Expr) -> dict[Var, Expr]:
        values = {**point, **tile.vector_group.point(base + v)}
        if tile.row_group is not None:
            values.update(tile.row_group.point(row + r))
        return values

    extents = [quotient(group.extent, tile.terms) for group in tile.reduction]
    element = _element(tile, stage)
    together = 1 if element is None else tile.at_once
    part = tile.part_steps(extents, together)
    totals = registers if part is None else local([rows * pitch], dtype, "totals")

    def start(r: Expr, v: Expr) -> Stmt:
        assert tile.stage.initial is not None
        return store(totals, substitute(tile.stage.initial, at(r, v)).astype(dtype), [r * pitch + v])

    def inner(positions: Sequence[Expr], term: Expr | int) -> dict[Var, Expr]:
        *outside, last = positions
        values: dict[Var, Expr] = {}
        for group, position in zip(tile.reduction, [*outside, last + term], strict=True):
            values.update(group.point(position * tile.terms))
        return values

    def step(positions: Sequence[Expr], count: int, before: int) -> Stmt:
        def add(term: int, of_row: Callable[[Expr], Expr] | None = None) -> Stmt:
            def values(r: Expr, v: Expr) -> dict[Var, Expr]:
                return {**at(r, v), **inner(positions, term)}

            def update(r: Expr, v: Expr) -> Stmt:
                source = stage if element is None or of_row is None else with_read(stage, element, of_row(r))
                value = accumulate(source, load(registers, [r * pitch + v]), values(r, v))
                return store(registers, value, [r * pitch + v])

            if tile.grouped is not None:
                return tile.grouped.step(registers, (rows, pitch), values, tile.terms, of_row)
            later = inner(positions, term + STEPS_BEFORE)
            lines = operand_lines(tile.near, lambda v: {**at(index(0), v), **later}, width)
            return sequence([*lines, tile.cells(rows, width, update), *([] if tile.apart is None else [fence()])])

        if element is None or before + count == 1:
            return sequence([add(term) for term in range(count)])

        def read(r: Expr, term: Expr) -> Expr:
            return substitute(element, {**at(r, index(0)), **inner(positions, term)})

        return with_elements(
            read, (rows, count), before, add, None if tile.grouped is None else tile.grouped.dot.groups
        )

    following = [
        at(index(0), index(width + column)) for column in range(0, width, columns_of_line(tile.ahead, tile.terms))
    ]

    def reduce(first: Expr, count: Extent) -> Stmt:
        return _fetching_ahead(tile, following, row, (first, [count, *extents[1:]]), together, step)

    def all_cells(element: Callable[[Expr], Stmt]) -> Stmt:
        return tile.cells(rows, pitch, lambda r, v: element(r * pitch + v))

    if part is None:
        buffers, rest = [registers], remainder(tile.reduction[0].extent, tile.terms)
        parts = [] if extents[0] == 0 else [reduce(index(0), extents[0])]
        if tile.grouped is not None and isinstance(rest, int) and rest:
            shape = (rows, pitch)
            parts.append(
                tile.grouped.step(registers, shape, lambda r, v: {**at(r, v), **inner([index(extents[0])], 0)}, rest)
            )
        sums = sequence(parts)
    else:
        assert isinstance(extents[0], int)
        buffers, sums = [registers, totals], in_parts(registers, totals, extents[0], part, all_cells, reduce)
    write = _write_back(tile, totals, (rows, width), pitch, at)
    requests: list[Stmt] = []
    if tile.near is not None and not tile.handed_on:
        requests = result_lines(tile.epilogue, tile.vector_group, at, (rows, width))
    if tile.next_rows is not None:
        part = tirx.floordiv(base, index(tile.width))
        requests.append(tile.next_rows.requests(point, row + tile.row_block, rows, part))
    return with_local(buffers, [*requests, tile.cells(rows, pitch, start), sums, write])


def _element(tile: Tile, stage: Stage) -> Expr | None:
    """Return the read whose elements along the reduction come in vectors, where there is one."""
    if not tile.by_element:
        return None
    if tile.grouped is not None:
        return tile.grouped.activations
    return element_read(stage, tile.vector_group, tile.reduction[-1])


def _fetching_ahead(
    tile: Tile,
    following: Sequence[Mapping[Var, Expr]],
    row: Expr,
    part: tuple[Expr, Sequence[Extent]],
    together: int,
    step: Callable[[Sequence[Expr], int, int], Stmt],
) -> Stmt:
    """Return the loops over a `part` of the reduction, from its outermost axis's first step on, of given extents.

    Some steps along the innermost axis are taken `together`.

    With `ahead` each tile of rows fetches its share of the following columns. Hardware fetches what a stream reads next
    only shortly before and only within a page. Steps between two requests are unrolled: leaving a loop of a dozen steps
    is mispredicted every time. `following` are the axes' values at the first column of each line.
    """
    begin, extents = part
    every = tile.request_steps(together)
    depth = quotient(tile.reduction[0].extent, tile.terms)
    if tile.ahead is None or len(extents) != 1 or not isinstance(depth, int) or every < FEWEST_TILES_TO_FETCH:

        def inside(positions: Sequence[Expr]) -> Stmt:
            def some(last: Expr, count: int, before: int) -> Stmt:
                first, *others = [*positions, last]
                return step([begin + first, *others], count, before)

            return in_terms(extents[-1], together, some)

        return nest(extents[:-1], inside)
    read = tile.ahead
    first = tirx.floordiv(tirx.floormod(row, index(tile.row_block)), index(tile.rows)) * -(-depth // every)

    def chunk(done: Expr, count: int) -> Stmt:
        point = tile.reduction[0].point((first + tirx.floordiv(begin + done, index(every))) * tile.terms)
        lines = [prefetch(substitute(read, {**point, **columns}), cache=2) for columns in following]
        some = in_terms(count, together, lambda k, *terms: step([begin + done + k], *terms), whole=True)
        return sequence([*lines, some])

    return tiles(extents[0], [every], chunk)


def _write_back(
    tile: Tile, registers: Var, shape: tuple[int, int], pitch: int, at: Callable[[Expr, Expr], dict[Var, Expr]]
) -> Stmt:
    """Return the stores of a tile of `shape` rows by columns; `at` gives the axes' values at a cell.

    A row's sums begin `pitch` elements after those of the row before.
    """
    rows, width = shape

    def finish(source: Var, r: Expr, v: Expr) -> Stmt:
        total = load(source, [r * pitch + v]).astype(tile.stage.output.dtype)
        return tile.epilogue.store(total, at(r, v))

    written = Access(tile.epilogue.stage.output, tile.epilogue.indices)
    block = written.block(tile.vector_group.inner)
    if block:  # only the elements of one block lie together
        piece = math.gcd(block, width)
        return sequence(
            [
                tile.cells(rows, piece, lambda r, v, first=first: finish(registers, r, first + v))
                for first in range(0, width, piece)
            ]
        )
    if written.step(tile.vector_group.inner) != Step.STRIDED or rows == 1:
        return tile.cells(rows, width, lambda r, v: finish(registers, r, v))
    # The output is contiguous along the rows: the tile goes through memory and is written column by column.
    spilled = local([rows * pitch], accumulator_dtype(tile.stage), "spilled")
    spill = tile.cells(rows, width, lambda r, v: store(spilled, load(registers, [r * pitch + v]), [r * pitch + v]))
    columns = loop(width, lambda v: vector(rows, lambda r: finish(spilled, r, v)))
    return with_local([spilled], [spill, columns])
