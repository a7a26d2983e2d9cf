"""Poolings of whole planes in registers: no row takes the detour through memory that `pooling` makes.

The rows of the image that a row of the output reaches are combined into vectors of columns; each column of a window is
a shuffle of these. What lies outside of the image is known when the code is written: rows are left out, columns are
neutral lanes of the shuffles. Rows at the upper and lower border are written out one by one, those between them are a
loop, and so are the middles of long rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import DataType, tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.channel_windows import ChannelWindow
from schedules.elementwise import overlapping_vectors
from schedules.loops import Extent, index, load, local, loop, product, store, unflatten, vector, with_local
from schedules.pooling_structure import MOST_WRITTEN, PoolingAnalysis, inside, narrowed, term_of
from schedules.reducer import accumulator_dtype, load_lanes, power_of_two
from schedules.stages import Axis, sequence
from targets.base import Target

# Each element of a vector comes from another one beyond this.
LARGEST_STRIDE = 4
# A tile's columns of the output: what the combined rows need fits the registers.
MOST_VECTORS = 4
# Shuffles of more lanes are no longer single instructions; of wider elements there are too few.
MOST_LANES = 16
MOST_BITS = 32

Point = Mapping[Var, Expr]
# The rows of the image that are combined: for each the tap of the window over rows, if there is one.
Taps = Sequence[Sequence[Expr]]
Ranges = Mapping[Var, tuple[int, int]]
# Where a lane of a shuffle comes from: a vector of columns and a lane of it; None for what is neutral.
Place = tuple[int, int] | None


def applies(analysis: PoolingAnalysis, planes_wanted: int) -> bool:
    """Return whether planes are written in this way: of one or two dimensions, and enough of them for all tasks."""
    *above, window = analysis.windows
    bits = DataType(accumulator_dtype(analysis.stage)).bits
    if len(above) > 1 or window.stride > LARGEST_STRIDE or bits > MOST_BITS:
        return False
    if not all(int(each.tap.extent) <= MOST_WRITTEN and _reaches(each) for each in analysis.windows):
        return False
    if window.axis is None or window.axis.extent == 1 or sum(map(_borders, above)) > MOST_WRITTEN:
        return False
    count = product([axis.extent for axis in planes(analysis)])
    return not isinstance(count, int) or count >= planes_wanted


def lanes_of(analysis: PoolingAnalysis, target: Target) -> int:
    """Return how many elements of a row are shuffled at once."""
    return min(MOST_LANES, target.vector_lanes(DataType(accumulator_dtype(analysis.stage)).bits))


def _reaches(window: ChannelWindow) -> bool:
    """Return whether each window has something of the image."""
    if window.axis is None:
        return False
    taps = range(int(window.tap.extent))
    return all(any(window.reads_inside(at, tap) for tap in taps) for at in range(int(window.axis.extent)))


def _borders(window: ChannelWindow) -> int:
    """Return how many positions of the output have windows that are not all inside of the image."""
    begin, end = inside(window)
    assert window.axis is not None
    return int(window.axis.extent) - (end - begin)


def planes(analysis: PoolingAnalysis) -> list[Axis]:
    """Return the output's axes that are not of a window."""
    rows = [window.axis for window in analysis.windows[:-1]]
    return [axis for axis in analysis.outer if not any(axis is row for row in rows)]


@dataclass(frozen=True)
class _Tile:
    """Outputs of a row, from column `base` on: vectors of `width` at `starts`, relative to a `base` that is not static.

    `columns` are the vectors of the image's columns that are combined: the first of each, and how many lanes they have.
    """

    base: Extent
    starts: tuple[int, ...]
    width: int
    columns: tuple[int, ...]
    lanes: int


