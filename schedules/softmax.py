"""The stages of a softmax, exp(x - max x) / sum of it, with what is known of their values made use of.

The difference is never positive, so half the arithmetic of an exponential suffices, and the sum, of which 1 is a term,
has an inverse to multiply by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.access import same_extent
from schedules.intrin.vector_math import exp_of_nonpositive
from schedules.loops import index, load
from schedules.reducer import reducer_of
from schedules.stages import Stage, bind, contains, substitute

FLOAT = "float32"


def simplified(stages: Sequence[Stage], private: Sequence[Var]) -> tuple[tuple[Stage, ...], tuple[Var, ...]]:
    """Return fp32 stages with the exponentials and quotients of softmaxes simplified, and their `private` buffers."""
    result: list[Stage] = []
    buffers = list(private)
    exponentials: list[Var] = []
    inverses: list[tuple[Var, Var]] = []
    for stage in stages:
        if contains(private, stage.output) and _is_of_nonpositive(stage, result):
            exponentials.append(stage.output)
            assert isinstance(stage.value, ir.Call)
            result.append(replace(stage, value=exp_of_nonpositive(stage.value.args[0])))
            continue
        result.append(_multiplied(stage, inverses))
        if _sums(stage, exponentials) and contains(private, stage.output):
            inverse = tirx.decl_buffer(list(stage.output.shape), FLOAT, f"{stage.output.name}_inverse")
            inverses.append((stage.output, inverse))
            buffers.append(inverse)
            result.append(_inverse(stage, inverse))
    return tuple(result), tuple(buffers)


def _is_of_nonpositive(stage: Stage, before: Sequence[Stage]) -> bool:
    """Return whether the stage is exp(x - m) with m the maximum over all that x is."""
    value = stage.value
    if not isinstance(value, ir.Call) or not isinstance(value.op, ir.Op) or value.op.name != "tirx.exp":
        return False
    difference = value.args[0]
    if str(stage.output.dtype) != FLOAT or not isinstance(difference, tirx.Sub):
        return False
    largest = difference.b
    if not isinstance(largest, TensorLoad):
        return False
    maxima = (other for other in before if other.output.same_as(largest.source) and isinstance(other.value, tirx.Max))
    return any(_is_maximum(maximum, largest, stage, difference.a) for maximum in maxima)


def _is_maximum(maximum: Stage, largest: TensorLoad, stage: Stage, x: Expr) -> bool:
    """Return whether `largest`, an element of `maximum`, is the maximum of `x` over the axes that it does not have."""
    reducer = reducer_of(maximum)
    free = [axis for axis in stage.spatial if not any(axis.variable.same_as(i) for i in largest.indices)]
    if reducer is None or len(free) != len(maximum.reduction):
        return False
    point = bind(maximum.indices, largest.indices)
    for own, reduced in zip(free, maximum.reduction, strict=True):
        if not same_extent(index(own.extent), reduced.extent):
            return False
        point[reduced.variable] = own.variable
    return bool(tvm_ffi.structural_equal(substitute(reducer.term, point), x))


def _sums(stage: Stage, exponentials: Sequence[Var]) -> bool:
    """Return whether the stage adds up, over all axes of its rows, one of the exponentials."""
    reducer = reducer_of(stage)
    if reducer is None or not isinstance(stage.value, tirx.Add) or not isinstance(reducer.term, TensorLoad):
        return False
    return contains(exponentials, reducer.term.source)


def _inverse(total: Stage, inverse: Var) -> Stage:
    value = tirx.const(1.0, FLOAT) / load(total.output, total.indices)
    return Stage(inverse, total.indices, total.spatial, (), None, value)


def _multiplied(stage: Stage, inverses: Sequence[tuple[Var, Var]]) -> Stage:
    """Return `stage` with divisions by sums as products with their inverses."""

    def visit(quotient: tirx.Div, mutator: tvm_ffi.StructuralMutator) -> Expr:
        divisor = quotient.b
        for total, inverse in inverses:
            if isinstance(divisor, TensorLoad) and divisor.source.same_as(total):
                return quotient.a * load(inverse, list(divisor.indices))
        return mutator.default_mutate(quotient)

    return replace(stage, value=tvm_ffi.structural_mutate(stage.value, (tirx.Div, visit))) if inverses else stage
