"""Steps of rows: one stage's code for a row, or for two rows in one walk, of which neither waits for the other.

A sum along a row ends in a chain, the combination of its lanes into one, which the next step waits for. With two rows
in a walk there are two chains at once, and as many loads in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import branches_on, group_axes
from schedules.elementwise import overlapping_tiles
from schedules.loops import index, load, local, loop, nest, store, vector
from schedules.matmul import walks_in_lanes
from schedules.reducer import REGISTERS, Beside, Requests, reducer_of
from schedules.reduction import reduce_columns, reduce_element
from schedules.stages import Axis, Stage, as_extent, bind, replace_loads, sequence


@dataclass(frozen=True, eq=False)
class RowBuffer:
    """The stand-in of an intermediate buffer: of one row, or of several, of which it is row `number`.

    Elements of several rows lie so many places behind their own as `shift` says.
    """

    buffer: Var
    local: Var
    leading: int
    number: Expr | None = None
    shift: int = 0

    @staticmethod
    def of(buffer: Var, leading: int) -> RowBuffer:
        """Return the stand-in of a buffer with so many axes ahead of a row's own."""
        shape = [as_extent(extent) for extent in buffer.shape[leading:]] or [1]
        return RowBuffer(buffer, local(shape, str(buffer.dtype), f"{buffer.name}_row"), leading)

    @staticmethod
    def of_rows(buffer: Var, leading: int, rows: int, width: int) -> RowBuffer:
        """Return the stand-in for several rows of one axis, which has room for `width` elements, or of one element."""
        shape = [rows] if has_one_element(buffer, leading) else [rows, width]
        return RowBuffer(buffer, local(shape, str(buffer.dtype), f"{buffer.name}_rows"), leading)

    def of_row(self, number: Expr, shift: int) -> RowBuffer:
        """Return the stand-in of one of several rows."""
        return replace(self, number=number, shift=shift)

    def at(self, indices: Sequence[Expr]) -> list[Expr]:
        """Return the place in a row of an element of the buffer."""
        own = list(indices[self.leading :])
        if self.number is None:
            return own or [index(0)]
        return [self.number, *(each + self.shift for each in own[: len(self.local.shape) - 1])]


# A stage of a row, and one that is computed in its walk.
RowStep = tuple[Stage | None, Stage]


@dataclass(frozen=True, eq=False)
class Row:
    """A row's place on the leading axes, and what stands in for intermediate buffers in it."""

    position: Sequence[Expr]
    buffers: Sequence[RowBuffer]


def has_one_element(buffer: Var, leading: int) -> bool:
    """Return whether a buffer has a single element for each row."""
    return all(as_extent(extent) == 1 for extent in buffer.shape[leading:])


def is_along_row(stage: Stage, leading: int) -> bool:
    """Return whether a stage reduces a row's only axis to one element, in lanes."""
    if len(stage.reduction) != 1 or len(stage.output.shape) > leading or reducer_of(stage) is None:
        return False
    return walks_in_lanes(stage, group_axes(stage.reduction, [stage])[-1])


def in_row(stage: Stage, buffers: Sequence[RowBuffer]) -> Stage:
    """Return `stage` with private buffers replaced by their one-row stand-ins."""

    def stand_in(buffer: Var) -> RowBuffer | None:
        return next((row for row in buffers if row.buffer.same_as(buffer)), None)

    def rewrite(read: TensorLoad) -> Expr | None:
        row = stand_in(read.source)
        return None if row is None else load(row.local, row.at(read.indices))

    own = stand_in(stage.output)
    value = replace_loads(stage.value, rewrite)
    if own is None:
        return replace(stage, value=value)
    return replace(stage, output=own.local, indices=tuple(own.at(stage.indices)), value=value)


