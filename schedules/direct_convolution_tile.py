"""One register tile of a direct convolution: its reduction over taps and channels, and what follows on the tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step, as_int, linear_coefficient, occurs
from schedules.by_element import in_terms, with_elements, with_read
from schedules.channel_windows import ChannelWindow, ChannelWindows
from schedules.convolution_tile import steps_of_columns
from schedules.intrin.byte_dot import FOUR, WORD
from schedules.intrin.byte_rounding import rounding_of
from schedules.intrin.byte_stores import TOGETHER
from schedules.intrin.grouped_call import GroupedDot
from schedules.intrin.load_fence import fence
from schedules.loops import index, load, local, loop, prefetch, quotient, store, unrolled, vector, with_local
from schedules.reducer import accumulate, accumulator_dtype
from schedules.stages import Axis, Stage, replace_loads, replaced, sequence, substitute, with_value

Point = Mapping[Var, Expr]


@dataclass(frozen=True)
class RegisterTile:
    """One register tile: `blocks` from block `first` of group `group` by `columns` from `start`.

    Weights are asked for `ahead` steps before, if that is not 0. `by_position` is whether the taps of a row follow the
    elements that they read (`convolution_tile.follows_positions`), `rows_apart` whether a fence stands before each row
    of taps (`convolution_tile.parts_rows_of_taps`).
    """

    analysis: ChannelWindows
    dot: GroupedDot | None
    by_element: bool
    point: Point
    group: Expr
    first: Expr
    blocks: int
    start: Expr
    columns: int
    border: int | None
    ahead: int = 0
    by_position: bool = False
    rows_apart: bool = False

    @cached_property
    def dtype(self) -> str:
        return accumulator_dtype(self.analysis.stage)

    @cached_property
    def registers(self) -> Var:
        return local([self.blocks * self.columns * self.analysis.block], self.dtype, "accumulators")

    @cached_property
    def stage(self) -> Stage:
        """The stage, with the data of the tile's group read as one: their channel does not vary within the tile."""
        channel, data, stage = self.analysis.channel, self.analysis.data, self.analysis.stage
        if channel is None or not any(occurs(position, channel.variable) for position in data.indices):
            return stage
        own = substitute(data, {channel.variable: self.group * self.analysis.per_group})
        return with_value(stage, replace_loads(stage.value, lambda read: own if read.same_as(data) else None))

    def statement(self) -> Stmt:
        """Return initialization, reduction and epilogue."""
        return with_local([self.registers], [self.started(), self._reduction(), self.finished()])

    def started(self) -> Stmt:
        """Return the initialization of the registers."""
        stage = self.analysis.stage
        assert stage.initial is not None

        def start(at: Point, register: Expr, _: Expr) -> Stmt:
            return store(self.registers, substitute(stage.initial, at).astype(self.dtype), [register])

        return self._cells((0, self.columns), start)

    def finished(self) -> Stmt:
        """Return what follows the reduction; neighbouring columns are rounded to bytes together."""
        if rounding_of(self.analysis.epilogue.value) is None or not self._outputs_adjoin:
            return self._cells((0, self.columns), lambda at, register, _: self._written(at, register))

        def together(count: int, first: Expr) -> Stmt:
            return unrolled(self.blocks, lambda block: self._rounded(first, count, block))

        def all_of(count: int, begin: int) -> Stmt:
            return unrolled((self.columns - begin) // count, lambda group: together(count, begin + group * count))

        parts, done = [], 0
        for count in (TOGETHER, TOGETHER // 2, 1):
            if self.columns - done >= count:
                parts.append(all_of(count, done))
                done += (self.columns - done) // count * count
        return sequence(parts)

    def _written(self, at: Point, register: Expr) -> tirx.BufferStore:
        """Return the store of what becomes of the sum in a lane of a register."""
        total = load(self.registers, [register]).astype(self.analysis.stage.output.dtype)
        return self.analysis.epilogue.store(total, at)

    def _rounded(self, first: Expr, count: int, block: Expr) -> Stmt:
        """Return the bytes of `count` neighbouring columns: the numbers of each, then one vector of all."""
        lanes = self.analysis.block
        numbers = local([count * lanes], "float32", "numbers")

        def number(column: int, lane: Expr) -> Stmt:
            rounding = rounding_of(self._written(*self._cell(first + column, block, lane)).value)
            assert rounding is not None
            return store(numbers, rounding.value, [column * lanes + lane])

        def written(lane: Expr) -> Stmt:
            own = self._written(*self._cell(first, block, lane))
            rounding = rounding_of(own.value)
            assert rounding is not None
            return store(own.buffer, replaced(own.value, rounding.value, load(numbers, [lane])), list(own.indices))

        each = [vector(lanes, lambda lane, c=column: number(c, lane)) for column in range(count)]
        return with_local([numbers], [*each, vector(count * lanes, written)])

    @property
    def _outputs_adjoin(self) -> bool:
        """Whether the blocks of neighbouring columns lie side by side in the output."""
        columns, epilogue = self.analysis.columns, self.analysis.epilogue
        if columns is None or len(epilogue.indices) < 2:
            return False
        *_, before, last = epilogue.indices
        whole = last.same_as(self.analysis.lane.variable)
        whole &= as_int(epilogue.stage.output.shape[-1]) == self.analysis.block
        return whole and linear_coefficient(before, columns.inner.variable) == 1

    def _cells(self, columns: tuple[int, int], element: Callable[[Point, Expr, Expr], Stmt]) -> Stmt:
        """Return `element` for columns [begin, end) and all blocks, each one vector; columns count from `begin`."""
        begin, end = columns

        def cell(j: Expr, o: Expr) -> Stmt:
            return vector(self.analysis.block, lambda v: element(*self._cell(j + begin, o, v), j))

        return unrolled(end - begin, lambda j: unrolled(self.blocks, lambda o: cell(j, o)))

    def _cell(self, column: Expr, block: Expr, lane: Expr) -> tuple[Point, Expr]:
        """Return where a lane of a column and a block of the tile is in the output, and among the registers."""
        at = {**self.point, self.analysis.lane.variable: lane}
        if self.analysis.columns is not None:
            at.update(self.analysis.columns.point(self.start + column))
        if self.analysis.channel is not None:
            at[self.analysis.channel.variable] = self.group * self.analysis.per_group + self.first + block
        return at, (block * self.columns + column) * self.analysis.block + lane

    def _reduction(self) -> Stmt:
        depth = self.analysis.depth
        axes = [axis for axis in self.stage.reduction if axis is not depth]
        everywhere = (0, self.columns)
        if depth is None:
            return self._steps(axes, {}, everywhere, None)
        assert isinstance(depth.extent, int)
        block = self.analysis.block
        whole, rest = divmod(depth.extent, block)
        parts = []
        if whole:
            parts.append(loop(whole, lambda i: self._steps(axes, {}, everywhere, (i * block, block))))
        if rest:
            parts.append(self._steps(axes, {}, everywhere, (index(whole * block), rest)))
        return sequence(parts)

    def _steps(
        self, axes: list[Axis], values: Point, columns: tuple[int, int], channels: tuple[Expr, int] | None
    ) -> Stmt:
        """Return the loops over `axes`, and innermost over the `channels` [begin, count) of a block of the data."""
        if not axes:
            if channels is None:
                return self._step(values, columns)
            depth = self.analysis.depth
            assert depth is not None
            begin, count = channels
            terms = self._terms(depth)
            if self._element_read is not None:
                return self._element_steps(self._element_read, depth, {**values, depth.variable: begin}, columns, count)
            return loop(count // terms, lambda i: self._step({**values, depth.variable: begin + i * terms}, columns))
        axis, *rest = axes

        def inside(position: Expr, reached: tuple[int, int] = columns) -> Stmt:
            return self._steps(rest, {**values, axis.variable: position}, reached, channels)

        window = next((window for window in self.analysis.padded if window.tap is axis), None)
        if self.by_position and not rest:
            return self._positions(axis, values, window)
        if window is None or (window is self.analysis.column_window and self.border is None):
            read = self._element_read
            if read is not None and not rest and channels is None and _is_contiguous(read, axis):
                return self._element_steps(read, axis, {**values, axis.variable: index(0)}, columns, int(axis.extent))
            return self._plain_loop(axis, inside)
        if window is self.analysis.column_window:
            return self._border(window, inside)
        position = index(0) if window.axis is None else self.point[window.axis.variable]
        first, count = window.taps_inside(position)
        return loop(count, lambda i: inside(first + i))

    def _plain_loop(self, axis: Axis, body: Callable[[Expr], Stmt]) -> Stmt:
        innermost = axis is self.stage.reduction[-1]
        by_lane = any(occurs(position, self.analysis.lane.variable) for position in self.analysis.data.indices)
        if by_lane and innermost and isinstance(axis.extent, int):
            # Lane by lane, neighbouring taps read the same vectors.
            return unrolled(axis.extent, body)
        terms = self._terms(axis)
        taps = loop(quotient(axis.extent, terms), lambda i: body(i * terms))
        return sequence([fence(), taps]) if innermost and self.rows_apart else taps

    def _positions(self, axis: Axis, values: Point, window: ChannelWindow | None) -> Stmt:
        """Return the taps of a row in the order of what they read: each element is in a register for its taps alone."""
        stride, dilation = steps_of_columns(self.analysis)
        reached = [
            (column * stride + tap * dilation, tap, column)
            for column in range(self.columns)
            for tap in range(int(axis.extent))
            if window is None or self.border is None or window.reads_inside(self.border + column, tap)
        ]
        steps = [
            self._step({**values, axis.variable: index(tap)}, (column, column + 1))
            for _, tap, column in sorted(reached)
        ]
        return sequence(steps) if steps else tirx.Evaluate(0)

    def _terms(self, axis: Axis) -> int:
        """Return how many positions of an axis one step of the reduction takes."""
        return self.analysis.terms if self.dot is not None and axis is self.analysis.grouped else 1

    def _border(self, window: ChannelWindow, body: Callable[[Expr, tuple[int, int]], Stmt]) -> Stmt:
        """Return the taps of a tile at the border, those that reach the same columns of the image as one loop."""

        def reached(tap: int) -> tuple[int, int]:
            assert self.border is not None
            inside = [j for j in range(self.columns) if window.reads_inside(self.border + j, tap)]
            return (inside[0], inside[-1] + 1) if inside else (0, 0)

        statements = []
        for columns, run in itertools.groupby(range(int(window.tap.extent)), reached):
            taps = list(run)
            if columns[0] < columns[1]:
                statements.append(loop(len(taps), lambda i, b=taps[0], c=columns: body(i + b, c)))
        return sequence(statements) if statements else tirx.Evaluate(0)

    def _step(self, values: Point, columns: tuple[int, int]) -> Stmt:
        if self.dot is not None:
            return self._grouped_step(self.dot, values, columns)
        return sequence([*self._lines_ahead(values), self._add(columns, values, lambda _: self.stage)])

    def _lines_ahead(self, values: Point) -> list[Stmt]:
        """Return what asks for the weights of a later step, of one channel, in whose order they lie in memory."""
        if not self.ahead:
            return []

        def request(block: int) -> Stmt:
            at, _ = self._cell(index(0), index(block), index(0))
            *before, last = substitute(self.analysis.weights, {**at, **values}).indices
            place = last + self.ahead * self.analysis.block
            return prefetch(load(self.analysis.weights.source, [*before, place]))

        return [request(block) for block in range(self.blocks)]

    def _add(self, columns: tuple[int, int], values: Point, source: Callable[[Expr], Stage]) -> Stmt:
        """Return the step of a term, of which `source` gives what the stage is for a column."""

        def update(at: Point, register: Expr, column: Expr) -> Stmt:
            value = accumulate(source(column), load(self.registers, [register]), {**at, **values})
            return store(self.registers, value, [register])

        return self._cells(columns, update)

    @cached_property
    def _element_read(self) -> TensorLoad | None:
        """The read of the data, where its elements along a block of channels are loaded as one vector."""
        loads = self.stage.loads()
        if not self.by_element or len(loads) < 2:
            return None  # A pooling reads nothing beside the data.
        reads = [read for read in loads if not read.same_as(self.analysis.weights)]
        if self.dot is not None:  # Bytes come with those of neighbouring columns instead.
            return None if self.dot.terms == FOUR else reads[0]
        known = len(reads) == 1 and str(reads[0].source.dtype) == "float32"
        return reads[0] if known else None

    def _element_steps(self, read: TensorLoad, axis: Axis, values: Point, columns: tuple[int, int], count: int) -> Stmt:
        """Return `count` positions of the axis along which the elements of `read` are neighbours."""
        begin, end = columns
        dot, terms = self.dot, self._terms(axis)

        def some(first: Expr, steps: int, before: int) -> Stmt:
            def at(step: Expr | int) -> Point:
                return {**values, axis.variable: values[axis.variable] + (first + step) * terms}

            def element(column: Expr, step: Expr) -> Expr:
                return substitute(read, {**self._cell(begin + column, index(0), index(0))[0], **at(step)})

            def add(step: int, of_column: Callable[[Expr], Expr]) -> Stmt:
                if dot is not None:
                    return self._grouped_step(dot, at(step), columns, of_column)
                return self._add(columns, at(step), lambda j: with_read(self.stage, read, of_column(j)))

            return with_elements(element, (end - begin, steps), before, add, None if dot is None else dot.groups)

        return in_terms(count // terms, self.analysis.block if dot is None else dot.at_once, some)

    def _grouped_step(
        self,
        dot: GroupedDot,
        values: Point,
        columns: tuple[int, int],
        group_of: Callable[[Expr], Expr] | None = None,
    ) -> Stmt:
        """Return the step that adds several terms to each sum; `group_of` gives a column's, where loaded before."""
        weights = self.analysis.weights
        data = next(read for read in self.stage.loads() if not read.same_as(weights))
        begin, end = columns

        def read(j: Expr) -> Expr:
            return substitute(data, {**self._cell(j + begin, index(0), index(0))[0], **values})

        def each(first: int, count: int, product: Callable[[Expr, Expr, Expr], Expr]) -> Stmt:
            def update(j: Expr, o: Expr, part: Expr) -> Stmt:
                at, register = self._cell(j + begin, o, part * dot.lanes)
                place = [tirx.Ramp(register, index(1), dot.lanes)]
                total = product(load(self.registers, place), substitute(weights, {**at, **values}), j)
                return store(self.registers, total, place)

            def cell(j: Expr, o: Expr) -> Stmt:
                return unrolled(self.analysis.block // dot.lanes, lambda part: update(first + j, o, part))

            return unrolled(count, lambda j: unrolled(self.blocks, lambda o: cell(j, o)))

        if group_of is not None:
            return each(0, end - begin, lambda sums, own, j: dot.accumulate_group(sums, own, group_of(j)))
        if dot.terms != FOUR:
            products = each(0, end - begin, lambda sums, own, j: dot.accumulate(sums, own, read(j), dot.terms))
            return sequence([fence(), products]) if str(data.source.dtype) == WORD else products
        fours = dot.at_once
        together = (end - begin) // fours * fours if self.by_element and self._columns_adjoin(data) else 0
        held = local([max(together, 1)], "int32", "fours")
        loads = [
            store(held, dot.groups(read(index(j)), fours), [tirx.Ramp(index(j), index(1), fours)])
            for j in range(0, together, fours)
        ]
        parts = [each(0, together, lambda sums, own, j: dot.accumulate_group(sums, own, load(held, [j])))]
        rest = each(together, end - begin - together, lambda sums, own, j: dot.accumulate(sums, own, read(j), FOUR))
        statements = [fence(), *loads, *(parts if together else []), *([rest] if end - begin > together else [])]
        return with_local([held], statements) if together else sequence(statements)

    def _columns_adjoin(self, data: TensorLoad) -> bool:
        """Return whether neighbouring columns read fours that lie side by side."""
        columns = self.analysis.columns
        if columns is None or as_int(data.source.shape[-1]) != FOUR:
            return False
        return linear_coefficient(data.indices[-2], columns.inner.variable) == 1


def _is_contiguous(read: TensorLoad, axis: Axis) -> bool:
    """Return whether an axis of known extent walks through neighbouring elements."""
    return axis.static and Access(read.source, tuple(read.indices)).step(axis) == Step.UNIT
