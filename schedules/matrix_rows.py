"""Rows of products in tile registers: blocks of 32 rows by parts of the depth, so that weights stay in a near cache.

The weights of 32 columns and of a part of the depth lie in the first-level cache while the rows of a few blocks pass
by, whose sums are stored and loaded again for the next part. A core reads 48 bytes a cycle from the second-level cache,
and a step of four products takes 64 cycles for 4 KiB: one of the operands has to be near.

The first step of each block stores the sums of the block before it, and of those that are complete the other steps
finish the rows: the units for vectors stand still while tiles are multiplied, and the other way round, if one follows
the other, for a core looks ahead no further than a block's sums. Sums that nothing follows are stored as they are,
which is less work than to store them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step
from schedules.epilogue import Epilogue
from schedules.intrin.matrix_tiles import BLOCK, BYTES, TILE, Passing
from schedules.loops import Extent, index, load, local, loop, prefetch, quotient, unrolled, with_local
from schedules.matrix_tile import (
    MatrixOperands,
    block_of_sums,
    finished_row,
    last_terms,
    next_columns,
    pieces_of_row,
    reads_of_step,
    step_of,
    stride_of,
    whole_and_rest,
    written_lines,
)
from schedules.stages import Stage, sequence, substitute

# Blocks of rows whose sums of a part of the depth are kept: they take a third of the first-level cache, the weights of
# the part half of it.
MOST_BLOCKS = 4
At = Callable[[Expr, Expr], Mapping[Var, Expr]]


def rows_of_sums(
    operands: MatrixOperands,
    stage: Stage,
    epilogue: Epilogue,
    at: At,
    shape: tuple[Extent, int],
    most: int,
) -> Stmt:
    """Return `shape` rows, up to `most`, by columns, up to 32, in blocks of 32 rows, then what is left of the rows.

    `at` gives the axes' values at a row and a column. The blocks ask for the weights of the next 32 columns.
    """
    rows, width = shape
    panel = RowPanel(operands, stage, epilogue, at, width, -(-most // BLOCK))
    return sequence([*_end_of_row(operands, at), whole_and_rest(rows, panel.whole, panel.alone)])


def _end_of_row(operands: MatrixOperands, at: At) -> list[Stmt]:
    """Return a request for the end of a row that is longer than the reduction.

    TVM would cut off what no code reads of a buffer, and change its pitch.
    """
    read, along = operands.activations, operands.along
    *outer, _ = substitute(read, {**at(index(0), index(0)), **along.point(index(0))}).indices
    row = read.source.shape[-1]
    if not isinstance(row, tirx.IntImm) or not isinstance(along.extent, int) or int(row) <= along.extent:
        return []
    return [prefetch(load(read.source, [*outer, index(int(row) - 1)]))]


@dataclass(frozen=True, eq=False)
class Turn:
    """The block of 32 rows `row` of `blocks`, of which `first` is the first one's number, with a part of the depth."""

    first: Expr
    row: Expr
    blocks: Extent
    part: Expr
    is_first: bool
    is_last: bool

    @property
    def number(self) -> Expr:
        return self.first + self.row


