"""Poolings of images as they lie, [N, C, spatial...]: a window's rows are combined first, its columns after that.

Each row of the output is made in two steps. The rows of the image that its windows reach are combined column by column
into one padded row, in vectors as they lie; then every output takes the columns of its window from that row. With a
stride, shuffles part that row so that what neighbouring outputs read is contiguous, too. Padding is never read: rows of
a window that are outside of the image are left out, and the ends of the padded row hold what is neutral.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules import pooling_planes
from schedules.access import occurs
from schedules.channel_windows import ChannelWindow, unpadded, windows_of
from schedules.convolution import split_producer
from schedules.epilogue import Epilogue
from schedules.family import Choice, Kernel, Parameters, Space, vector_width, work_of
from schedules.loops import (
    Extent,
    index,
    load,
    local,
    loop,
    nest,
    product,
    store,
    tiles,
    unflatten,
    vector,
    with_local,
)
from schedules.matmul import branches_on_any, split_epilogue
from schedules.pooling_structure import MOST_WRITTEN, PoolingAnalysis, inside, narrowed, term_of
from schedules.reducer import accumulator_dtype, load_lanes, reducer_of
from schedules.rowwise import TASKS_PER_CORE, in_tasks
from schedules.stages import as_extent, replace_loads, sequence, with_value
from targets.base import Target

# Beyond this stride rows are not parted: outputs' elements are taken one by one.
LARGEST_SHUFFLED_STRIDE = 4

Point = Mapping[Var, Expr]


class Pooling:
    """Rows of the output in parallel, vectors along them."""

    name = "pooling"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> PoolingAnalysis | None:
        """Return the analysis of an associative reduction over static windows of one array, padded or not."""
        producer, kernel = split_producer(kernel)
        stage, follows = split_epilogue(kernel)
        if stage is None or follows is None or reducer_of(stage) is None or branches_on_any(stage):
            return None
        reads = [read for read in stage.loads() if not read.source.same_as(stage.output)]
        if len(reads) != 1:
            return None
        data = reads[0]
        if producer is not None:
            source = unpadded(producer, stage, data)
            if source is None:
                return None
            stage = with_value(stage, replace_loads(stage.value, lambda read: source if read.same_as(data) else None))
            data = source
        windows, reducer = windows_of(stage, data), reducer_of(stage)
        if not windows or reducer is None or len(windows) != len(stage.reduction):
            return None
        axis = windows[-1].axis
        if axis is None or not stage.indices[-1].same_as(axis.variable) or not occurs(data.indices[-1], axis.variable):
            return None
        if any(window.axis is not None and not isinstance(window.axis.extent, int) for window in windows):
            return None
        outer = tuple(each for each in stage.spatial if each is not axis)
        return PoolingAnalysis(stage, follows, reducer, outer, tuple(windows))

    def space(self, target: Target, analysis: PoolingAnalysis) -> Space:
        """Return how many registers of each part of a row one statement spans."""
        return (Choice("vectors", 1, (1, 2, 4)),)

    def apply(self, analysis: PoolingAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the parallel loop over tasks of several rows of the output."""
        lanes = vector_width(target, analysis.stage)
        if pooling_planes.applies(analysis, TASKS_PER_CORE * target.cores):
            count = product([axis.extent for axis in pooling_planes.planes(analysis)])
            planes = pooling_planes.Planes(analysis, pooling_planes.lanes_of(analysis, target))
            return in_tasks(count, work_of(analysis.stage), target, planes.emit)
        emitter = _Emitter(analysis, lanes, parameters["vectors"])
        count = product([axis.extent for axis in analysis.outer])
        return in_tasks(count, work_of(analysis.stage), target, emitter.rows)