@dataclass(frozen=True)
class RowCode:
    """The code of stages with `leading` axes in common, in vectors of `lanes`, for up to so many rows `together`.

    A row's sums are of the same order whether it has another one beside it or not.
    """

    leading: int
    lanes: int
    together: int = 1

    def step(
        self,
        stage: Stage,
        rows: Sequence[Row],
        first: Stage | None = None,
        beside: Beside | None = None,
        ahead: Requests | None = None,
    ) -> Stmt:
        """Return one stage's code for one or two rows; `first`, `beside` and requests for lines are done on the way."""
        if not stage.is_reduction:
            return self._map(stage, rows, ahead)
        if len(rows) > 1 and is_along_row(stage, self.leading):
            own, other = rows
            return self._reduce(stage, own, first, self.beside(stage, other, first=first), ahead)
        return sequence([self._reduce(stage, row, first, beside, ahead) for row in rows])

    def beside(
        self, stage: Stage, row: Row, finish: Callable[[Expr], Stmt] | None = None, first: Stage | None = None
    ) -> Beside:
        """Return a reduction along `row` that is to be done in the walk of another one, and stored unless `finish`."""
        own, axis = in_row(stage, row.buffers), stage.reduction[0].variable
        point = bind(stage.indices[: self.leading], row.position)
        reducer = reducer_of(own)
        assert reducer is not None

        def stored(total: Expr) -> Stmt:
            return store(own.output, total, own.at(point)[0])

        return Beside(own, reducer, lambda i: {**point, axis: i}, finish or stored, self._before(stage, row, first))

    def _before(self, stage: Stage, row: Row, first: Stage | None) -> Callable[[Mapping[Var, Expr]], Stmt] | None:
        """Return what computes an element of `first` on the way along `stage`."""
        if first is None:
            return None
        own = bind(first.indices[: self.leading], row.position)
        walked = first.indices[self.leading]
        computed = in_row(first, row.buffers)

        def before(values: Mapping[Var, Expr]) -> Stmt:
            indices, value = computed.at({**own, walked: values[stage.reduction[0].variable]})
            return store(computed.output, value, indices)

        return before

    def _map(self, stage: Stage, rows: Sequence[Row], ahead: Requests | None) -> Stmt:
        points = [bind(stage.indices[: self.leading], row.position) for row in rows]
        groups = group_axes([axis for axis in stage.spatial if axis.variable not in points[0]], [stage])
        stages = [in_row(stage, row.buffers) for row in rows]

        def element(own: Stage, point: Mapping[Var, Expr], positions: Sequence[Expr]) -> Stmt:
            values = dict(point)
            for group, position in zip(groups, positions, strict=True):
                values.update(group.point(position))
            indices, value = own.at(values)
            return store(own.output, value, indices)

        if not groups:
            return sequence([element(own, point, []) for own, point in zip(stages, points, strict=True)])
        last = groups[-1]

        def each(outer: list[Expr]) -> Stmt:
            if branches_on(stage.value, last.inner):
                return sequence(
                    [
                        loop(last.extent, lambda i, s=own, p=point: element(s, p, [*outer, i]))
                        for own, point in zip(stages, points, strict=True)
                    ]
                )

            def tile(base: Expr, width: int) -> Stmt:
                vectors = [
                    vector(width, lambda i, s=own, p=point: element(s, p, [*outer, base + i]))
                    for own, point in zip(stages, points, strict=True)
                ]
                return sequence([*(ahead(base, width) if ahead is not None and len(groups) == 1 else []), *vectors])

            return overlapping_tiles(last.extent, self.lanes, tile)

        return nest([group.extent for group in groups[:-1]], each)

    def _reduce(
        self, stage: Stage, row: Row, first: Stage | None, beside: Beside | None, ahead: Requests | None
    ) -> Stmt:
        point = bind(stage.indices[: self.leading], row.position)
        inner: list[Axis] = [axis for axis in stage.spatial if axis.variable not in point]
        before = self._before(stage, row, first)
        stage = in_row(stage, row.buffers)
        reduction = tuple(group_axes(stage.reduction, [stage]))
        reducer = reducer_of(stage)
        along = reduction[-1] if reducer is not None and walks_in_lanes(stage, reduction[-1]) else None
        columns = group_axes(inner, [stage])
        if along is None and reducer is not None and columns and walks_in_lanes(stage, columns[-1]):
            return reduce_columns(stage, reduction, columns, point, self.lanes)

        def one(positions: Sequence[Expr]) -> Stmt:
            values = {**point, **{axis.variable: p for axis, p in zip(inner, positions, strict=True)}}
            indices, _ = stage.at(values)

            def finish(total: Expr) -> Stmt:
                return store(stage.output, total, indices)

            registers = REGISTERS // self.together
            return reduce_element(
                stage, reduction, reducer, along, self.lanes, values, finish, before, beside, ahead, registers
            )

        return nest([axis.extent for axis in inner], one)