@dataclass(frozen=True, eq=False)
class RowPanel:
    """`width` columns, up to 32, of up to `most` blocks of 32 rows: what `rows_of_sums` is given."""

    operands: MatrixOperands
    stage: Stage
    epilogue: Epilogue
    at: At
    width: int
    most: int

    @property
    def tiles_across(self) -> int:
        return -(-self.width // TILE)

    @cached_property
    def sums(self) -> Var:
        return local([self.kept * BLOCK * BLOCK], self.operands.tiles.total, "sums")

    @cached_property
    def parts(self) -> tuple[int, int, int]:
        """How many parts of the depth there are, the steps of all but the last one, and those of that one.

        The weights of a part take half of the first-level cache. Of one block of rows each weight is read once.
        """
        steps = self.operands.steps
        most = max(1, self.operands.first_level // 2 // (BLOCK * BYTES)) if self.operands.first_level else steps
        count = -(-steps // most) if self.most > 1 else 1
        each = -(-steps // count)
        return count, each, steps - (count - 1) * each

    @property
    def kept(self) -> int:
        """How many blocks' sums are kept: of a part of the depth, or of the block that is finished and the next one."""
        return MOST_BLOCKS if self.parts[0] > 1 else 2

    @cached_property
    def pieces(self) -> Sequence[tuple[int, int]]:
        """The vectors that finish a row; none where columns do not lie together."""
        if Access(self.epilogue.stage.output, self.epilogue.indices).step(self.operands.columns.inner) == Step.STRIDED:
            return ()
        return pieces_of_row(self.epilogue, self.operands.columns, self.width)

    @cached_property
    def pitch(self) -> Expr | None:
        """How many bytes after a row of results the next one begins, if tiles of sums may be stored there.

        None where anything follows the sums, and where columns do not lie together.
        """
        operands, epilogue, output = self.operands, self.epilogue, self.epilogue.stage.output
        alone = epilogue.stage is epilogue.source and str(output.dtype) == operands.tiles.total
        single = len(operands.rows.axes) == len(operands.columns.axes) == 1
        together = Access(output, epilogue.indices).step(operands.columns.inner) == Step.UNIT
        if not alone or not single or not together or self.width % TILE:
            return None
        stride = stride_of(load(output, list(epilogue.indices)), operands.rows)
        return None if stride is None else stride * index(int(output.dtype.bits) // 8)

    def at_block(self, number: Expr) -> At:
        return lambda row, column: self.at(number * BLOCK + row, column)

    def alone(self, number: Expr, rows: Extent, configured: bool = False) -> Stmt:
        """Return a block of up to 32 rows that finishes its rows itself.

        It describes its registers where they are not `configured` for 32 rows.
        """
        inside, steps = self.at_block(number), self.operands.steps
        ahead = next_columns(self.operands, inside, self.most)
        return block_of_sums(
            self.operands,
            self.stage,
            self.epilogue,
            inside,
            (rows, self.width),
            configured,
            lambda step: ahead(number * steps + step),
        )

    def whole(self, blocks: Extent) -> Stmt:
        """Return blocks of 32 rows."""
        tiles = self.operands.tiles
        if not self.pieces:
            each_alone = loop(blocks, lambda number: self.alone(number, BLOCK, configured=True))
            return sequence([tiles.begin(TILE, TILE), each_alone, tiles.end()])
        count = self.parts[0]
        if count == 1:
            swept = [self._swept(index(0), blocks)]
        elif isinstance(blocks, int):
            each = -(-blocks // -(-blocks // MOST_BLOCKS))
            swept = [loop(blocks // each, lambda sweep: self._swept(sweep * each, each))]
            swept += [self._swept(index(blocks // each * each), blocks % each)] if blocks % each else []
        else:
            sweeps = quotient(blocks + (MOST_BLOCKS - 1), MOST_BLOCKS)
            most = index(MOST_BLOCKS)
            swept = [loop(sweeps, lambda s: self._swept(s * most, tirx.min(most, index(blocks) - s * most)))]
        statements = [tiles.begin(TILE, TILE), *swept, tiles.end()]
        kept = count > 1 or self.pitch is None
        return with_local([self.sums] if kept else [], statements)

    def _swept(self, first: Expr, blocks: Extent) -> Stmt:
        """Return `blocks` blocks of rows from `first` on: all of one part of the depth, then of the next one."""
        count = self.parts[0]
        between = count - 2

        def part(number: Expr, is_first: bool, is_last: bool) -> Stmt:
            return loop(blocks, lambda row: self._block(Turn(first, row, blocks, number, is_first, is_last)))

        last = index(blocks) - 1
        places, pitch = self._home(first, last)
        return sequence(
            [
                *([part(index(0), True, False)] if count > 1 else []),
                *([loop(between, lambda number: part(number + 1, False, False))] if between > 0 else []),
                part(index(count - 1), count == 1, True),
                self.operands.tiles.store((2, self.tiles_across), places, pitch),
                *([loop(BLOCK, lambda row: self._finished(first, last, row))] if self.pitch is None else []),
            ]
        )

    def _block(self, turn: Turn) -> Stmt:
        """Return the products of a block of rows with a part of the depth, beside what is left of the block before."""
        operands, (count, each, last) = self.operands, self.parts
        steps = last if turn.is_last else each
        inside, shape = self.at_block(turn.number), (BLOCK, self.width)
        ahead = next_columns(operands, inside, self.most)
        lines = written_lines(operands, self.epilogue, inside, self.width, steps)
        done = turn.first * operands.steps + turn.part * (index(turn.blocks) * each) + turn.row * steps
        product = step_of(operands, inside, shape, Passing.ROWS if count > 1 else operands.passing)
        finishes = turn.is_last and self.pitch is None

        def requests(step: Expr) -> list[Stmt]:
            return [ahead(done + step), *(lines(step) if turn.is_last else [])]

        def step(number: Expr, finished: Sequence[Stmt] = ()) -> Stmt:
            return sequence([*requests(number), product(turn.part * each + number), *finished])

        return sequence(
            [
                *requests(index(0)),
                self._exchange(turn, inside),
                self._finishing(turn, steps, step) if finishes else unrolled(steps - 1, lambda n: step(n + 1)),
                *([last_terms(operands, inside, shape)] if turn.is_last and operands.rest else []),
            ]
        )

    def _exchange(self, turn: Turn, inside: At) -> Stmt:
        """Return the first step of a block, which stores the sums of the block before.

        Before the first one there are none: what is in the registers then goes where sums are stored later.
        """
        operands = self.operands
        rows, weights = reads_of_step(operands, inside, BLOCK, turn.part * (self.parts[1] * operands.tiles.terms))
        begun = None if turn.is_first else self._kept(turn.row)

        def exchange(stored: tuple[Sequence[Expr], Expr | int]) -> Stmt:
            return operands.tiles.exchange(
                self.tiles_across, rows, operands.pitch, weights, operands.stride, stored, begun
            )

        before = tirx.max(turn.row - 1, index(0))
        if turn.is_first and turn.is_last:
            return exchange(self._home(turn.first, before))
        kept = exchange(self._kept(tirx.Select(turn.row > index(0), turn.row - 1, index(turn.blocks) - 1)))
        if not turn.is_last or self.pitch is None:
            return kept
        return tirx.IfThenElse(turn.row > index(0), exchange(self._home(turn.first, before)), kept)

    def _finishing(self, turn: Turn, steps: int, step: Callable[[Expr, Sequence[Stmt]], Stmt]) -> Stmt:
        """Return the steps after the first one, which finish the rows of the block before."""
        each = -(-BLOCK // max(1, steps - 1))
        busy, left = divmod(BLOCK, each)

        def rows(number: Expr, count: int) -> list[Stmt]:
            some = loop(count, lambda row: self._finished(turn.first, turn.row - 1, number * each + row))
            return [tirx.IfThenElse(turn.row > index(0), some, None)]

        if steps == 1:
            return rows(index(0), BLOCK)[0]
        idle = steps - 1 - busy - (1 if left else 0)
        return sequence(
            [
                loop(busy, lambda number: step(number + 1, rows(number, each))),
                *([step(index(busy + 1), rows(index(busy), left))] if left else []),
                loop(idle, lambda number: step(index(steps - idle) + number, ())),
            ]
        )

    def _finished(self, first: Expr, block: Expr, row: Expr) -> Stmt:
        """Return what follows the sums of a row of a block of a sweep from `first` on."""
        place, inside = (self._turn(block) * BLOCK + row) * BLOCK, self.at_block(first + block)
        return finished_row(self.stage, self.epilogue, self.sums, place, inside, row, self.pieces)

    def _turn(self, block: Expr) -> Expr:
        """Return which of the memories of sums is that of a block of a sweep."""
        return block if self.parts[0] > 1 else block % self.kept

    def _kept(self, block: Expr) -> tuple[Sequence[Expr], Expr | int]:
        """Return where the sums of a block of a sweep are kept, as places of `MatrixTiles.store`, and their pitch."""
        first = self._turn(block) * (BLOCK * BLOCK)
        places = [first, first + TILE * BLOCK, first + (BLOCK * BLOCK - 1)]
        return [load(self.sums, [place]) for place in places], BLOCK * 4

    def _home(self, first: Expr, block: Expr) -> tuple[Sequence[Expr], Expr | int]:
        """Return the same of complete sums: the results where nothing follows them."""
        if self.pitch is None:
            return self._kept(block)
        inside = self.at_block(first + block)
        corners = ((0, 0), (TILE, 0), (BLOCK - 1, self.width - 1))
        points = [inside(index(row), index(column)) for row, column in corners]
        output = self.epilogue.stage.output
        return [
            load(output, [substitute(each, point) for each in self.epilogue.indices]) for point in points
        ], self.pitch
