"""Functions of narrow rows, and reductions of such: a row for each lane, its columns in registers of their own.

Sums and extrema along a row are then as many additions as it has columns, for all lanes' rows at once, and nothing
waits for a combination of lanes. Rows come from memory and go there by the steps of `turned_rows`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int, branches_on, free_variables, occurs
from schedules.family import Kernel, Parameters, Space, work_of
from schedules.loops import Extent, flatten, index, load, local, loop, store, vector, with_local
from schedules.reducer import accumulate, reducer_of
from schedules.row_folds import FEWEST_LANES
from schedules.rowwise import in_tasks, shared_leading
from schedules.softmax import simplified
from schedules.stages import Axis, Stage, calls_of, contains, replace_loads, sequence, substitute
from schedules.turned_rows import lanes_of, states, turned, whole
from targets.base import Target

# The lanes of registers that one or two instructions shuffle freely.
LANES = (8, 16)
FEWEST_BLOCKS = 2
WIDTH_BITS = 32
# How many sums of a row run side by side: one waits for the one before it.
CHAINS = 4
# What of rows of more than a register takes longer than to turn them, where `row_folds` leaves them.
LONG_CALLS = ("tirx.exp", "tirx.log")


@dataclass(frozen=True, eq=False)
class NarrowAnalysis:
    """Stages of `rows` rows of `width` elements, on `leading` axes, and the buffers that only they use.

    `read` are buffers with an element or a row of elements for each row, of which the stages make none.
    """

    stages: tuple[Stage, ...]
    leading: int
    private: tuple[Var, ...]
    read: tuple[Var, ...]
    rows: int
    width: int
    lanes: int


class NarrowRows:
    """Blocks of as many rows as there are lanes, tasks of several blocks in parallel."""

    name = "narrow-rows"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> NarrowAnalysis | None:
        """Return the analysis of a kernel in 32 bits that reduces rows of less than a register, or of two."""
        leading, lanes = shared_leading(kernel.stages), target.vector_lanes(WIDTH_BITS)
        if not leading or lanes not in LANES or not any(stage.is_reduction for stage in kernel.stages):
            return None
        if not all(_is_of_rows(stage, leading) for stage in kernel.stages):
            return None
        stages, private = simplified(kernel.stages, kernel.private)
        read = _read(stages, leading)
        every = [*read, *(stage.output for stage in stages)]
        shapes = {tuple(map(as_int, buffer.shape[:leading])) for buffer in every}
        widths = {_columns(buffer, leading) for buffer in every} | {_extent(stage.reduction) for stage in stages}
        if len(shapes) != 1 or len(widths - {1}) != 1:
            return None
        rows, width = math.prod(extent or 0 for extent in next(iter(shapes))), max(widths)
        calls = any(call.op.name in LONG_CALLS for stage in kernel.stages for call in _operators(stage))
        most = lanes if lanes >= FEWEST_LANES else 2 * lanes - 1
        is_narrow = 1 < width < lanes or (calls and width <= most)
        if not is_narrow or rows < FEWEST_BLOCKS * lanes:
            return None
        return NarrowAnalysis(stages, leading, private, read, rows, width, lanes)

    def space(self, target: Target, analysis: NarrowAnalysis) -> Space:
        """Return no parameters."""
        return ()

    def apply(self, analysis: NarrowAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop over blocks of rows."""
        work = max(work for stage in analysis.stages if isinstance(work := work_of(stage), int))

        def task(start: Expr, count: Extent) -> Stmt:
            return loop(count, lambda i: _block(analysis, start + i))

        return in_tasks(-(-analysis.rows // analysis.lanes), work, target, task)


def _is_of_rows(stage: Stage, leading: int) -> bool:
    """Return whether a stage of 32 bits is known to do the same with each row, a row's elements or one of their sum."""
    own = _leading(stage, leading)
    inner = [axis for axis in stage.spatial if not contains(own, axis.variable)]
    buffers = (stage.output, *(read.source for read in stage.loads()))
    if not all(axis.static for axis in stage.axes) or any(buffer.dtype.bits != WIDTH_BITS for buffer in buffers):
        return False
    if any(branches_on(stage.value, axis) for axis in stage.axes) or (inner and stage.reduction):
        return False
    if any(contains(own, variable) for variable in free_variables(stage)):
        return False
    return all(_is_in_row(stage, read, leading) for read in stage.loads() if _moves(read, own))


def _is_in_row(stage: Stage, read: TensorLoad, leading: int) -> bool:
    """Return whether a read is of a place in the row of the same number."""
    own, places = _leading(stage, leading), read.indices
    if len(places) < leading or any(occurs(place, variable) for place in places[leading:] for variable in own):
        return False
    pairs = zip(places[:leading], stage.indices[:leading], strict=True)
    return all(place.same_as(at) or (as_int(place) == 0 and as_int(at) == 0) for place, at in pairs)


def _leading(stage: Stage, leading: int) -> list[Var]:
    """Return the variables of a stage's leading axes."""
    return [each for each in stage.indices[:leading] if isinstance(each, Var)]


def _moves(read: TensorLoad, variables: Sequence[Var]) -> bool:
    return any(occurs(place, variable) for place in read.indices for variable in variables)


def _read(stages: Sequence[Stage], leading: int) -> tuple[Var, ...]:
    """Return what stages read of each row that none of them makes."""
    made = [stage.output for stage in stages]
    every = [read.source for stage in stages for read in stage.loads() if _moves(read, _leading(stage, leading))]
    return tuple(dict.fromkeys(buffer for buffer in every if not contains(made, buffer)))


def _columns(buffer: Var, leading: int) -> int:
    """Return how many elements a buffer has for each row, 0 where that is not known."""
    return math.prod(as_int(extent) or 0 for extent in buffer.shape[leading:])


def _extent(axes: Sequence[Axis]) -> int:
    return math.prod(int(axis.extent) for axis in axes)


def _operators(stage: Stage) -> list[ir.Call]:
    return [call for call in calls_of(stage.value) if isinstance(call.op, ir.Op)]


def _points(axes: Sequence[Axis]) -> Iterator[dict[Var, Expr]]:
    """Yield the values of static axes at each of their points, in order."""
    for place in itertools.product(*(range(int(axis.extent)) for axis in axes)):
        yield {axis.variable: index(at) for axis, at in zip(axes, place, strict=True)}


@dataclass(frozen=True, eq=False)
class _Registers:
    """Registers [columns, lanes] that stand for each buffer of a block of rows, and the code of stages in them."""

    analysis: NarrowAnalysis
    of: Mapping[Var, Var]

    def code(self, stage: Stage) -> Stmt:
        """Return the code of a stage for all rows of the block."""
        own = {variable: index(0) for variable in _leading(stage, self.analysis.leading)}
        if stage.is_reduction:
            return self._reduced(stage, own)
        inner = [axis for axis in stage.spatial if axis.variable not in own]
        return sequence([self._column(stage, {**own, **values}) for values in _points(inner)])

    def _column(self, stage: Stage, point: Mapping[Var, Expr]) -> Stmt:
        """Return the code of one column of a stage that reduces nothing."""
        indices, value = stage.at(point)
        result = self.of[stage.output]
        return vector(
            self.analysis.lanes,
            lambda lane: store(result, self._value(value, lane), self._at(stage.output, indices, lane)),
        )

    def _reduced(self, stage: Stage, own: Mapping[Var, Expr]) -> Stmt:
        """Return the code of a reduction, in several chains where their order does not matter."""
        lanes, reducer = self.analysis.lanes, reducer_of(stage)
        chains = 1 if reducer is None else min(CHAINS, _extent(stage.reduction))
        totals = [local([lanes], str(stage.output.dtype), "total") for _ in range(chains)]
        initial = stage.initial
        assert initial is not None
        starts = [substitute(initial, own), *([] if reducer is None else [reducer.identity] * (chains - 1))]
        code = [vector(lanes, lambda lane, t=t, v=v: store(t, v, [lane])) for t, v in zip(totals, starts, strict=True)]
        for number, values in enumerate(_points(stage.reduction)):
            total = totals[number % chains]

            def step(lane: Expr, total: Var = total, values: Mapping[Var, Expr] = values) -> Stmt:
                following = accumulate(stage, load(total, [lane]), {**own, **values})
                return store(total, self._value(following, lane), [lane])

            code.append(vector(lanes, step))

        def finish(lane: Expr) -> Stmt:
            result, *others = (load(total, [lane]) for total in totals)
            for other in others:
                assert reducer is not None
                result = reducer.combine(result, other)
            return store(self.of[stage.output], result, [index(0), lane])

        return with_local(totals, [*code, vector(lanes, finish)])

    def _value(self, value: Expr, lane: Expr) -> Expr:
        """Return a value that reads the registers where it read buffers."""

        def in_registers(read: TensorLoad) -> Expr | None:
            own = self.of.get(read.source)
            return None if own is None else load(own, self._at(read.source, read.indices, lane))

        return replace_loads(value, in_registers)

    def _at(self, buffer: Var, indices: Sequence[Expr], lane: Expr) -> list[Expr]:
        """Return the register and the lane of a buffer's element."""
        leading = self.analysis.leading
        return [flatten(indices[leading:], [int(extent) for extent in buffer.shape[leading:]]), lane]


def _block(analysis: NarrowAnalysis, number: Expr) -> Stmt:
    """Return the code of one block of rows; the last one begins in the one before it."""
    lanes, leading = analysis.lanes, analysis.leading
    first = tirx.min(number * lanes, index(analysis.rows - lanes))
    places = states(analysis.width, lanes)
    every, code = list[Var](), list[Stmt]()
    registers = dict[Var, Var]()
    for buffer in analysis.read:
        columns = _columns(buffer, leading)
        own = local([columns, lanes], str(buffer.dtype), f"{buffer.name}_rows")
        code += [
            store(own, load(buffer, _memory(buffer, first * columns + k * lanes, lanes)), lanes_of(k, lanes))
            for k in range(columns)
        ]
        steps, turns = turned(own, places if columns > 1 else places[:1], lanes)
        registers[buffer] = steps[-1]
        every += steps
        code += turns
    outputs = list(dict.fromkeys(stage.output for stage in analysis.stages))
    for buffer in outputs:
        registers[buffer] = local([_columns(buffer, leading), lanes], str(buffer.dtype), f"{buffer.name}_columns")
    code += [_Registers(analysis, registers).code(stage) for stage in analysis.stages]
    for buffer in outputs:
        columns = _columns(buffer, leading)
        is_turned = columns > 1 and not contains(analysis.private, buffer)
        steps, turns = turned(registers[buffer], places[::-1] if is_turned else places[:1], lanes)
        every += steps
        code += turns
        if not contains(analysis.private, buffer):
            code += [
                store(buffer, whole(steps[-1], k, lanes), _memory(buffer, first * columns + k * lanes, lanes))
                for k in range(columns)
            ]
    return with_local(every, code)


def _memory(buffer: Var, start: Expr, lanes: int) -> list[Expr]:
    """Return the indices of neighbouring elements of a buffer from one on, all on its last axis."""
    return [*[index(0)] * (len(buffer.shape) - 1), tirx.Ramp(start, index(1), lanes)]
