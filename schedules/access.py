"""How the buffer accesses of a stage move along its axes, and which axes can be walked as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var

from schedules.loops import Extent, product, unflatten
from schedules.stages import (
    CONDITIONAL,
    Axis,
    Stage,
    calls_of,
    contains,
    is_number,
    operands,
    replace_loads,
    variables_of,
)


class Step(Enum):
    """What one step along an axis does to the address of an access."""

    NONE = "none"
    UNIT = "unit"
    STRIDED = "strided"
    IRREGULAR = "irregular"


@dataclass(frozen=True, eq=False)
class Access:
    """A read or write of `buffer` at `indices`."""

    buffer: Var
    indices: tuple[Expr, ...]

    def step(self, axis: Axis) -> Step:
        """Return how the address moves along `axis`."""
        coefficients = [linear_coefficient(index, axis.variable) for index in self.indices]
        if any(coefficient is None for coefficient in coefficients):
            return Step.IRREGULAR
        moving = [position for position, coefficient in enumerate(coefficients) if coefficient]
        if not moving:
            return Step.NONE
        varies_below = any(as_int(extent) != 1 for extent in self.buffer.shape[moving[-1] + 1 :])
        unit = len(moving) == 1 and coefficients[moving[0]] == 1 and not varies_below
        return Step.UNIT if unit else Step.STRIDED

    def block(self, axis: Axis) -> int:
        """Return b where `axis` occurs as [..., axis // b, ..., axis % b] and nowhere else, 0 for anything else."""
        if not self.indices or not isinstance(self.indices[-1], tirx.FloorMod):
            return 0
        last = self.indices[-1]
        if not last.a.same_as(axis.variable):
            return 0
        quotients = [i for i in self.indices[:-1] if occurs(i, axis.variable)]
        if len(quotients) != 1 or not isinstance(quotients[0], tirx.FloorDiv):
            return 0
        own = quotients[0].a.same_as(axis.variable) and tvm_ffi.structural_equal(quotients[0].b, last.b)
        return as_int(last.b) or 0 if own else 0


def as_int(expression: Expr) -> int | None:
    """Return a constant as a Python integer, None for anything else."""
    return int(expression) if isinstance(expression, tirx.IntImm) else None


def linear_coefficient(expression: Expr, variable: Var) -> int | None:
    """Return c where `expression` is c * variable + terms without it, None where it has another form."""
    if expression.same_as(variable):
        return 1
    if isinstance(expression, tirx.Add | tirx.Sub):
        left, right = linear_coefficient(expression.a, variable), linear_coefficient(expression.b, variable)
        if left is None or right is None:
            return None
        return left + right if isinstance(expression, tirx.Add) else left - right
    if isinstance(expression, tirx.Mul):
        for factor, other in ((expression.a, expression.b), (expression.b, expression.a)):
            constant = as_int(factor)
            coefficient = linear_coefficient(other, variable) if constant is not None else None
            if constant is not None and coefficient is not None:
                return constant * coefficient
    return None if occurs(expression, variable) else 0


def occurs(expression: Expr, variable: Var) -> bool:
    """Return whether `variable` occurs in `expression`."""
    return any(
        part.same_as(variable) or (not is_number(part) and contains(variables_of(part), variable))
        for part in operands(expression)
    )


def run_length(expression: Expr, variable: Var) -> int:
    """Return d where `variable` occurs only as variable // d, 1 otherwise."""
    if isinstance(expression, tirx.FloorDiv) and expression.a.same_as(variable):
        return as_int(expression.b) or 1
    if isinstance(expression, tirx.Add | tirx.Mul | tirx.Sub):
        runs = [run_length(side, variable) for side in (expression.a, expression.b) if occurs(side, variable)]
        return runs[0] if len(runs) == 1 else 1
    return 1


def accesses(stage: Stage) -> list[Access]:
    """Return the store of `stage` and its reads of other buffers."""
    return [Access(stage.output, stage.indices), *(Access(load.source, tuple(load.indices)) for load in stage.loads())]


@dataclass(frozen=True, eq=False)
class AxisGroup:
    """Adjacent axes that every access walks as if they were one, outermost first."""

    axes: tuple[Axis, ...]

    @property
    def extent(self) -> Extent:
        return product([axis.extent for axis in self.axes])

    @property
    def static(self) -> bool:
        return all(axis.static for axis in self.axes)

    @property
    def inner(self) -> Axis:
        """The axis that moves fastest."""
        return self.axes[-1]

    def point(self, flat: Expr) -> dict[Var, Expr]:
        """Return the value of each axis at position `flat` of the group."""
        values = unflatten(flat, [axis.extent for axis in self.axes])
        return {axis.variable: value for axis, value in zip(self.axes, values, strict=True)}


def group_axes(axes: Sequence[Axis], stages: Iterable[Stage]) -> list[AxisGroup]:
    """Return `axes`, in order, with neighbours grouped where every access of `stages` allows it."""
    every = [access for stage in stages for access in accesses(stage)]
    loose = [variable for stage in stages for variable in free_variables(stage)]
    groups: list[list[Axis]] = []
    for axis in axes:
        if groups and _joined(groups[-1][-1], axis, every, loose):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return [AxisGroup(tuple(group)) for group in groups]


def free_variables(stage: Stage) -> list[Var]:
    """Return the variables that the value of `stage` uses outside of buffer indices (in a condition, as a number)."""
    bare = replace_loads(stage.value, lambda load: tirx.const(0, load.source.dtype))
    return variables_of(bare)


def _joined(outer: Axis, inner: Axis, every: Sequence[Access], loose: Sequence[Var]) -> bool:
    if any(outer.variable.same_as(v) or inner.variable.same_as(v) for v in loose):
        return False
    return all(_walks_as_one(access, outer, inner) for access in every)


def _walks_as_one(access: Access, outer: Axis, inner: Axis) -> bool:
    outer_at = [i for i, index in enumerate(access.indices) if occurs(index, outer.variable)]
    inner_at = [i for i, index in enumerate(access.indices) if occurs(index, inner.variable)]
    if not outer_at and not inner_at:
        return True
    if len(outer_at) == 1 and outer_at == inner_at and isinstance(inner.extent, int):
        position = access.indices[outer_at[0]]
        step = linear_coefficient(position, inner.variable)
        return step is not None and linear_coefficient(position, outer.variable) == step * inner.extent
    if len(outer_at) != 1 or inner_at != [outer_at[0] + 1]:
        return False
    position = inner_at[0]
    plain = access.indices[position - 1].same_as(outer.variable) and access.indices[position].same_as(inner.variable)
    return plain and same_extent(access.buffer.shape[position], inner.extent)


def same_extent(expression: Expr, extent: Extent) -> bool:
    """Return whether a shape's entry equals an axis extent."""
    if isinstance(extent, int):
        return as_int(expression) == extent
    return bool(tvm_ffi.structural_equal(expression, extent))


def branches_on(expression: Expr, axis: Axis) -> bool:
    """Return whether `expression` holds a conditional whose condition depends on `axis`."""
    return any(
        call.op.name == CONDITIONAL and occurs(call.args[0], axis.variable)
        for call in calls_of(expression)
        if hasattr(call.op, "name")
    )
