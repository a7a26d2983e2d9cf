"""Short rows in several steps, as many at once as a register has lanes, so that their sums are folded together.

To combine the lanes of a sum into one takes as long as to add up several registers of a row, and all that follows waits
for it. Here a step is done for every row of a block before the next one: what a row adds up to is kept in lanes, and
those of all rows are folded to one register of totals, a step for each row (`reducer.folds`). What a row has one of,
such as the inverse of its sum, is computed for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int, branches_on, free_variables, occurs
from schedules.intrin.elementary_calls import calls_functions
from schedules.intrin.vector_math import NONPOSITIVE
from schedules.loops import Extent, index, load, local, loop, product, ramp, store, unflatten, vector, with_local
from schedules.reducer import Requests, folds, reducer_of, term_at
from schedules.row_steps import Row, RowBuffer, RowStep, has_one_element, in_row, is_along_row
from schedules.rows_ahead import lines_to_write
from schedules.stages import Stage, bind, contains, sequence
from targets.base import Target

FLOAT = "float32"
BITS = 32
FEWEST_BLOCKS = 2
# Fewer lanes take fewer steps to fold.
FEWEST_LANES = 16
# From so many registers on rows take as long one by one: 64 elements 211 and 209 us, 128 193 and 180 (Emerald Rapids).
MOST_REGISTERS = 4


def folds_together(stages: Sequence[Stage], leading: int, private: Sequence[Var], target: Target) -> bool:
    """Return whether steps are those of softmaxes of short rows.

    Each step adds up a row's only axis of more than a register, or is done element by element; what it reads of another
    step is of its own row. Other functions of rows wait less for their sums, and are faster in fewer walks.
    """
    lanes = target.vector_lanes(BITS)
    rows = product([as_int(extent) or 0 for extent in stages[0].output.shape[:leading]])
    width = next((stage.reduction[0].extent for stage in stages if stage.is_reduction), 0)
    if lanes < FEWEST_LANES or not isinstance(rows, int) or rows < FEWEST_BLOCKS * lanes:
        return False
    if not isinstance(width, int) or not lanes <= width < MOST_REGISTERS * lanes:
        return False
    is_softmax = any(calls_functions(stage.value, {NONPOSITIVE}) for stage in stages)
    return is_softmax and all(_suits(stage, leading, width, private) for stage in stages)


def _buffers(stage: Stage) -> list[Var]:
    return [stage.output, *(read.source for read in stage.loads())]


def _suits(stage: Stage, leading: int, width: int, private: Sequence[Var]) -> bool:
    """Return whether a stage adds up rows of `width`, or is done with each of their elements, or once for each row."""
    inner = [*stage.indices[leading:], *(axis.variable for axis in stage.reduction)]
    kept = [
        read for read in stage.loads() if contains(private, read.source) and not has_one_element(read.source, leading)
    ]
    if any(buffer.dtype.bits > BITS for buffer in _buffers(stage)):
        return False
    if not all(inner and read.indices[-1].same_as(inner[-1]) for read in kept):
        return False
    if stage.is_reduction:
        is_private = str(stage.output.dtype) == FLOAT and contains(private, stage.output)
        return is_private and is_along_row(stage, leading) and stage.reduction[0].extent == width
    own = _leading(stage, leading)
    if not has_one_element(stage.output, leading):
        return len(stage.indices) == leading + 1 and as_int(stage.output.shape[-1]) == width and not _branches(stage)
    # A register's lanes are rows, whose places in memory nobody knows to be neighbours.
    moving = [read for read in stage.loads() if any(occurs(at, axis) for at in read.indices for axis in own)]
    is_private = contains(private, stage.output) and all(contains(private, read.source) for read in moving)
    return is_private and not any(contains(own, variable) for variable in free_variables(stage))


def _leading(stage: Stage, leading: int) -> list[Var]:
    return [each for each in stage.indices[:leading] if isinstance(each, Var)]


def _branches(stage: Stage) -> bool:
    return any(branches_on(stage.value, axis) for axis in stage.spatial)


@dataclass(frozen=True)
class _Walk:
    """Vectors along a row, `count` of them from `start` on, of whose lanes the first `known` were done before.

    What a private buffer has for such a vector lies `known` places behind the row's own: so a vector that is read was
    stored as one, and need not wait until its parts are in the cache.
    """

    start: int
    count: int
    known: int = 0


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Blocks of as many rows of `width` elements as there are `lanes`; `extents` are those of the leading axes."""

    steps: tuple[RowStep, ...]
    private: tuple[Var, ...]
    extents: tuple[Extent, ...]
    width: int
    lanes: int
    target: Target

    @property
    def leading(self) -> int:
        """The number of leading axes."""
        return len(self.extents)

    def code(self, first: Expr) -> Stmt:
        """Return the code of all steps for the rows from the first one on."""
        shared = [RowBuffer.of_rows(each, self.leading, self.lanes, self._padded) for each in self.private]
        statements = [self._step(before, stage, first, shared) for before, stage in self.steps]
        return with_local([each.local for each in shared], statements)

    @property
    def _padded(self) -> int:
        return -(-self.width // self.lanes) * self.lanes

    def _walks(self) -> list[_Walk]:
        count, rest = divmod(self.width, self.lanes)
        walks = [_Walk(0, count)]
        return [*walks, _Walk(self.width - self.lanes, 1, self.lanes - rest)] if rest else walks

    def _step(self, before: Stage | None, stage: Stage, first: Expr, shared: Sequence[RowBuffer]) -> Stmt:
        def row(number: Expr, shift: int = 0) -> Row:
            return Row(unflatten(first + number, self.extents), [each.of_row(number, shift) for each in shared])

        if stage.is_reduction:
            return self._reduced(before, stage, row)
        if has_one_element(stage.output, self.leading):
            return vector(self.lanes, lambda number: self._element(stage, row(number), None))
        return loop(
            self.lanes, lambda number: self._along(lambda walk, at: self._vector(stage, row(number, walk.known), at))
        )

    def _along(self, body: Callable[[_Walk, Expr], Stmt]) -> Stmt:
        return sequence(
            [loop(walk.count, lambda i, w=walk: body(w, i * self.lanes + w.start)) for walk in self._walks()]
        )

    def _vector(self, stage: Stage, row: Row, start: Expr) -> Stmt:
        return vector(self.lanes, lambda lane: self._element(stage, row, start + lane))

    def _element(self, stage: Stage, row: Row, position: Expr | None) -> Stmt:
        """Return the code of one element of a row, or of what there is one of."""
        own = in_row(stage, row.buffers)
        point = bind(stage.indices[: self.leading], row.position)
        if position is not None:
            point |= bind(stage.indices[self.leading :], [position])
        indices, value = own.at(point)
        return store(own.output, value, indices)

    def _reduced(self, before: Stage | None, stage: Stage, row: Callable[[Expr, int], Row]) -> Stmt:
        """Return a sum along each row; `before` is computed on the way."""
        lanes, reducer, initial = self.lanes, reducer_of(stage), stage.initial
        assert reducer is not None
        assert initial is not None
        sums = local([lanes * lanes], FLOAT, "sums")

        def of_row(number: Expr) -> Stmt:
            total = local([lanes], FLOAT, "total")
            ahead = None if before is None else self._lines_to_write(row(number, 0))

            def step(walk: _Walk, at: Expr) -> Stmt:
                own = row(number, walk.known)
                requests = [] if ahead is None else ahead(at, lanes)
                first = [] if before is None else [self._vector(before, own, at)]
                return sequence([*requests, *first, self._added(stage, own, walk, at, total)])

            begin = vector(lanes, lambda lane: store(total, reducer.identity, [lane]))
            end = vector(lanes, lambda lane: store(sums, load(total, [lane]), [number * lanes + lane]))
            return with_local([total], [begin, self._along(step), end])

        vectors = [load(sums, [ramp(number * lanes, lanes)]) for number in range(lanes)]
        folded = reducer.combine(tirx.Broadcast(initial, lanes), folds(reducer, vectors, lanes))
        result = next(each.local for each in row(index(0), 0).buffers if each.buffer.same_as(stage.output))
        return with_local([sums], [loop(lanes, of_row), store(result, folded, [ramp(0, lanes)])])

    def _lines_to_write(self, row: Row) -> Requests | None:
        stages = [stage for _, stage in self.steps]
        return lines_to_write(stages, self.private, self.leading, row.position, self.target)

    def _added(self, stage: Stage, row: Row, walk: _Walk, start: Expr, total: Var) -> Stmt:
        """Return the code that adds a vector of a row's terms, of those that are not known, to `total`."""
        summed, axis = in_row(stage, row.buffers), stage.reduction[0]
        point, reducer = bind(stage.indices[: self.leading], row.position), reducer_of(summed)
        assert reducer is not None

        def add(lane: Expr) -> Stmt:
            term = term_at(summed, reducer, {**point, axis.variable: start + lane})
            if walk.known:
                term = tirx.Select(lane >= walk.known, term, reducer.identity)
            return store(total, reducer.combine(load(total, [lane]), term), [lane])

        return vector(self.lanes, add)
