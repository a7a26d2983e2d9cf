"""Sliding windows: which read of a reduction moves over the output's trailing axes, and by how much.

Convolutions and poolings read x[n, c, y * stride + ky * dilation, ...] where y, ... are the output's trailing axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.access import linear_coefficient, occurs
from schedules.loops import Extent, index
from schedules.stages import Axis, Stage


@dataclass(frozen=True, eq=False)
class Window:
    """One dimension of the input: position = axis * stride + sum of taps' axis * dilation + offset."""

    axis: Axis
    stride: int
    taps: tuple[tuple[Axis, int], ...]
    offset: int

    def shift(self, point: Mapping[Var, Expr]) -> Expr:
        """Return how far the taps at `point` reach beyond the window's first element."""
        total: Expr = index(self.offset)
        for axis, dilation in self.taps:
            total = total + point.get(axis.variable, axis.variable) * dilation
        return total

    @property
    def reach(self) -> int | None:
        """The largest shift, None where it is symbolic."""
        total = self.offset
        for axis, dilation in self.taps:
            if not isinstance(axis.extent, int):
                return None
            total += (axis.extent - 1) * dilation
        return total

    @property
    def phases(self) -> int:
        """How many residues modulo the stride the shifts take."""
        if self.stride == 1 or (not self.taps and not self.offset):
            return 1
        return self.stride

    def length(self) -> Extent:
        """Return how many positions of one phase the windows of the whole axis touch."""
        reach = self.reach
        assert reach is not None
        return self.axis.extent + reach // self.stride


@dataclass(frozen=True, eq=False)
class SlidingRead:
    """The read that slides, its leading indices (batch, channel) and the windows of its trailing dimensions."""

    load: TensorLoad
    leading: tuple[Expr, ...]
    windows: tuple[Window, ...]


def sliding_read(stage: Stage) -> SlidingRead | None:
    """Return the only read of `stage` that moves along the output's trailing axes, one window per dimension."""
    trailing = _trailing_axes(stage)
    for count in range(len(trailing), 0, -1):
        axes = trailing[-count:]
        moving = [load for load in stage.loads() if _moves(load, axes)]
        if len(moving) == 1:
            read = _match(stage, moving[0], axes)
            if read is not None:
                return read
    return None


def _trailing_axes(stage: Stage) -> list[Axis]:
    """Return the output's last axes, in order, as far as its indices are plain axes (at most three)."""
    axes: list[Axis] = []
    for position in reversed(stage.indices):
        axis = next((a for a in stage.spatial if position.same_as(a.variable)), None)
        if axis is None or len(axes) == 3:
            break
        axes.append(axis)
    return axes[::-1]


def _moves(load: TensorLoad, axes: Sequence[Axis]) -> bool:
    return any(occurs(position, axis.variable) for position in load.indices for axis in axes)


def _match(stage: Stage, load: TensorLoad, axes: Sequence[Axis]) -> SlidingRead | None:
    if len(load.indices) < len(axes):
        return None
    split = len(load.indices) - len(axes)
    leading, sliding = tuple(load.indices)[:split], tuple(load.indices)[split:]
    if any(occurs(position, axis.variable) for position in leading for axis in axes):
        return None
    windows = []
    for position, axis in zip(sliding, axes, strict=True):
        window = _window(stage, position, axis)
        if window is None or window.reach is None:
            return None
        windows.append(window)
    taps = [axis for window in windows for axis, _ in window.taps]
    if any(occurs(position, axis.variable) for position in leading for axis in taps):
        return None
    return SlidingRead(load, leading, tuple(windows))


def _window(stage: Stage, position: Expr, axis: Axis) -> Window | None:
    stride = linear_coefficient(position, axis.variable)
    if stride is None or stride < 1:
        return None
    if any(other is not axis and occurs(position, other.variable) for other in stage.spatial):
        return None
    taps = []
    for tap in stage.reduction:
        dilation = linear_coefficient(position, tap.variable)
        if dilation is None or dilation < 0:
            return None
        if dilation:
            taps.append((tap, dilation))
    offset = _constant(position)
    if offset is None or offset < 0:
        return None
    return Window(axis, stride, tuple(taps), offset)


def _constant(expression: Expr) -> int | None:
    """Return the constant term of a linear expression of variables, None where it has symbolic terms."""
    if isinstance(expression, tirx.IntImm):
        return int(expression)
    if isinstance(expression, Var):
        return 0
    if isinstance(expression, tirx.Add | tirx.Sub | tirx.Mul):
        left, right = _constant(expression.a), _constant(expression.b)
        if left is None or right is None:
            return None
        if isinstance(expression, tirx.Mul):
            return left * right
        return left + right if isinstance(expression, tirx.Add) else left - right
    return None
