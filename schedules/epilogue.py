"""What follows a reduction element by element, computed where the reduction's result still is in a register."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int
from schedules.loops import index, store
from schedules.stages import Axis, Stage, replace_loads, simplify_indices, substitute


@dataclass(frozen=True, eq=False)
class Epilogue:
    """`stage` stores one element for each of the reduction `source`'s, at `indices` in terms of the latter's axes."""

    source: Stage
    stage: Stage
    indices: tuple[Expr, ...]
    value: Expr

    def store(self, total: Expr, point: Mapping[Var, Expr]) -> Stmt:
        """Return the store of the element at `point` of the reduction's spatial axes, whose sum is `total`."""
        value = substitute(self.value, point)
        if self.stage is not self.source:
            output = self.source.output
            value = replace_loads(value, lambda read: total if read.source.same_as(output) else None)
        else:
            value = total
        return store(self.stage.output, value, [substitute(i, point) for i in self.indices])


def plain(source: Stage) -> Epilogue:
    """Return the epilogue that stores the result itself."""
    return Epilogue(source, source, source.indices, source.value)


def match(source: Stage, stage: Stage) -> Epilogue | None:
    """Return how `stage` follows the reduction `source`, None where its elements do not correspond one to one."""
    if stage.is_reduction:
        return None
    reads = [load for load in stage.loads() if load.source.same_as(source.output)]
    if not reads:
        return None
    first = tuple(reads[0].indices)
    if any(not _equal(first, tuple(read.indices)) for read in reads[1:]):
        return None
    point = _invert(source, stage, first)
    if point is None or any(axis.variable not in point for axis in stage.spatial):
        return None
    indices = simplify_indices([substitute(i, point) for i in stage.indices])
    return Epilogue(source, stage, indices, substitute(stage.value, point))


def _equal(left: Sequence[Expr], right: Sequence[Expr]) -> bool:
    return all(tvm_ffi.structural_equal(a, b) for a, b in zip(left, right, strict=True))


def _invert(source: Stage, stage: Stage, indices: Sequence[Expr]) -> dict[Var, Expr] | None:
    """Return each axis of `stage` in terms of the source's: its indices are axes or mixed-radix sums of axes."""
    point: dict[Var, Expr] = {}
    for own, read in zip(source.indices, indices, strict=True):
        if isinstance(own, tirx.IntImm):
            if as_int(read) != int(own):
                return None
            continue
        own_axis = next(axis for axis in source.spatial if axis.variable.same_as(own))
        digits = _digits(read, stage.spatial)
        if digits is None or not _covers(digits, own_axis):
            return None
        for number, (axis, weight) in enumerate(digits):
            if axis.variable in point:
                return None
            value: Expr = own if weight == 1 else tirx.floordiv(own, index(weight))
            point[axis.variable] = value if number == 0 else tirx.floormod(value, index(axis.extent))
    return point


def _digits(expression: Expr, axes: Sequence[Axis]) -> list[tuple[Axis, int]] | None:
    """Return the axes and weights of a sum of weighted axes, largest weight first."""
    if isinstance(expression, tirx.Add):
        left, right = _digits(expression.a, axes), _digits(expression.b, axes)
        if left is None or right is None:
            return None
        return sorted(left + right, key=lambda digit: -digit[1])
    weight = 1
    if isinstance(expression, tirx.Mul) and as_int(expression.b) is not None:
        expression, weight = expression.a, int(expression.b)
    for axis in axes:
        if expression.same_as(axis.variable):
            return [(axis, weight)]
    return None


def _covers(digits: Sequence[tuple[Axis, int]], axis: Axis) -> bool:
    """Whether the digits enumerate [0, extent) once each: every weight is the product of the extents below it."""
    expected = 1
    for digit, weight in reversed(digits):
        if weight != expected:
            return False
        if not isinstance(digit.extent, int):
            return len(digits) == 1 and bool(tvm_ffi.structural_equal(digit.extent, axis.extent))
        expected *= digit.extent
    return expected == axis.extent
