"""Convolutions and poolings over N, C, spatial dimensions: any kernel, stride, dilation and number of groups.

The input is copied once (its padding computed on the way) so that every tap of the window is a shift of one flat axis:
each spatial dimension is split by stride into phases, and the phases' rows are laid end to end. The output is computed
over that flat axis in whole vectors, wherever a row ends, and the positions past a row's end are dropped when a block
of rows is written out with what follows the convolution. So narrow images fill the lanes as well as wide ones, weights
are read as they come, one scalar for a vector, and there are no tails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import occurs, run_length
from schedules.elementwise import vector_tiles
from schedules.epilogue import Epilogue
from schedules.family import Choice, Kernel, Parameters, Space, is_large, vector_width, work_of
from schedules.loops import (
    Extent,
    cells,
    flatten,
    index,
    load,
    local,
    loop,
    nest,
    parallel,
    product,
    store,
    tile_choice,
    unflatten,
    with_local,
)
from schedules.matmul import branches_on_any, split_epilogue
from schedules.reducer import accumulate, accumulator_dtype
from schedules.register_tile import register_tile
from schedules.stages import Axis, Stage, bind, replace_loads, sequence, substitute
from schedules.windows import SlidingRead, sliding_read
from targets.base import Target


@dataclass(frozen=True, eq=False)
class ConvolutionAnalysis:
    """A sliding reduction: `channel` is the output axis of the register tile's rows (None: depthwise, pooling)."""

    stage: Stage
    epilogue: Epilogue
    producer: Stage | None
    read: SlidingRead
    outer: tuple[Axis, ...]
    channel: Axis | None
    per_group: int