class Planes:
    """Code for planes of the output."""

    def __init__(self, analysis: PoolingAnalysis, lanes: int) -> None:
        self._analysis = analysis
        self._stage = analysis.stage
        self._dtype = accumulator_dtype(analysis.stage)
        *above, self._window = analysis.windows
        self._above = above[0] if above else None
        assert self._window.axis is not None
        self._axis = self._window.axis
        self._count = int(self._axis.extent)
        self._lanes = min(lanes, power_of_two(self._count))

    def emit(self, start: Expr, count: Extent) -> Stmt:
        """Return code for `count` planes from `start` on."""
        axes = planes(self._analysis)

        def plane(number: Expr) -> Stmt:
            positions = unflatten(number, [axis.extent for axis in axes]) if axes else []
            return self._plane({axis.variable: at for axis, at in zip(axes, positions, strict=True)})

        return loop(count, lambda i: plane(start + i))

    def _plane(self, point: Point) -> Stmt:
        window = self._above
        if window is None:
            return self._row(point, [[]], {})
        assert window.axis is not None
        variable, rows, taps = window.axis.variable, int(window.axis.extent), range(int(window.tap.extent))
        begin, end = inside(window)

        def alone(row: int) -> Stmt:
            read = [[index(tap)] for tap in taps if window.reads_inside(row, tap)]
            return self._row({**point, variable: index(row)}, read, {variable: (row, row + 1)})

        def among(number: Expr) -> Stmt:
            every = [[index(tap)] for tap in taps]
            return self._row({**point, variable: number + begin}, every, {variable: (begin, end)})

        middle = [loop(end - begin, among)] if end > begin else []
        return sequence([*map(alone, range(begin)), *middle, *map(alone, range(end, rows))])

    def _row(self, point: Point, taps: Taps, ranges: Ranges) -> Stmt:
        """Return a row of the output, of the image's rows at `taps`, in tiles; axes are known to be in `ranges`."""
        whole, rest = divmod(self._count, self._lanes)
        starts = [number * self._lanes for number in range(whole)] + (
            [max(0, self._count - self._lanes)] if rest else []
        )
        begin, end = inside(self._window)
        tile = MOST_VECTORS * self._lanes
        statements: list[Stmt] = []
        # Whole tiles of which every column is inside of the image.
        first = -(-begin // self._lanes) * self._lanes
        middle = max(0, end - first) // tile if len(starts) > 2 * MOST_VECTORS else 0
        if middle:
            last = first + middle * tile
            known = {**ranges, self._axis.variable: (first, last)}
            steady = [number * self._lanes for number in range(MOST_VECTORS)]
            statements.append(
                loop(middle, lambda i: self._tile(point, taps, known, self._tile_of(i * tile + first, steady)))
            )
            parts = [[start for start in starts if start < first], [start for start in starts if start >= last]]
        else:
            parts = [starts]
        for part in parts:
            for number in range(0, len(part), MOST_VECTORS):
                own = part[number : number + MOST_VECTORS]
                known = {**ranges, self._axis.variable: (own[0], own[-1] + self._lanes)}
                is_inside = begin <= own[0] and own[-1] + min(self._lanes, self._count) <= end
                statements.append(self._tile(point, taps, known if is_inside else ranges, self._tile_of(0, own)))
        return sequence(statements)

    def _tile_of(self, base: Extent, starts: Sequence[int]) -> _Tile:
        taps = range(int(self._window.tap.extent))
        read = {column for start in starts for tap in taps for column in self._read(start, tap)}
        if isinstance(base, int):
            read &= set(range(self._window.extent))
        low, high = min(read), max(read) + 1
        lanes = min(self._lanes, power_of_two(high - low + 1) // 2)
        columns = [*range(low, high - lanes + 1, lanes)]
        if columns[-1] + lanes < high:
            columns.append(high - lanes)
        return _Tile(base, tuple(starts), min(self._lanes, self._count), tuple(columns), lanes)

    def _read(self, start: int, tap: int) -> list[int]:
        """Return the columns that the outputs of a vector read at one column of their windows."""
        window, outputs = self._window, range(start, start + min(self._lanes, self._count))
        return [output * window.stride + tap * window.dilation + window.offset for output in outputs]

    def _tile(self, point: Point, taps: Taps, ranges: Ranges, tile: _Tile) -> Stmt:
        """Return a tile of a row: its columns of the image, combined, and the outputs from these."""
        combined = local([len(tile.columns) * tile.lanes], self._dtype, "columns")
        totals = local([len(tile.starts) * self._lanes], self._dtype, "totals")
        origin = tile.base * self._window.stride
        epilogue = narrowed(self._analysis.epilogue, ranges)

        def combine(number: int, column: int) -> Stmt:
            def element(v: Expr) -> Stmt:
                terms = [term_of(self._analysis, point, tap, origin + v + column) for tap in taps]
                return store(combined, functools.reduce(self._combine, terms), [v + number * tile.lanes])

            return vector(tile.lanes, element)

        def output(number: int, start: int) -> list[Stmt]:
            place = tirx.Ramp(index(number * self._lanes), index(1), self._lanes)
            total = store(totals, self._total(combined, tile, start), [place])

            def finish(v: Expr) -> Stmt:
                values = {**point, self._axis.variable: tile.base + v + start}
                value = load(totals, [v + number * self._lanes]).astype(self._stage.output.dtype)
                return epilogue.store(value, values)

            return [total, overlapping_vectors(tile.width, self._lanes, finish)]

        columns = [combine(number, column) for number, column in enumerate(tile.columns)]
        outputs = [each for number, start in enumerate(tile.starts) for each in output(number, start)]
        return with_local([combined, totals], [*columns, *outputs])

    def _total(self, combined: Var, tile: _Tile, start: int) -> Expr:
        """Return the windows' combination for a vector of outputs."""
        values = [self._shuffled(combined, tile, self._places(tile, start, tap))
                  for tap in range(int(self._window.tap.extent))]  # fmt: skip
        total = functools.reduce(self._combine, [value for value in values if value is not None])
        initial, identity = self._stage.initial, self._analysis.reducer.identity
        assert initial is not None
        if not tvm_ffi.structural_equal(initial, identity):
            total = self._combine(tirx.Broadcast(initial.astype(self._dtype), self._lanes), total)
        return total

    def _places(self, tile: _Tile, start: int, tap: int) -> list[Place]:
        """Return where the lanes of a vector are at one column of the windows; lanes beyond the row repeat the last."""

        def place(column: int) -> Place:
            if isinstance(tile.base, int) and not 0 <= column < self._window.extent:
                return None
            number = next(k for k, first in enumerate(tile.columns) if first <= column < first + tile.lanes)
            return number, column - tile.columns[number]

        places = [place(column) for column in self._read(start, tap)]
        return places + [places[-1]] * (self._lanes - len(places))

    def _shuffled(self, combined: Var, tile: _Tile, places: Sequence[Place]) -> Expr | None:
        """Return a vector of what is at `places`, of two vectors after another; None where all of it is neutral."""
        sources = sorted({place[0] for place in places if place is not None})
        if not sources:
            return None
        result, lanes = self._columns(combined, tile, sources[0]), _lanes_of(sources[0], places)
        for source in sources[1:]:
            own = _lanes_of(source, places)
            result, lanes = _joined(result, lanes, self._columns(combined, tile, source), own)
        if None in lanes:
            neutral = tirx.Broadcast(self._analysis.reducer.identity.astype(self._dtype), int(result.ty.dtype.lanes))
            result, lanes = _joined(result, lanes, neutral, [0 if lane is None else None for lane in lanes])
        width = int(result.ty.dtype.lanes)
        return result if lanes == list(range(width)) else _shuffle([result], [lane or 0 for lane in lanes])

    def _columns(self, combined: Var, tile: _Tile, number: int) -> Expr:
        columns = load_lanes(combined, index(number * tile.lanes), tile.lanes)
        return columns if tile.lanes > 1 else tirx.Broadcast(columns, self._lanes)

    def _combine(self, left: Expr, right: Expr) -> Expr:
        return self._analysis.reducer.combine(left, right)


Lanes = list[int | None]


def _lanes_of(source: int, places: Sequence[Place]) -> Lanes:
    return [place[1] if place is not None and place[0] == source else None for place in places]


def _joined(left: Expr, lanes: Lanes, right: Expr, own: Lanes) -> tuple[Expr, Lanes]:
    """Return one vector of two and where its lanes are: those wanted of `left` are at `lanes`, of `right` at `own`."""
    size = int(left.ty.dtype.lanes)
    chosen = [a if a is not None else None if b is None else size + b for a, b in zip(lanes, own, strict=True)]
    joined = _shuffle([left, right], [lane or 0 for lane in chosen])
    return joined, [None if lane is None else number for number, lane in enumerate(chosen)]


def _shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    return tirx.Shuffle(list(vectors), [tirx.IntImm("int32", lane) for lane in lanes])
