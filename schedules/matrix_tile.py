"""Blocks of rows by columns whose sums are computed in tile registers, then finished from memory of the task.

A block is two by two tiles of sums: each row of operands is read for 32 columns, each row of weights for 32 rows. The
sums go through 4 KiB in the first-level cache to what follows the reduction, a row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, AxisGroup, Step, linear_coefficient
from schedules.epilogue import Epilogue
from schedules.intrin.bf16_conversion import bits_of, type_of_bits
from schedules.intrin.matrix_tiles import BLOCK, BYTES, TILE, MatrixTiles, Passing
from schedules.loops import (
    LINE_BITS,
    SECOND_LEVEL,
    Extent,
    index,
    load,
    local,
    loop,
    prefetch,
    quotient,
    remainder,
    store,
    vector,
    with_local,
)
from schedules.stages import Stage, sequence, substitute

# Of the first-level cache, what the weights of 32 columns may take that stay there while rows pass by: 512 x 512 x 512
# took 84 us so, 101 otherwise; 197 x 768 x 3072, whose weights fill all of it, 445 and 422 (Granite Rapids).
KEPT_WEIGHTS = 2, 3
# The parts of weights whose lines a core asks for by turns.
STREAMS = 4


@dataclass(frozen=True, eq=False)
class MatrixOperands:
    """The operands of a product in tile registers: `weights` [columns / b][K / g][b][g], and `activations` along K.

    `first_level` are the bytes of the cache that may keep the weights of a block of columns for all blocks of rows, 0
    where rows come back before columns do.
    """

    tiles: MatrixTiles
    weights: TensorLoad
    activations: TensorLoad
    rows: AxisGroup
    columns: AxisGroup
    along: AxisGroup
    first_level: int = 0

    @property
    def passing(self) -> Passing:
        """Return that rows leave the first-level cache to the columns' weights, if these fit it beside the sums."""
        assert isinstance(self.along.extent, int)
        bits = int(self.weights.source.dtype.bits)
        fit = self.along.extent * BLOCK * bits // 8 <= self.first_level * KEPT_WEIGHTS[0] // KEPT_WEIGHTS[1]
        return Passing.ROWS if fit else Passing.NEITHER

    @property
    def pitch(self) -> Expr:
        """How many bytes after a row of activations the next one begins."""
        stride = stride_of(self.activations, self.rows)
        assert stride is not None
        return stride * index(int(self.activations.source.dtype.bits) // 8)

    @property
    def stride(self) -> int:
        """How many bytes after a group of neighbours of all columns of a block the next one begins."""
        block, group = (int(extent) for extent in self.weights.source.shape[-2:])
        return block * group * int(self.weights.source.dtype.bits) // 8

    @property
    def steps(self) -> int:
        assert isinstance(self.along.extent, int)
        return self.along.extent // self.tiles.terms

    @property
    def filled(self) -> bool:
        """Whether zeros make whole steps of the weights."""
        group = int(self.weights.source.shape[-1])
        return int(self.weights.source.shape[-3]) * group % self.tiles.terms == 0

    @property
    def rest(self) -> int:
        """How many terms of the reduction whole steps leave."""
        assert isinstance(self.along.extent, int)
        return self.along.extent % self.tiles.terms


def stride_of(read: TensorLoad, group: AxisGroup) -> Expr | None:
    """Return how many elements lie between what is read at neighbouring positions of axes; None if it varies."""
    total: Expr = index(0)
    size: Expr = index(1)
    for position, extent in zip(reversed(list(read.indices)), reversed(list(read.source.shape)), strict=True):
        coefficient = linear_coefficient(position, group.inner.variable)
        if coefficient is None:
            return None
        if coefficient:
            total = total + size * coefficient
        size = size * extent
    return total


def in_blocks(tiles: MatrixTiles, rows: Extent, block: Callable[[Expr, Extent], Stmt]) -> Stmt:
    """Return `block`, from its number and its rows, for 32 rows at a time with registers described once, then the rest.

    What is left of the rows describes its registers itself.
    """

    def whole(count: Extent) -> Stmt:
        return sequence([tiles.begin(TILE, TILE), loop(count, lambda number: block(number, BLOCK)), tiles.end()])

    return whole_and_rest(rows, whole, block)


def whole_and_rest(rows: Extent, whole: Callable[[Extent], Stmt], rest: Callable[[Expr, Extent], Stmt]) -> Stmt:
    """Return `whole`, from how many blocks of 32 rows there are, and `rest`, from its block's number and its rows."""
    full, left = quotient(rows, BLOCK), remainder(rows, BLOCK)
    if isinstance(full, int) and isinstance(left, int):
        return sequence([*([whole(full)] if full else []), *([rest(index(full), left)] if left else [])])
    parts = ((full, whole(full)), (left, rest(index(full), index(left))))
    return sequence([tirx.IfThenElse(index(count) > index(0), part, None) for count, part in parts])


def block_of_sums(
    operands: MatrixOperands,
    stage: Stage,
    epilogue: Epilogue,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    shape: tuple[Extent, int],
    configured: bool = False,
    ahead: Callable[[Expr], Stmt] | None = None,
) -> Stmt:
    """Return `shape` rows by columns, at most 32 each: sums in tile registers, then what follows on each row.

    `at` gives the axes' values at a row and a column of the block. Registers that are `configured` have 32 rows, and
    keep them. `ahead` returns what to ask memory for at a step.
    """
    rows, columns = shape
    tiles = operands.tiles
    sums = local([BLOCK * BLOCK], tiles.total, "sums")
    pitch = BLOCK * 4
    form = (1 if isinstance(rows, int) and rows <= TILE else 2, -(-columns // TILE))
    upper, lower = _heights(rows)
    lines = written_lines(operands, epilogue, at, columns, operands.steps)
    add = step_of(operands, at, shape, operands.passing)
    places = [load(sums, [place]) for place in (index(0), index(upper) * BLOCK, index(BLOCK * BLOCK - 1))]

    def step(number: Expr) -> Stmt:
        return sequence([*([] if ahead is None else [ahead(number)]), *lines(number), add(number)])

    return with_local(
        [sums],
        [
            tiles.zero() if configured else tiles.begin(upper, lower),
            loop(operands.steps, step),
            last_terms(operands, at, (rows, columns)) if operands.rest else tirx.Evaluate(0),
            tiles.store(form, places, pitch),
            *([] if configured else [tiles.end()]),
            finished(stage, epilogue, sums, at, (rows, columns), operands.columns),
        ],
    )


def step_of(
    operands: MatrixOperands,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    shape: tuple[Extent, int],
    passing: Passing,
) -> Callable[[Expr], Stmt]:
    """Return the step of a number along the reduction of a block, of whose operands one is `passing`."""
    rows, columns = shape
    tiles = operands.tiles
    form = (1 if isinstance(rows, int) and rows <= TILE else 2, -(-columns // TILE))

    def step(number: Expr) -> Stmt:
        places, weights = reads_of_step(operands, at, rows, number * tiles.terms)
        return tiles.step(form, places[: form[0]], operands.pitch, weights, operands.stride, passing)

    return step


def reads_of_step(
    operands: MatrixOperands, at: Callable[[Expr, Expr], Mapping[Var, Expr]], rows: Extent, k: Expr
) -> tuple[Sequence[Expr], Expr]:
    """Return the reads of the first elements of the upper and the lower rows, and of the weights, from term `k` on."""
    upper, _ = _heights(rows)
    # Of one row alone the lower tile has one, too: the same, for there may be nothing to read behind it.
    second = index(upper) if isinstance(rows, int) else tirx.min(index(upper), index(rows) - 1)

    def read(operand: TensorLoad, row: Expr) -> Expr:
        return substitute(operand, {**at(row, index(0)), **operands.along.point(k)})

    places = [read(operands.activations, row) for row in (index(0), second)]
    return places, read(operands.weights, index(0))


def written_lines(
    operands: MatrixOperands,
    epilogue: Epilogue,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    width: int,
    steps: int,
) -> Callable[[Expr], Sequence[Stmt]]:
    """Return what asks at each of some steps for the lines of some rows of the result, if a row's columns lie together.

    They are seldom in a cache near by, and stores wait for them one after the other, while no product can begin when
    too many wait.
    """
    output = epilogue.stage.output
    if Access(output, epilogue.indices).step(operands.columns.inner) != Step.UNIT:
        return lambda _: []
    rows = -(-BLOCK // steps)
    every = LINE_BITS // int(output.dtype.bits)

    def of_step(number: Expr) -> list[Stmt]:
        points = [at(number * rows + row, index(column)) for row in range(rows) for column in range(0, width, every)]
        places = [load(output, [substitute(each, point) for each in epilogue.indices]) for point in points]
        return [operands.tiles.own(place) for place in places]

    return of_step


def last_terms(
    operands: MatrixOperands, at: Callable[[Expr, Expr], Mapping[Var, Expr]], shape: tuple[Extent, int]
) -> Stmt:
    """Return the step that adds what whole steps leave of the reduction, less than 64 bytes, to a block of sums.

    It takes the last `terms` of the weights by a copy of the rows, which is zero where these are filled up, or where
    whole steps added them before: nothing is read beyond either operand. Zero times any weight is zero of integers
    alone, so that weights in floats have to be filled up.
    """
    rows, columns = shape
    tiles, rest = operands.tiles, operands.rest
    dtype = type_of_bits(str(operands.activations.source.dtype))
    copied = local([BLOCK * tiles.terms], dtype, "last")
    first = operands.steps * tiles.terms

    def copy(row: Expr) -> Stmt:
        begin = row * tiles.terms + (first - _last(operands))

        def piece(done: int, size: int) -> Stmt:
            def element(v: Expr) -> Expr:
                point = {**at(row, index(0)), **operands.along.point(first + done + v)}
                return bits_of(substitute(operands.activations, point))

            return vector(size, lambda v: store(copied, element(v), [begin + done + v]))

        sizes = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
        return sequence([piece(sum(sizes[:number]), size) for number, size in enumerate(sizes)])

    def clear(row: Expr) -> Stmt:
        return vector(tiles.terms, lambda v: store(copied, tirx.const(0, dtype), [row * tiles.terms + v]))

    upper, _ = _heights(rows)
    form = (1 if isinstance(rows, int) and rows <= TILE else 2, -(-columns // TILE))
    places = [load(copied, [index(row) * tiles.terms]) for row in (0, upper)][: form[0]]
    weights = substitute(operands.weights, {**at(index(0), index(0)), **operands.along.point(_last(operands))})
    step = tiles.step(form, places, BYTES, weights, operands.stride)
    return with_local([copied], [loop(BLOCK, clear), loop(rows, copy), step])


def _last(operands: MatrixOperands) -> Expr:
    """Return the first term of the last whole tile of the weights, whose groups of neighbours are whole."""
    assert isinstance(operands.along.extent, int)
    if operands.filled:
        return index(operands.steps * operands.tiles.terms)
    group = int(operands.weights.source.shape[-1])
    return index(-(-operands.along.extent // group) * group - operands.tiles.terms)


def next_columns(
    operands: MatrixOperands, at: Callable[[Expr, Expr], Mapping[Var, Expr]], blocks: int
) -> Callable[[Expr], Stmt]:
    """Return what the steps of `blocks` blocks of rows, counted through, ask for of the next 32 columns' weights.

    Hardware sees a stream coming only a few lines before, and not beyond its page: products of 128 x 768 x 768 whose
    weights were in the last cache took 30 % longer (Granite Rapids). It follows several streams at once, each on a page
    of its own, while a core waits for no more than 16 lines: asked for by turns from four parts of the weights, these
    come faster.
    """
    group = int(operands.weights.source.shape[-1])
    rows = operands.tiles.terms // group
    each = -(-rows // blocks)
    part = operands.steps * rows // STREAMS

    def ahead(step: Expr) -> Stmt:
        first = step * each

        def request(row: int, column: int) -> Stmt:
            stream, place = tirx.floormod(first + row, index(STREAMS)), tirx.floordiv(first + row, index(STREAMS))
            point = {**at(index(0), index(BLOCK + column)), **operands.along.point((stream * part + place) * group)}
            return prefetch(substitute(operands.weights, point), SECOND_LEVEL)

        return sequence([request(row, column) for row in range(each) for column in range(0, BLOCK, TILE)])

    return ahead


def finished(
    stage: Stage,
    epilogue: Epilogue,
    sums: Var,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    shape: tuple[Extent, int],
    columns: AxisGroup,
) -> Stmt:
    """Return what follows the reduction on the sums of some rows and columns."""
    rows, width = shape

    def finish(row: Expr, column: Expr) -> Stmt:
        total = load(sums, [row * BLOCK + column]).astype(stage.output.dtype)
        return epilogue.store(total, at(row, column))

    written = Access(epilogue.stage.output, epilogue.indices)
    if written.step(columns.inner) == Step.STRIDED and isinstance(rows, int):
        return loop(width, lambda column: vector(rows, lambda row: finish(row, column)))
    pieces = pieces_of_row(epilogue, columns, width)
    return loop(rows, lambda row: finished_row(stage, epilogue, sums, row * BLOCK, at, row, pieces))


def pieces_of_row(epilogue: Epilogue, columns: AxisGroup, width: int) -> Sequence[tuple[int, int]]:
    """Return the first columns and the widths of the vectors that finish `width` columns of a row."""
    piece = next(size for size in (BLOCK, TILE, width) if width % size == 0)
    block = Access(epilogue.stage.output, epilogue.indices).block(columns.inner)
    if block and width % block == 0:
        piece = min(piece, block)
    return [(first, piece) for first in range(0, width, piece)]


def finished_row(
    stage: Stage,
    epilogue: Epilogue,
    sums: Var,
    place: Expr,
    at: Callable[[Expr, Expr], Mapping[Var, Expr]],
    row: Expr,
    pieces: Sequence[tuple[int, int]],
) -> Stmt:
    """Return what follows the sums of a row of a block, which lie from `place` on."""

    def finish(column: Expr) -> Stmt:
        return epilogue.store(load(sums, [place + column]).astype(stage.output.dtype), at(row, column))

    return sequence([vector(size, lambda v, first=first: finish(index(first) + v)) for first, size in pieces])


def _heights(rows: Extent) -> tuple[Extent, Extent]:
    """Return the rows of the upper and the lower tile; of a lower one that is not used 1."""
    if isinstance(rows, int):
        return (rows, 1) if rows <= TILE else (-(-rows // 2), rows // 2)
    half = tirx.floordiv(rows + 1, index(2))
    return half, tirx.max(index(rows) - half, index(1))