class Convolution:
    """Direct convolution in vectors along a flat spatial axis."""

    name = "convolution"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ConvolutionAnalysis | None:
        """Return the analysis of a reduction one of whose reads slides over the output's trailing axes."""
        producer, kernel = split_producer(kernel)
        stage, follows = split_epilogue(kernel)
        if stage is None or follows is None or branches_on_any(stage):
            return None
        read = sliding_read(stage)
        if read is None or not any(window.taps or window.stride > 1 for window in read.windows):
            return None
        sliding = [window.axis for window in read.windows]
        others = tuple(axis for axis in stage.spatial if axis not in sliding)
        channel, per_group = _channel_axis(stage, read, others)
        outer = tuple(axis for axis in others if axis is not channel)
        return ConvolutionAnalysis(stage, follows, producer, read, outer, channel, per_group)

    def space(self, target: Target, analysis: ConvolutionAnalysis) -> Space:
        """Return the register tile and the length of a block of rows in vectors."""
        rows, vectors = register_tile(target)
        if analysis.channel is None:
            rows, vectors = 1, 4
        return (
            Choice("rows", rows, (1, 4, 6, 8, 12)),
            Choice("vectors", vectors, (1, 2, 3, 4)),
            Choice("block_vectors", 32, (8, 16, 32, 64)),
        )

    def apply(self, analysis: ConvolutionAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the copy of the input and the convolution."""
        lanes = vector_width(target, analysis.stage)
        return _Emitter(analysis, parameters, lanes).statement()


def split_producer(kernel: Kernel) -> tuple[Stage | None, Kernel]:
    """Return the stage that computes the input (its padding) where the kernel begins with one, and the rest."""
    if len(kernel.stages) > 1 and not kernel.stages[0].is_reduction:
        return kernel.stages[0], Kernel(kernel.stages[1:])
    return None, kernel


def _channel_axis(stage: Stage, read: SlidingRead, others: Sequence[Axis]) -> tuple[Axis | None, int]:
    """Return the axis along which the sliding read stays the same for runs of outputs, and the run's length.

    Without groups the run is the whole axis; with groups it is what floor division in the read's indices says.
    """
    weights = [other for other in stage.loads() if not other.same_as(read.load)]
    for axis in reversed(others):
        moved = [position for position in read.leading if occurs(position, axis.variable)]
        if not isinstance(axis.extent, int) or not any(_depends(weight, axis) for weight in weights):
            continue
        if not moved:
            return axis, axis.extent
        runs = [run_length(position, axis.variable) for position in moved]
        if all(run > 1 and axis.extent % run == 0 for run in runs) and len(set(runs)) == 1:
            return axis, runs[0]
    return None, 1


def _depends(weight: TensorLoad, axis: Axis) -> bool:
    return any(occurs(position, axis.variable) for position in weight.indices)


class _Emitter:
    """Emission of one convolution; the methods share the analysis and the sizes that follow from it."""

    def __init__(self, analysis: ConvolutionAnalysis, parameters: Parameters, lanes: int) -> None:
        self.analysis = analysis
        self.stage = analysis.stage
        self.windows = analysis.read.windows
        self.lanes = lanes
        self.rows = min(parameters["rows"], analysis.per_group) if analysis.channel is not None else 1
        self.width = lanes * parameters["vectors"]
        self.lengths = [window.length() for window in self.windows]
        self.phases = product([window.phases for window in self.windows])
        inner = product(self.lengths[1:])
        self.inner = inner
        self.row_block = self._row_block(parameters["block_vectors"] * lanes)
        self.large = is_large(work_of(self.stage))

    def _row_block(self, elements: int) -> int:
        """Return how many steps of the first spatial axis make one block."""
        first = self.windows[0].axis.extent
        steps = max(1, elements // self.inner) if isinstance(self.inner, int) else 4
        return min(steps, first) if isinstance(first, int) else steps

    def statement(self) -> Stmt:
        flat = local(
            [*self._leading_extents(), self.phases, product(self.lengths) + self.width],
            str(self.analysis.read.load.source.dtype),
            "flat_input",
        )
        return with_local([flat], [self._copy(flat), self._compute(flat)])

    def _leading_extents(self) -> list[Extent]:
        source = self.analysis.read.load.source
        return [_extent(source.shape[i]) for i in range(len(self.analysis.read.leading))]

    def _copy(self, flat: Var) -> Stmt:
        """Return the copy of the whole input into its flat phases."""
        leading, phases = self._leading_extents(), [window.phases for window in self.windows]

        def task(number: Expr) -> Stmt:
            position = unflatten(number, [*leading, *phases])
            channel, phase = position[: len(leading)], position[len(leading) :]
            phase_number = flatten(phase, phases)

            def element(point: list[Expr]) -> Stmt:
                value = self._input_at(channel, phase, point)
                return store(flat, value, [*channel, phase_number, flatten(point, self.lengths)])

            slack = product(self.lengths)
            zero = tirx.const(0, flat.dtype)
            clear = vector_tiles(
                self.width, self.lanes, lambda i: store(flat, zero, [*channel, phase_number, index(slack) + i])
            )
            return sequence([nest(self.lengths, element), clear])

        return parallel(product([*leading, *phases]), task, self.large)

    def _input_at(self, channel: Sequence[Expr], phase: Sequence[Expr], point: Sequence[Expr]) -> Expr:
        """Return the input's element at a position of its phases, 0 beyond its end."""
        source = self.analysis.read.load.source
        positions, inside = [], None
        for window, length, p, q, extent in zip(
            self.windows, self.lengths, phase, point, source.shape[len(channel) :], strict=True
        ):
            position = q * window.stride + p if window.phases > 1 else q * window.stride
            positions.append(position)
            size = _extent(extent)
            last = (length - 1) * window.stride + window.phases - 1
            if not (isinstance(size, int) and isinstance(last, int) and last < size):
                within = position < index(size)
                inside = within if inside is None else tirx.And(inside, within)
        value = self._source_value([*channel, *positions])
        if inside is None:
            return value
        return tirx.if_then_else(inside, value, tirx.const(0, source.dtype))

    def _source_value(self, indices: Sequence[Expr]) -> Expr:
        producer = self.analysis.producer
        if producer is None:
            return load(self.analysis.read.load.source, indices)
        return substitute(producer.value, bind(producer.indices, indices))

    def _compute(self, flat: Var) -> Stmt:
        """Return the parallel loop over outer axes, groups of channels, channels and blocks of rows."""
        outer = [axis.extent for axis in self.analysis.outer]
        channel, per_group = self.analysis.channel, self.analysis.per_group
        groups = channel.extent // per_group if channel is not None and isinstance(channel.extent, int) else 1
        tiles_per_group = -(-per_group // self.rows)
        first = self.windows[0].axis.extent
        block = self.row_block
        blocks = -(-first // block) if isinstance(first, int) else tirx.floordiv(first + (block - 1), index(block))

        def task(number: Expr) -> Stmt:
            *outside, group, tile, rows = unflatten(number, [*outer, groups, tiles_per_group, blocks])
            point = {a.variable: p for a, p in zip(self.analysis.outer, outside, strict=True)}
            return tile_choice(
                tile,
                per_group,
                self.rows,
                lambda start, count: self._rows(flat, point, group * per_group + start, count, rows),
            )

        return parallel(product([*outer, groups, tiles_per_group, blocks]), task, self.large)

    def _rows(self, flat: Var, point: Mapping[Var, Expr], channel: Expr, count: int, number: Expr) -> Stmt:
        first, block = self.windows[0].axis.extent, self.row_block
        if isinstance(first, int):
            return tile_choice(
                number, first, block, lambda start, steps: self._block(flat, point, channel, count, start, steps)
            )
        start = number * block
        steps = tirx.min(index(block), first - start)
        return self._block(flat, point, channel, count, start, steps)

    def _block(
        self, flat: Var, point: Mapping[Var, Expr], channel: Expr, count: int, start: Expr, steps: Extent
    ) -> Stmt:
        """Return `count` channels by `steps` rows: whole vectors into a staging buffer, then the rows written out."""
        capacity = steps if isinstance(steps, int) else self.row_block
        span = index(capacity) * self.inner + self.width if not isinstance(self.inner, int) else capacity * self.inner
        if isinstance(span, int):
            span = -(-span // self.width) * self.width
        staging = local([count, span], accumulator_dtype(self.stage), "staging")
        needed = self._last_position(steps)
        vectors = (
            -(-needed // self.width)
            if isinstance(needed, int)
            else tirx.floordiv(needed + (self.width - 1), index(self.width))
        )
        base = start * self.inner
        compute = loop(vectors, lambda i: self._micro(flat, staging, point, channel, count, base, i * self.width))
        return with_local([staging], [compute, self._write(staging, point, channel, count, start, steps)])

    def _last_position(self, steps: Extent) -> Extent:
        """Return the number of flat positions up to the block's last output."""
        total: Extent = 1
        extents = [steps, *(window.axis.extent for window in self.windows[1:])]
        for number, extent in enumerate(extents):
            stride = product(self.lengths[number + 1 :])
            total = total + (extent - 1) * stride
        return total

    def _micro(
        self, flat: Var, staging: Var, point: Mapping[Var, Expr], channel: Expr, count: int, base: Expr, offset: Expr
    ) -> Stmt:
        """Return `count` channels by `width` flat positions, accumulated in registers and stored to staging."""
        dtype, width = accumulator_dtype(self.stage), self.width
        registers = local([count * width], dtype, "accumulators")
        reduction = self.stage.reduction

        def at(r: Expr) -> dict[Var, Expr]:
            values = dict(point)
            if self.analysis.channel is not None:
                values[self.analysis.channel.variable] = channel + r
            return values

        def start(r: Expr, v: Expr) -> Stmt:
            assert self.stage.initial is not None
            return store(registers, substitute(self.stage.initial, at(r)).astype(dtype), [r * width + v])

        def step(positions: list[Expr]) -> Stmt:
            taps = {axis.variable: p for axis, p in zip(reduction, positions, strict=True)}
            # Groups: the input's channel is that of the tile's first output, the same for the whole tile.
            leading = [
                substitute(position, {**at(tirx.const(0, "int64")), **taps}) for position in self.analysis.read.leading
            ]
            phase, shift = self._tap(taps)

            def update(r: Expr, v: Expr) -> Stmt:
                element = load(flat, [*leading, phase, base + offset + shift + v])
                value = accumulate(self._with_input(element), load(registers, [r * width + v]), {**at(r), **taps})
                return store(registers, value, [r * width + v])

            return cells(count, width, update)

        return with_local(
            [registers],
            [
                cells(count, width, start),
                nest([axis.extent for axis in reduction], step),
                cells(count, width, lambda r, v: store(staging, load(registers, [r * width + v]), [r, offset + v])),
            ],
        )

    def _with_input(self, element: Expr) -> Stage:
        read = self.analysis.read.load
        value = replace_loads(self.stage.value, lambda other: element if other.same_as(read) else None)
        return Stage(
            self.stage.output, self.stage.indices, self.stage.spatial, self.stage.reduction, self.stage.initial, value
        )

    def _tap(self, taps: Mapping[Var, Expr]) -> tuple[Expr, Expr]:
        """Return the phase and the flat shift of a tap."""
        phases, shifts = [], []
        for window in self.windows:
            shift = window.shift(taps)
            phases.append(tirx.floormod(shift, index(window.stride)) if window.phases > 1 else index(0))
            shifts.append(tirx.floordiv(shift, index(window.stride)) if window.stride > 1 else shift)
        return flatten(phases, [w.phases for w in self.windows]), flatten(shifts, self.lengths)

    def _write(
        self, staging: Var, point: Mapping[Var, Expr], channel: Expr, count: int, start: Expr, steps: Extent
    ) -> Stmt:
        """Return the stores of a block's valid positions, in vectors along the last axis."""
        axes = [window.axis for window in self.windows]

        def row(positions: list[Expr]) -> Stmt:
            r, *outside = positions

            def element(x: Expr) -> Stmt:
                inside = [*outside, x]
                values = dict(point)
                if self.analysis.channel is not None:
                    values[self.analysis.channel.variable] = channel + r
                for number, (axis, position) in enumerate(zip(axes, inside, strict=True)):
                    values[axis.variable] = start + position if number == 0 else position
                total = load(staging, [r, flatten(inside, [steps, *self.lengths[1:]])])
                return self.analysis.epilogue.store(total.astype(self.stage.output.dtype), values)

            last = steps if len(axes) == 1 else axes[-1].extent
            return vector_tiles(last, self.lanes, element)

        middle = [steps, *(axis.extent for axis in axes[1:-1])] if len(axes) > 1 else []
        return nest([count, *middle], row)


def _extent(expression: Expr) -> Extent:
    return int(expression) if isinstance(expression, tirx.IntImm) else expression
