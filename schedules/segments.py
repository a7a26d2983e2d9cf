"""Rows of which conditions take parts from different places, such as concatenations and paddings, as those parts.

A condition that compares the position in the row with a constant is decided for all of a part, which is then computed
in vectors; left in place it would be asked for every element. One on the remainder of the position, as of channels that
are turned by pairs, is decided for each place of a period.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import tvm_ffi
from tvm import ir, sym, tirx
from tvm.ir import Expr, Var

from schedules.access import as_int, branches_on
from schedules.stages import CONDITIONAL, Axis, Stage, calls_of, with_value

# More parts than these would be more code than they save time.
MOST_SEGMENTS = 8
MOST_PHASES = 4


@dataclass(frozen=True, eq=False)
class Segment:
    """Positions [begin, end) of an axis, and the stage as it is for these; `conditional` if conditions are left."""

    begin: int
    end: int
    stage: Stage
    conditional: bool


def segments(stage: Stage, axis: Axis) -> list[Segment]:
    """Return the parts of `axis` between which a condition of the stage changes; one, where the axis is not static."""
    if not isinstance(axis.extent, int):
        return []
    inside = {bound for bound in _bounds(stage, axis.variable) if 0 < bound < axis.extent}
    borders = [0, *sorted(inside), axis.extent] if len(inside) < MOST_SEGMENTS else [0, axis.extent]
    parts = []
    for begin, end in itertools.pairwise(borders):
        decided = with_value(stage, _decided(stage.value, axis, begin, end))
        parts.append(Segment(begin, end, decided, branches_on(decided.value, axis)))
    return parts


def phases(stage: Stage, axis: Axis) -> list[Stage]:
    """Return the stage at each place of the period of `axis` that decides its conditions; none where there is none."""
    periods = set(_periods(stage.value, axis.variable))
    period = periods.pop() if len(periods) == 1 else 0
    if not 1 < period <= MOST_PHASES or not isinstance(axis.extent, int) or axis.extent % period:
        return []
    values = [_decided(_in_phase(stage.value, axis, period, place), axis, 0, axis.extent) for place in range(period)]
    return [] if any(branches_on(value, axis) for value in values) else [with_value(stage, value) for value in values]


def _periods(value: Expr, variable: Var) -> Iterator[int]:
    """Yield the divisors of the position whose remainder conditions ask for."""
    for call in calls_of(value):
        if isinstance(call.op, ir.Op) and call.op.name == CONDITIONAL:
            remainders: list[tirx.FloorMod] = []
            tvm_ffi.structural_walk(call.args[0], [(tirx.FloorMod, remainders.append)])
            yield from (as_int(each.b) or 0 for each in remainders if each.a.same_as(variable))


def _in_phase(value: Expr, axis: Axis, period: int, place: int) -> Expr:
    """Return `value` for positions whose remainder is `place`."""

    def known(remainder: tirx.FloorMod, mutator: tvm_ffi.StructuralMutator) -> Expr:
        if remainder.a.same_as(axis.variable) and as_int(remainder.b) == period:
            return tirx.const(place, axis.variable.ty)
        return mutator.default_mutate(remainder)

    return tvm_ffi.structural_mutate(value, (tirx.FloorMod, known))


def _bounds(stage: Stage, variable: Var) -> Iterator[int]:
    """Yield the positions from which on a comparison with the axis has another result than before."""
    for call in calls_of(stage.value):
        if isinstance(call.op, ir.Op) and call.op.name == CONDITIONAL:
            comparisons: list[tirx.LT | tirx.LE | tirx.GT | tirx.GE] = []
            kinds = (tirx.LT, tirx.LE, tirx.GT, tirx.GE)
            tvm_ffi.structural_walk(call.args[0], [(kind, comparisons.append) for kind in kinds])
            for comparison in comparisons:
                yield from _bound(comparison, variable)


def _bound(comparison: tirx.LT | tirx.LE | tirx.GT | tirx.GE, variable: Var) -> Iterator[int]:
    left, right = comparison.a, comparison.b
    if isinstance(comparison, tirx.GT | tirx.GE):
        left, right = right, left
    strict = isinstance(comparison, tirx.LT | tirx.GT)
    low, high = as_int(left), as_int(right)
    if high is not None and left.same_as(variable):  # position < high, or position <= high
        yield high if strict else high + 1
    if low is not None and right.same_as(variable):  # low < position, or low <= position
        yield low + 1 if strict else low


def _decided(value: Expr, axis: Axis, begin: int, end: int) -> Expr:
    """Return `value` for positions [begin, end), without the conditions that are the same for all of them."""
    analyzer = sym.Analyzer()
    analyzer.bind(axis.variable, ir.Range(tirx.const(begin, axis.variable.ty), tirx.const(end, axis.variable.ty)))

    def choose(call: ir.Call, mutator: tvm_ffi.StructuralMutator) -> Expr:
        if isinstance(call.op, ir.Op) and call.op.name == CONDITIONAL:
            condition = analyzer.simplify(call.args[0])
            outcome = as_int(condition)
            if outcome is not None:
                return _decided(call.args[1] if outcome else call.args[2], axis, begin, end)
            # What is left may ask for other axes alone.
            return tirx.if_then_else(condition, *(_decided(each, axis, begin, end) for each in call.args[1:]))
        return mutator.default_mutate(call)

    return tvm_ffi.structural_mutate(value, (ir.Call, choose))
