"""A register tile: sums of rows by vectors, in registers while the reduction axes run, and what follows them.

It serves matmul, convolution, pooling and reductions over outer axes; `tiling.py` divides outputs into such tiles.
"""

from __future__ import annotations

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
from schedules.intrin.load_fence import fence
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
    prefetch,
    quotient,
    remainder,
    store,
    tiles,
    vector,
    with_local,
)
from schedules.matrix_tile import MatrixOperands
from schedules.near_lines import STEPS_BEFORE, columns_of_line, operand_lines, result_lines
from schedules.partial_sums import LONG_PART_TERMS, PART_TERMS, in_parts, part_steps
from schedules.reducer import accumulate, accumulator_dtype
from schedules.stages import Stage, sequence, substitute
from targets.base import Target

# With fewer tiles of rows in a task its columns come from memory all the time, which hardware foresees.
FEWEST_TILES_TO_FETCH = 4
# Of sums that fill the registers LLVM keeps two in memory where 8 to 14 steps follow each other and sums are in parts:
# 1576x768 by a depth of 3072 took 11 % longer with 11 than with 6 (Granite Rapids).
MOST_STEPS_APART = 6


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

    def steps_in_line(self, together: int) -> int:
        """Return how many steps of the reduction, some taken `together`, follow each other without a loop."""
        steps = self.request_steps(together)
        return steps if self.apart is None else min(steps, MOST_STEPS_APART)

    def part_steps(self, extents: Sequence[Extent], together: int) -> int | None:
        """Return how many steps of the reduction over `extents`, some taken `together`, make a part of a sum, if any.

        The errors of sums in fp32 are small beside those of terms in bfloat16.
        """
        if self.grouped is not None:
            return None
        terms = PART_TERMS if self.apart is None else LONG_PART_TERMS
        return part_steps(self.stage, extents, self.steps_in_line(together), terms)

    def cells(self, rows: int, width: int, element: Element) -> Stmt:
        """Return `element` for every row by `width` columns: of three vectors, which LLVM splits badly, two and one."""
        return cells(rows, width, element) if self.apart is None else cells_in_pieces(rows, width, element)

    @property
    def row_extent(self) -> Extent:
        return self.row_group.extent if self.row_group is not None else 1


def tile_of_sums(
    tile: Tile, stage: Stage, point: Mapping[Var, Expr], base: Expr, width: int, row: Expr, rows: int
) -> Stmt:
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
    only shortly before and only within a page. Steps between two requests are unrolled, or some of them: leaving a loop
    of a dozen steps is mispredicted every time. `following` are the axes' values at the first column of each line.
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

    return tiles(extents[0], [tile.steps_in_line(together)], chunk)


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
