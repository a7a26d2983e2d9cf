"""What a convolution or pooling over blocked channels reads, and where: images as [N, C/block, spatial..., block].

The lanes are the output's last axis, a block of channels. The data slide over the output's other axes; they are read
one element for all lanes (convolution) or lane by lane (depthwise convolution, pooling). Padding that is neutral to the
reduction is known by its structure and never computed: taps that would read it are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import ir, sym, tirx
from tvm.ir import Expr, TensorLoad

from schedules.access import Access, AxisGroup, Step, as_int, group_axes, linear_coefficient, occurs, run_length
from schedules.division import Division
from schedules.epilogue import Epilogue
from schedules.intrin.bf16_dot import PAIR
from schedules.intrin.byte_dot import FOUR
from schedules.intrin.grouped_dot import is_grouped_term
from schedules.loops import index, load
from schedules.reducer import reducer_of
from schedules.stages import (
    Axis,
    Stage,
    bind,
    replace_loads,
    simplify_indices,
    substitute,
    variables_of,
    with_value,
)

COMPARISONS = (tirx.LT, tirx.LE, tirx.GT, tirx.GE)
IF_THEN_ELSE = "prim.if_then_else"


@dataclass(frozen=True, eq=False)
class ChannelWindow:
    """One dimension of the data: position = axis * stride + tap * dilation + offset, inside where in [0, extent).

    `axis` is None where the output has one position.
    """

    axis: Axis | None
    stride: int
    tap: Axis
    dilation: int
    offset: int
    extent: int

    def reads_inside(self, position: int, tap: int) -> bool:
        """Return whether the element that output `position` reads at `tap` is inside the data."""
        return 0 <= position * self.stride + tap * self.dilation + self.offset < self.extent

    def taps_inside(self, position: Expr) -> tuple[Expr, Expr]:
        """Return the first tap that is inside the data for an output position, and the number of them."""
        start = position * self.stride + self.offset
        step = index(self.dilation)
        first = tirx.max(index(0), tirx.floordiv(index(self.dilation - 1) - start, step))
        end = tirx.min(index(self.tap.extent), tirx.floordiv(index(self.extent - 1) - start, step) + 1)
        return first, end - first

    @property
    def may_miss(self) -> bool:
        """Whether some output position has a tap outside of the data."""
        positions = 1 if self.axis is None else self.axis.extent
        if not isinstance(positions, int) or not isinstance(self.tap.extent, int):
            return True
        last = (positions - 1) * self.stride + (self.tap.extent - 1) * self.dilation + self.offset
        return self.offset < 0 or last >= self.extent


@dataclass(frozen=True, eq=False)
class ChannelWindows:
    """A sliding reduction over blocked channels.

    `stage` reads the data themselves, without padding; `padded` holds the windows whose taps may miss them. `lane` is
    the axis within a block, `channel` the one over blocks of output channels that share what they read, in runs of
    `per_group` (None where data and output channels go together). `columns` is the innermost of the other axes (None
    where it is not static), `outer` the rest of them. `depth` is the axis over input channels that are read as
    [channel // block, ..., channel % block], None where there is none. `grouped` is the axis over input channels of
    which `terms` neighbours lie together in data and weights, pairs of bfloat16 or fours of bytes, None where there is
    none. `division` is how cores divide the output.
    """

    stage: Stage
    epilogue: Epilogue
    data: TensorLoad
    lane: Axis
    channel: Axis | None
    per_group: int
    outer: tuple[AxisGroup, ...]
    columns: AxisGroup | None
    padded: tuple[ChannelWindow, ...]
    depth: Axis | None
    grouped: Axis | None
    terms: int
    division: Division = Division.CHANNELS

    @property
    def block(self) -> int:
        """The number of lanes."""
        assert isinstance(self.lane.extent, int)
        return self.lane.extent

    @property
    def column_window(self) -> ChannelWindow | None:
        """The window of the columns whose taps may miss the image."""
        if self.columns is None:
            return None
        return next((w for w in self.padded if any(w.axis is axis for axis in self.columns.axes)), None)

    @property
    def weights(self) -> TensorLoad:
        """The other read of a product of two."""
        return next(read for read in self.stage.loads() if not read.same_as(self.data))


def channel_windows(producer: Stage | None, stage: Stage, follows: Epilogue) -> ChannelWindows | None:
    """Return the analysis of a reduction with its producer (padding) and epilogue, None where it is another one."""
    lane = _lane(stage, follows)
    data = _data(stage, lane) if lane is not None else None
    if lane is None or data is None:
        return None
    padded: tuple[ChannelWindow, ...] = ()
    if producer is not None:
        source = unpadded(producer, stage, data)
        if source is None:
            return None
        stage = with_value(stage, replace_loads(stage.value, lambda read: source if read.same_as(data) else None))
        data = source
    windows = windows_of(stage, data)
    if windows is None:
        return None
    if producer is not None:
        padded = tuple(window for window in windows if window.may_miss)
    channel, per_group = _channel(stage, data, lane)
    if not _is_blocked(
        stage, data, lane, by_channel=channel is not None, sliding=any(w.axis is not None for w in windows)
    ):
        return None
    others = [axis for axis in stage.spatial if axis is not lane and axis is not channel]
    following = Stage(follows.stage.output, follows.indices, stage.spatial, (), None, follows.value)
    groups = group_axes(others, [stage, following])
    columns = groups[-1] if groups and groups[-1].static else None
    outer = tuple(groups[:-1] if columns is not None else groups)
    depth, (grouped, terms) = _blocked_depth(stage, data, lane), _grouped(stage, data, lane)
    return ChannelWindows(stage, follows, data, lane, channel, per_group, outer, columns, padded, depth, grouped, terms)


def _lane(stage: Stage, follows: Epilogue) -> Axis | None:
    """Return the output's last axis, where the epilogue's output is contiguous along it too."""
    lane = next((axis for axis in stage.spatial if stage.indices and stage.indices[-1].same_as(axis.variable)), None)
    if lane is None or not isinstance(lane.extent, int) or reducer_of(stage) is None:
        return None
    written = Access(follows.stage.output, follows.indices)
    return lane if written.step(lane) == Step.UNIT else None


def _data(stage: Stage, lane: Axis) -> TensorLoad | None:
    """Return the read of the image: the one that is the same for all lanes, or moves along axes that no other does."""
    loads = stage.loads()
    shared = [read for read in loads if not _moves(read, lane)]
    if shared:
        return shared[0] if len(shared) == 1 else None

    def moves_alone(read: TensorLoad, axis: Axis) -> bool:
        return _moves(read, axis) and not any(_moves(other, axis) for other in loads if not other.same_as(read))

    sliding = [read for read in loads if any(moves_alone(read, axis) for axis in stage.spatial)]
    return sliding[0] if len(sliding) == 1 else None


def _moves(read: TensorLoad, axis: Axis) -> bool:
    return any(occurs(position, axis.variable) for position in read.indices)


def _channel(stage: Stage, data: TensorLoad, lane: Axis) -> tuple[Axis | None, int]:
    """Return the axis over blocks of output channels that the data do not depend on, but for the group's number."""
    for axis in stage.spatial:
        if axis is lane or not isinstance(axis.extent, int):
            continue
        if not any(_moves(read, axis) for read in stage.loads() if not read.same_as(data)):
            continue
        runs = [run_length(position, axis.variable) for position in data.indices if occurs(position, axis.variable)]
        if not runs:
            return axis, axis.extent
        if len(runs) == 1 and runs[0] > 1 and axis.extent % runs[0] == 0:
            return axis, runs[0]
    return None, 1


def windows_of(stage: Stage, data: TensorLoad) -> list[ChannelWindow] | None:
    """Return one window for each dimension with one tap (or input channel); None where it has another form."""
    windows = []
    for position, extent in zip(data.indices, data.source.shape, strict=True):
        axes = [axis for axis in stage.spatial if occurs(position, axis.variable)]
        taps = [axis for axis in stage.reduction if occurs(position, axis.variable)]
        if len(axes) > 1 or len(taps) != 1:
            continue  # a batch, or a position without taps
        stride = linear_coefficient(position, axes[0].variable) if axes else 1
        dilation = linear_coefficient(position, taps[0].variable)
        if stride is None or dilation is None or stride < 1 or dilation < 1:
            # Such as the input channel of a group: read in place, but not a window.
            if any(window.tap is taps[0] for window in windows):
                return None
            continue
        offset, size = constant_term(position), as_int(extent)
        if offset is None or size is None or not isinstance(taps[0].extent, int):
            return None
        windows.append(ChannelWindow(axes[0] if axes else None, stride, taps[0], dilation, offset, size))
    return windows


def constant_term(expression: Expr) -> int | None:
    """Return the constant term of a linear expression, None where a symbol may stand in it."""
    zeros = {variable: index(0) for variable in variables_of(expression)}
    return as_int(simplify_indices([substitute(expression, zeros)])[0])


def _is_blocked(stage: Stage, data: TensorLoad, lane: Axis, *, by_channel: bool, sliding: bool) -> bool:
    """Return whether the reads are those of blocked channels, and not of some other reduction."""
    weights = [read for read in stage.loads() if not read.same_as(data)]
    in_groups = _grouped(stage, data, lane)[0] is not None
    if not in_groups and any(Access(read.source, tuple(read.indices)).step(lane) != Step.UNIT for read in weights):
        return False
    if _moves(data, lane):
        by_lane = Access(data.source, tuple(data.indices)).step(lane) == Step.UNIT
        # A row of an image may be as long as a block, but windows slide along it.
        along = [position for position in data.indices if occurs(position, lane.variable)]
        slides = any(occurs(position, tap.variable) for position in along for tap in stage.reduction)
        return by_lane and not slides and not by_channel and sliding
    in_blocks = len(data.indices) > 3 and as_int(data.source.shape[-1]) == lane.extent
    return bool(weights) and (sliding or in_blocks)


def _blocked_depth(stage: Stage, data: TensorLoad, lane: Axis) -> Axis | None:
    access = Access(data.source, tuple(data.indices))
    return next((axis for axis in stage.reduction if access.block(axis) == lane.extent), None)


def _grouped(stage: Stage, data: TensorLoad, lane: Axis) -> tuple[Axis | None, int]:
    """Return the axis k of a sum of products of g neighbours: data at [..., k], weights at [..., k // g, lane, k % g].

    The data may be blocked: those at [k // block, ..., k % block] are read with such weights of k % block. With it
    comes g, 1 where there is no such axis.
    """
    reducer, weights = reducer_of(stage), [read for read in stage.loads() if not read.same_as(data)]
    if reducer is None or not is_grouped_term(reducer.term) or not isinstance(stage.value, tirx.Add):
        return None, 1
    if len(weights) != 1 or len(weights[0].indices) != len(data.indices) + 2 or len(data.indices) < 3:
        return None, 1
    *others, part, own_lane, place = weights[0].indices
    *before, last = data.indices
    terms = as_int(weights[0].source.shape[-1])
    axis = next((axis for axis in stage.reduction if occurs(last, axis.variable)), None)
    if axis is None or terms not in (PAIR, FOUR) or not own_lane.same_as(lane.variable):
        return None, 1
    if not isinstance(axis.extent, int) or axis.extent % terms:
        return None, 1
    block = Access(data.source, tuple(data.indices)).block(axis)
    blocked = [position for position in before if occurs(position, axis.variable)]
    if not (last.same_as(axis.variable) and not blocked) and (block == 0 or block % terms):
        return None, 1
    analyzer = sym.Analyzer()
    analyzer.bind(axis.variable, ir.Range(0, axis.extent))
    read = [part, place, *(at for at in others if occurs(at, axis.variable))]
    expected = [tirx.floordiv(last, index(terms)), tirx.floormod(last, index(terms)), *blocked]
    same = len(read) == len(expected) and all(map(analyzer.can_prove_equal, read, expected))
    return (axis, terms) if same else (None, 1)


def unpadded(producer: Stage, stage: Stage, data: TensorLoad) -> TensorLoad | None:
    """Return the read behind `data` where `producer` pads with what is neutral to the reduction, None otherwise."""
    value = producer.value
    if not data.source.same_as(producer.output):
        return None
    if not (isinstance(value, ir.Call) and isinstance(value.op, ir.Op) and value.op.name == IF_THEN_ELSE):
        return None
    condition, source, padding = value.args
    if not isinstance(source, TensorLoad) or not _is_neutral(padding, stage, data):
        return None
    if not _is_exactly_inside(condition, source, producer.spatial):
        return None
    for position, size, own in zip(data.indices, producer.output.shape, source.source.shape, strict=True):
        own_size = as_int(own)
        same = _same_extent(size, own if own_size is None else own_size)
        if not same and not any(occurs(position, axis.variable) for axis in stage.reduction):
            return None  # padding that is not reached by a tap
    point = bind(producer.indices, data.indices)
    return load(source.source, simplify_indices([substitute(position, point) for position in source.indices]))


def _is_neutral(padding: Expr, stage: Stage, data: TensorLoad) -> bool:
    """Whether the reduction stays the same without a step whose data, widened or not, are `padding`."""
    reducer = reducer_of(stage)
    if reducer is None or not isinstance(padding, tirx.FloatImm | tirx.IntImm):
        return False
    if reducer.term.same_as(data):
        return bool(tvm_ffi.structural_equal(padding, stage.initial))
    factors = (reducer.term.a, reducer.term.b) if isinstance(reducer.term, tirx.Mul) else ()
    factor = any(each.same_as(data) or (isinstance(each, tirx.Cast) and each.value.same_as(data)) for each in factors)
    return factor and isinstance(stage.value, tirx.Add) and float(padding.value) == 0


def _is_exactly_inside(condition: Expr, source: TensorLoad, axes: Sequence[Axis]) -> bool:
    """Whether `condition` holds for just those points at which every index of `source` is inside its buffer."""
    bounds = _bounds(condition)
    if bounds is None:
        return False
    for position, extent in zip(source.indices, source.source.shape, strict=True):
        if as_int(position) == 0 and as_int(extent) == 1:
            continue
        axis = next((axis for axis in axes if linear_coefficient(position, axis.variable) == 1), None)
        if axis is None:
            return False
        offset = constant_term(position)
        low, high = bounds.pop(axis.variable, (None, None))
        if position.same_as(axis.variable) and low is None and high is None:
            if not _same_extent(extent, axis.extent):
                return False
            continue
        size = as_int(extent)
        if offset is None or size is None or not isinstance(axis.extent, int):
            return False
        begin, end = max(0, -offset), min(axis.extent, size - offset)
        if (begin, end) != (max(0, low or 0), axis.extent if high is None else min(axis.extent, high)):
            return False
    return not bounds


def _same_extent(left: Expr, right: int | Expr) -> bool:
    return as_int(left) == right if isinstance(right, int) else bool(tvm_ffi.structural_equal(left, right))


def _bounds(condition: Expr) -> dict[ir.Var, tuple[int | None, int | None]] | None:
    """Return [low, high) of each variable of a conjunction of comparisons with constants, None for anything else."""
    if isinstance(condition, tirx.And):
        left, right = _bounds(condition.a), _bounds(condition.b)
        if left is None or right is None:
            return None
        for variable, (low, high) in right.items():
            before = left.get(variable, (None, None))
            left[variable] = (low if before[0] is None else before[0], high if before[1] is None else before[1])
            if None not in (low, before[0]) or None not in (high, before[1]):
                return None
        return left
    if not isinstance(condition, COMPARISONS):
        return None
    variable, bound = condition.a, as_int(condition.b)
    below = isinstance(condition, tirx.LT | tirx.LE)
    strict = isinstance(condition, tirx.LT | tirx.GT)
    if bound is None:
        variable, bound, below = condition.b, as_int(condition.a), not below
    if not isinstance(variable, ir.Var) or bound is None:
        return None
    if below:
        return {variable: (None, bound if strict else bound + 1)}
    return {variable: (bound + 1 if strict else bound, None)}
