"""Elements of a row that are computed in different ways by turns, such as channels that are turned by pairs.

Elements [p i + k] of a period p are one expression for each k. What they read by steps of p, whole groups of p side by
side, is loaded as it lies and taken apart into a vector for each place of the group; results are put together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int
from schedules.loops import index, load, local, loop, store, tiles, vector, with_local
from schedules.reducer import load_lanes
from schedules.stages import Stage, loads_of, replace_loads, sequence, substitute, variables_of

# Where a stage stores the element at a position of the row, and what.
At = Callable[[Expr, Stage], tuple[Sequence[Expr], Expr]]


@dataclass(frozen=True, eq=False)
class _Group:
    """Reads of one buffer, alike but for their last index: p i, what the first one has, and a part's number more."""

    source: Var
    outer: tuple[Expr, ...]
    first: Expr
    parts: dict[int, Var] = field(default_factory=dict)

    @property
    def least(self) -> int:
        """Return the number of the part that lies first."""
        return min(self.parts)

    def is_whole(self, period: int) -> bool:
        """Return whether the parts are all that a period has."""
        return sorted(self.parts) == list(range(self.least, self.least + period))


def row_by_turns(places: Sequence[Stage], at: At, extent: int, lanes: int) -> Stmt:
    """Return the elements [0, extent) of a row, where element p i + k is that of the k-th of p stages."""
    period = len(places)
    count = extent // period
    width = min(lanes, 1 << (count.bit_length() - 1))
    turns = _Turns(places, at, width)

    def one(number: Expr) -> Stmt:
        elements = [at(number * period + place, part) for place, part in enumerate(places)]
        return sequence([store(places[0].output, value, indices) for indices, value in elements])

    if not turns.are_groups or width == 1:
        return loop(count, one)
    return tiles(count, [width, 1], lambda start, size: turns.whole(start) if size > 1 else one(start))


class _Turns:
    """A vector of each of the stages."""

    def __init__(self, places: Sequence[Stage], at: At, width: int) -> None:
        self._output, self._period, self._width = places[0].output, len(places), width
        self._number, self._lane = (Var(name, "int64") for name in ("number", "lane"))
        self._analyzer = sym.Analyzer()
        self._groups: list[_Group] = []
        found = [at(self._number * self._period + place, part) for place, part in enumerate(places)]
        self._indices = found[0][0]
        self._values = [replace_loads(value, self._part) for _, value in found]
        stored = [self._distance(indices[-1]) for indices, _ in found]
        beyond = [as_int(self._analyzer.simplify(distance - stored[0])) for distance in stored]
        rest = [read for value in self._values for read in loads_of(value)]
        self.are_groups: bool = (
            beyond == list(range(self._period))
            and all(group.is_whole(self._period) for group in self._groups)
            and not any(self._is_among(read.indices[:-1]) for read in rest)
        )

    def whole(self, start: Expr) -> Stmt:
        """Return the store of the groups [start, start + width)."""
        width, period = self._width, self._period
        lanes = tirx.Ramp(index(0), index(1), width)
        dtype = str(self._output.dtype)
        results = [local([width], dtype, f"turn{place}") for place in range(period)]
        statements: list[Stmt] = []
        for group in self._groups:
            read = self._span(group.source, [*group.outer, group.first + group.least], start)
            for place, part in group.parts.items():
                order = [tirx.IntImm("int32", lane * period + place - group.least) for lane in range(width)]
                statements.append(store(part, tirx.Shuffle([read], order), [lanes]))
        for result, value in zip(results, self._values, strict=True):
            statements.append(
                vector(
                    width,
                    lambda v, r=result, e=value: store(r, substitute(e, {self._number: start + v, self._lane: v}), [v]),
                )
            )
        order = [tirx.IntImm("int32", place * width + lane) for lane in range(width) for place in range(period)]
        together = tirx.Shuffle([load_lanes(result, index(0), width) for result in results], order)
        begin = substitute(self._indices[-1], {self._number: start})
        place = [*self._indices[:-1], tirx.Ramp(begin, index(1), width * period)]
        parts = [part for group in self._groups for part in group.parts.values()]
        return with_local([*parts, *results], [*statements, store(self._output, together, place)])

    def _span(self, source: Var, indices: Sequence[Expr], start: Expr) -> Expr:
        begin = indices[-1] + start * self._period
        return load(source, [*indices[:-1], tirx.Ramp(begin, index(1), self._width * self._period)])

    def _part(self, read: TensorLoad) -> Expr | None:
        """Return the element of a place's vector that takes the place of a read by steps of the period, else None."""
        *outer, last = read.indices
        distance = self._distance(last)
        if self._is_among([*outer, distance]):
            return None
        group = next(
            (each for each in self._groups if self._beyond(each, read.source, outer, distance) is not None), None
        )
        if group is None:
            group = _Group(read.source, tuple(outer), distance)
            self._groups.append(group)
        place = self._beyond(group, read.source, outer, distance)
        assert place is not None
        part = group.parts.setdefault(place, local([self._width], str(read.source.dtype), f"part{place}"))
        return load(part, [self._lane])

    def _beyond(self, group: _Group, source: Var, outer: Sequence[Expr], distance: Expr) -> int | None:
        if not group.source.same_as(source) or not tvm_ffi.structural_equal(list(group.outer), list(outer)):
            return None
        place = as_int(self._analyzer.simplify(distance - group.first))
        return place if place is not None and abs(place) < self._period else None

    def _distance(self, position: Expr) -> Expr:
        """Return what an index has beyond the period times the number of the group."""
        return self._analyzer.simplify(position - self._number * self._period)

    def _is_among(self, expressions: Sequence[Expr]) -> bool:
        return any(variable.same_as(self._number) for each in expressions for variable in variables_of(each))
