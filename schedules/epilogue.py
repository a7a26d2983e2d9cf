"""What follows a reduction element by element, computed where the reduction's result still is in a register."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.access import as_int, occurs
from schedules.loops import index, load, local, store
from schedules.stages import (
    CONDITIONAL,
    Axis,
    Stage,
    calls_of,
    contains,
    loads_of,
    replace_loads,
    simplify_indices,
    substitute,
)


@dataclass(frozen=True, eq=False)
class Epilogue:
    """`stage` stores one element for each of the reduction `source`'s, at `indices` in terms of the latter's axes."""

    source: Stage
    stage: Stage
    indices: tuple[Expr, ...]
    value: Expr

    def store(self, total: Expr, point: Mapping[Var, Expr]) -> tirx.BufferStore:
        """Return the store of the element at `point` of the reduction's spatial axes, whose sum is `total`."""
        value = substitute(self.value, point)
        if self.stage is not self.source:
            output = self.source.output
            value = replace_loads(value, lambda read: total if read.source.same_as(output) else None)
        else:
            value = total
        return store(self.stage.output, value, [substitute(i, point) for i in self.indices])


@dataclass(frozen=True, eq=False)
class KeptRead:
    """A read of an epilogue whose values for the lanes are in a local buffer."""

    read: TensorLoad
    buffer: Var

    def loaded(self, point: Mapping[Var, Expr], lane: Expr) -> tirx.BufferStore:
        """Return the store of what is read for a lane at `point` of the reduction's spatial axes."""
        return store(self.buffer, substitute(self.read, point), [lane])


def keep_reads(epilogue: Epilogue, lane: Axis, moving: Sequence[Axis]) -> tuple[Epilogue, tuple[KeptRead, ...]]:
    """Return an epilogue in which local buffers hold what it reads that depends on none of the axes `moving`.

    LLVM would read that again after each store, which may change it for all that it knows.
    """
    conditional = any(isinstance(call.op, ir.Op) and call.op.name == CONDITIONAL for call in calls_of(epilogue.value))
    if epilogue.stage is epilogue.source or conditional:
        return epilogue, ()  # Not all that a condition guards can be read.
    kept: list[KeptRead] = []

    def rewrite(read: TensorLoad) -> Expr | None:
        moves = any(occurs(position, axis.variable) for position in read.indices for axis in moving)
        if moves or contains([epilogue.source.output, epilogue.stage.output], read.source):
            return None
        known = next((each for each in kept if tvm_ffi.structural_equal(each.read, read)), None)
        if known is None:
            known = KeptRead(read, local([lane.extent], str(read.source.dtype), "kept"))
            kept.append(known)
        return load(known.buffer, [lane.variable])

    value = replace_loads(epilogue.value, rewrite)
    return replace(epilogue, value=value), tuple(kept)


def overwritable(epilogue: Epilogue) -> tuple[Var, ...]:
    """Return the buffers of the output's type and shape of which each element is read where it is stored next alone."""
    output = epilogue.stage.output
    reads = [read for read in loads_of(epilogue.value) if not read.source.same_as(epilogue.source.output)]
    elsewhere = [read.source for read in reads if not _equal(tuple(read.indices), epilogue.indices)]
    elsewhere += [read.source for read in epilogue.source.loads()]
    found: list[Var] = []
    for read in reads:
        alike = read.source.dtype == output.dtype and _equal(tuple(read.source.shape), tuple(output.shape))
        if alike and not contains([*elsewhere, *found, output], read.source):
            found.append(read.source)
    return tuple(found)


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
    return len(left) == len(right) and all(map(tvm_ffi.structural_equal, left, right))


def _invert(source: Stage, stage: Stage, indices: Sequence[Expr]) -> dict[Var, Expr] | None:
    """Return each axis of `stage` in terms of the source's.

    Its indices are axes, mixed-radix sums of axes, or the quotient and the remainder of one axis.
    """
    point = _rejoined(source, stage, indices)
    split = list(point)
    for own, read in zip(source.indices, indices, strict=True):
        if isinstance(own, tirx.IntImm):
            if as_int(read) != int(own):
                return None
            continue
        own_axis = next(axis for axis in source.spatial if axis.variable.same_as(own))
        if isinstance(read, tirx.FloorDiv | tirx.FloorMod) and any(read.a.same_as(variable) for variable in split):
            continue
        digits = _digits(read, stage.spatial)
        if digits is None or not _covers(digits, own_axis):
            return None
        for number, (axis, weight) in enumerate(digits):
            if axis.variable in point:
                return None
            value: Expr = own if weight == 1 else tirx.floordiv(own, index(weight))
            point[axis.variable] = value if number == 0 else tirx.floormod(value, index(axis.extent))
    return point


def _rejoined(source: Stage, stage: Stage, indices: Sequence[Expr]) -> dict[Var, Expr]:
    """Return the axes that are read as [..., axis // b, ..., axis % b], in terms of the two axes of the source's."""
    extents = {axis.variable: axis.extent for axis in source.spatial}
    parts = list(zip(source.indices, indices, strict=True))
    point: dict[Var, Expr] = {}
    for low, remainder in parts:
        axis = next(
            (a for a in stage.spatial if isinstance(remainder, tirx.FloorMod) and remainder.a.same_as(a.variable)), None
        )
        if axis is None or not isinstance(axis.extent, int):
            continue
        block = as_int(remainder.b)
        highs = [own for own, read in parts if isinstance(read, tirx.FloorDiv) and read.a.same_as(axis.variable)]
        quotients = [read for _, read in parts if isinstance(read, tirx.FloorDiv) and read.a.same_as(axis.variable)]
        if block is None or len(highs) != 1 or as_int(quotients[0].b) != block or extents.get(low) != block:
            continue
        if extents.get(highs[0]) == -(-axis.extent // block) and axis.extent % block == 0:
            point[axis.variable] = highs[0] * block + low
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