class _Emitter:
    """Code for rows of the output, each by way of a padded row of the image's columns.

    That row lies in `phases` parts, column x in part x % phases: so neighbouring outputs read neighbouring elements.
    """

    def __init__(self, analysis: PoolingAnalysis, lanes: int, vectors: int) -> None:
        self._analysis = analysis
        self._stage = analysis.stage
        self._lanes = lanes
        self._dtype = accumulator_dtype(analysis.stage)
        *self._above, self._window = analysis.windows
        assert self._window.axis is not None
        self._axis = self._window.axis
        self._columns = int(self._axis.extent)
        stride = self._window.stride
        self._phases = stride if stride <= LARGEST_SHUFFLED_STRIDE else 1
        self._block = lanes * self._phases * vectors
        # The columns before the image: whole registers of every part.
        self._padding = -(-max(0, -self._window.offset) // self._block) * self._block
        reached = (self._columns + lanes) * stride + self._shift(int(self._window.tap.extent) - 1)
        stored = self._padding + self._window.extent + self._block
        self._length = -(-max(reached, stored) // self._block) * self._block // self._phases

    def _shift(self, tap: int) -> int:
        """Return the padded column that the first output reads at a column of its window."""
        return tap * self._window.dilation + self._window.offset + self._padding

    def rows(self, start: Expr, count: Extent) -> Stmt:
        """Return code for `count` rows of the flattened outer axes from `start` on."""
        padded = local([self._phases * self._length], self._dtype, "padded_row")
        identity = self._analysis.reducer.identity.astype(self._dtype)
        outer = self._analysis.outer

        def row(number: Expr) -> Stmt:
            positions = unflatten(number, [axis.extent for axis in outer]) if outer else []
            return self._row(padded, {axis.variable: at for axis, at in zip(outer, positions, strict=True)})

        # The rows that follow one another write the image's columns alone.
        clear = loop(
            self._phases * self._length // self._lanes,
            lambda i: vector(self._lanes, lambda v: store(padded, identity, [i * self._lanes + v])),
        )
        return with_local([padded], [clear, loop(count, lambda i: row(start + i))])

    def _row(self, padded: Var, point: Point) -> Stmt:
        """Return one row of the output, written out where all rows of its windows are inside the image."""
        bounded = sequence([self._bounded(padded, point), self._outputs(padded, point, {})])
        if _taps(self._above) > MOST_WRITTEN:
            return bounded
        missing = [window for window in self._above if window.may_miss]
        if any(window.axis is None for window in missing):
            return bounded
        within: dict[Var, tuple[int, int]] = {}
        for window in missing:
            assert window.axis is not None
            within[window.axis.variable] = inside(window)
        written = sequence([self._written(padded, point), self._outputs(padded, point, within)])
        conditions = [
            tirx.And(index(begin) <= point[variable], point[variable] < index(end))
            for variable, (begin, end) in within.items()
        ]
        return tirx.IfThenElse(functools.reduce(tirx.And, conditions), written, bounded) if conditions else written

    def _written(self, padded: Var, point: Point) -> Stmt:
        """Return the combination of all rows of a window, whatever their place, as one expression."""
        every = list(itertools.product(*[range(int(window.tap.extent)) for window in self._above]))

        def combine(combined: Var, start: Expr, width: int) -> list[Stmt]:
            def element(v: Expr) -> Stmt:
                terms = [term_of(self._analysis, point, [index(tap) for tap in taps], start + v) for taps in every]
                return store(combined, functools.reduce(self._combine, terms), [v])

            clear = [self._clear(combined, self._block)] if width < self._block else []
            return [*clear, vector(width, element)]

        return self._blocks(padded, combine)

    def _bounded(self, padded: Var, point: Point) -> Stmt:
        """Return the combination of those rows of a window that are inside the image."""
        bounds = [
            window.taps_inside(index(0) if window.axis is None else point[window.axis.variable])
            for window in self._above
        ]

        def combine(combined: Var, start: Expr, width: int) -> list[Stmt]:
            def step(numbers: list[Expr]) -> Stmt:
                taps = [first + number for (first, _), number in zip(bounds, numbers, strict=True)]

                def element(v: Expr) -> Stmt:
                    return store(
                        combined,
                        self._combine(load(combined, [v]), term_of(self._analysis, point, taps, start + v)),
                        [v],
                    )

                return vector(width, element)

            return [self._clear(combined, self._block), nest([as_extent(count) for _, count in bounds], step)]

        return self._blocks(padded, combine)

    def _blocks(self, padded: Var, combine: Callable[[Var, Expr, int], list[Stmt]]) -> Stmt:
        """Return the columns of the image in blocks that `combine` computes, taken apart into the padded row."""

        def block(start: Expr, width: int) -> Stmt:
            combined = local([self._block], self._dtype, "combined")
            position = tirx.floordiv(start + self._padding, index(self._phases))
            whole = load_lanes(combined, index(0), self._block)
            length = self._block // self._phases
            parts = []
            for phase in range(self._phases):
                lanes = [tirx.IntImm("int32", lane * self._phases + phase) for lane in range(length)]
                part = whole if self._phases == 1 else tirx.Shuffle([whole], lanes)
                place = tirx.Ramp(position + phase * self._length, index(1), length)
                parts.append(store(padded, part, [place]))
            return with_local([combined], [*combine(combined, start, width), *parts])

        return tiles(self._window.extent, [self._block], block)

    def _clear(self, buffer: Var, width: int) -> Stmt:
        identity = self._analysis.reducer.identity.astype(self._dtype)
        return vector(width, lambda v: store(buffer, identity, [v]))

    def _combine(self, left: Expr, right: Expr) -> Expr:
        return self._analysis.reducer.combine(left, right)

    def _outputs(self, padded: Var, point: Point, within: Mapping[Var, tuple[int, int]]) -> Stmt:
        """Return the stores of a row of the output; axes are known to be in the ranges of `within`."""
        whole, rest = divmod(self._columns, self._lanes)
        width = self._lanes if whole else rest
        starts = [number * self._lanes for number in range(whole)] + ([self._columns - width] if rest else [])
        begin, end = inside(self._window)
        statements: list[Stmt] = []
        for among, run in itertools.groupby(starts, lambda start: begin <= start and start + width <= end):
            own = list(run)
            ranges = {**within, self._axis.variable: (begin, end)} if among else within
            epilogue = narrowed(self._analysis.epilogue, ranges)
            steady = [start for start in own if (start - own[0]) % self._lanes == 0]
            statements.append(
                loop(
                    len(steady),
                    lambda i, e=epilogue, s=steady[0]: self._vector(padded, point, e, i * self._lanes + s, width),
                )
            )
            if len(steady) < len(own):
                statements.append(self._vector(padded, point, epilogue, index(own[-1]), width))
        return sequence(statements)

    def _vector(self, padded: Var, point: Point, epilogue: Epilogue, start: Expr, width: int) -> Stmt:
        """Return the outputs [start, start + width), whose windows are combined in whole registers."""
        totals = local([self._lanes], self._dtype, "totals")
        lane = tirx.Ramp(index(0), index(1), self._lanes)
        initial, identity = self._stage.initial, self._analysis.reducer.identity
        assert initial is not None

        def finish(v: Expr) -> Stmt:
            total = load(totals, [v])
            if not tvm_ffi.structural_equal(initial, identity):
                total = self._combine(initial.astype(self._dtype), total)
            values = {**point, self._axis.variable: start + v}
            return epilogue.store(total.astype(self._stage.output.dtype), values)

        taps = int(self._window.tap.extent)
        if taps <= MOST_WRITTEN:
            values = [self._column(padded, start, tap) for tap in range(taps)]
            taken: list[Stmt] = [store(totals, functools.reduce(self._combine, values), [lane])]
        else:
            taken = [self._clear(totals, self._lanes), loop(taps, lambda tap: self._step(padded, totals, start, tap))]
        return with_local([totals], [*taken, vector(width, finish)])

    def _step(self, padded: Var, totals: Var, start: Expr, tap: Expr) -> Stmt:
        """Return the combination of one more column of the windows with a vector of totals."""
        shift = tap * self._window.dilation + self._shift(0)
        part, place = tirx.floormod(shift, index(self._phases)), tirx.floordiv(shift, index(self._phases))
        step = self._window.stride // self._phases

        def element(v: Expr) -> Stmt:
            value = load(padded, [part * self._length + place + (start + v) * step])
            return store(totals, self._combine(load(totals, [v]), value), [v])

        return vector(self._lanes, element)

    def _column(self, padded: Var, start: Expr, tap: int) -> Expr:
        """Return a vector of what neighbouring outputs read at one column of their windows."""
        place, part = divmod(self._shift(tap), self._phases)
        step = self._window.stride // self._phases
        position = start * step + (part * self._length + place)
        return load(padded, [tirx.Ramp(position, index(step), self._lanes)])


def _taps(windows: Sequence[ChannelWindow]) -> int:
    return functools.reduce(lambda count, window: count * int(window.tap.extent), windows, 1)
