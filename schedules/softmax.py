"""The stages of a softmax, exp(x - max x) / sum of it, or of its logarithm, with what is known of their values used.

The difference is never positive, so half the arithmetic of an exponential suffices, and the sum, of which 1 is a term,
has an inverse to multiply by. The inverse and the logarithm of a sum are computed once, not for each element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.access import same_extent
from schedules.intrin.vector_math import exp_of_nonpositive
from schedules.loops import index, load
from schedules.reducer import reducer_of
from schedules.stages import Stage, bind, calls_of, contains, substitute

FLOAT = "float32"


def simplified(stages: Sequence[Stage], private: Sequence[Var]) -> tuple[tuple[Stage, ...], tuple[Var, ...]]:
    """Return fp32 stages with the parts of softmaxes and their logarithms simplified, and their `private` buffers."""
    result: list[Stage] = []
    buffers = list(private)
    exponentials: list[Var] = []
    inverses: list[tuple[Var, Var]] = []
    for stage in stages:
        if contains(private, stage.output) and _is_of_nonpositive(stage, stage.value, result):
            exponentials.append(stage.output)
            result.append(replace(stage, value=_of_nonpositive(stage.value)))
            continue
        logarithms = _logarithms(stage, result, private)
        result += logarithms.values()
        buffers += [each.output for each in logarithms.values()]
        result.append(_multiplied(_with_logarithms(_with_exponential(stage, result), logarithms), inverses))
        if _sums(stage, exponentials) and contains(private, stage.output):
            inverse = tirx.decl_buffer(list(stage.output.shape), FLOAT, f"{stage.output.name}_inverse")
            inverses.append((stage.output, inverse))
            buffers.append(inverse)
            result.append(_inverse(stage, inverse))
    return tuple(result), tuple(buffers)


def _is_of_nonpositive(stage: Stage, value: Expr, before: Sequence[Stage]) -> bool:
    """Return whether a value of the stage is exp(x - m) with m the maximum over all that x is."""
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


def _of_nonpositive(value: Expr) -> Expr:
    assert isinstance(value, ir.Call)
    return exp_of_nonpositive(value.args[0])


def _with_exponential(stage: Stage, before: Sequence[Stage]) -> Stage:
    """Return a sum of exponentials of what is never positive with these simplified, any other stage as it is."""
    reducer = reducer_of(stage)
    if reducer is None or not isinstance(stage.value, tirx.Add) or not _is_of_nonpositive(stage, reducer.term, before):
        return stage
    return replace(stage, value=reducer.combine(load(stage.output, stage.indices), _of_nonpositive(reducer.term)))


def _logarithms(stage: Stage, before: Sequence[Stage], private: Sequence[Var]) -> dict[Var, Stage]:
    """Return stages for the logarithms of private sums that a stage of more elements reads, by the sums' buffers."""
    found: dict[Var, Stage] = {}
    for call in calls_of(stage.value):
        total = _logarithm_of(call)
        own = None if total is None else next((each for each in before if each.output.same_as(total.source)), None)
        if total is None or own is None or not own.is_reduction or not contains(private, own.output):
            continue
        if len(stage.spatial) > len(own.spatial) and str(own.output.dtype) == FLOAT:
            output = tirx.decl_buffer(list(own.output.shape), FLOAT, f"{own.output.name}_logarithm")
            value = tirx.log(load(own.output, own.indices))
            found[own.output] = Stage(output, own.indices, own.spatial, (), None, value)
    return found


def _logarithm_of(call: Expr) -> TensorLoad | None:
    """Return the element of which an expression is the logarithm."""
    is_call = isinstance(call, ir.Call) and isinstance(call.op, ir.Op) and call.op.name == "tirx.log"
    return call.args[0] if is_call and isinstance(call.args[0], TensorLoad) else None


def _with_logarithms(stage: Stage, logarithms: Mapping[Var, Stage]) -> Stage:
    """Return `stage` with elements of what was computed before in place of logarithms."""

    def visit(call: ir.Call, mutator: tvm_ffi.StructuralMutator) -> Expr:
        total = _logarithm_of(call)
        own = None if total is None else logarithms.get(total.source)
        return mutator.default_mutate(call) if total is None or own is None else load(own.output, list(total.indices))

    return replace(stage, value=tvm_ffi.structural_mutate(stage.value, (ir.Call, visit))) if logarithms else stage


def _is_maximum(maximum: Stage, largest: TensorLoad, stage: Stage, x: Expr) -> bool:
    """Return whether `largest`, an element of `maximum`, is the maximum of `x` over the axes that it does not have."""
    reducer = reducer_of(maximum)
    free = [axis for axis in stage.axes if not any(axis.variable.same_as(i) for i in largest.indices)]
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
