"""Which stages are computed where they are read instead of being stored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from tvm import ir, sym, tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.kernels import reuses_operands
from schedules.loops import product
from schedules.stages import (
    CONDITIONAL,
    OpaqueStage,
    Stage,
    StagedFunction,
    bind,
    calls_of,
    contains,
    loads_of,
    replace_loads,
    substitute,
    with_value,
)

# Calls that cost about as much as an addition; everything else (exp, erf, pow, ...) is computed once per element.
CHEAP_CALLS = frozenset(
    {
        CONDITIONAL,
        "prim.ceil",
        "prim.likely",
        "tirx.bitwise_and",
        "tirx.bitwise_not",
        "tirx.bitwise_or",
        "tirx.bitwise_xor",
        "tirx.fabs",
        "tirx.floor",
        "tirx.isinf",
        "tirx.isnan",
        "tirx.nearbyint",
        "tirx.reinterpret",
        "tirx.round",
        "tirx.rsqrt",
        "tirx.shift_left",
        "tirx.shift_right",
        "tirx.sqrt",
        "tirx.trunc",
    }
)
# A chain of cheap stages read many times over still grows without bound, in code and in work.
MAXIMAL_INLINED_LOADS = 24


@functools.lru_cache(maxsize=1024)
def inline(staged: StagedFunction) -> StagedFunction:
    """Return `staged` with every elementwise or layout stage that costs little computed at its readers."""
    stages = list(staged.stages)
    position = 0
    while position < len(stages):
        stage = stages[position]
        if isinstance(stage, Stage) and _may_disappear(stage, stages, staged.intermediate):
            readers = [other for other in stages if isinstance(other, Stage) and _reads(other, stage.output)]
            if all(_worth_inlining(stage, reader) for reader in readers):
                inlined = {id(reader): inline_into(stage, reader) for reader in readers}
                if not _makes_a_product(readers, list(inlined.values())):
                    stages = [inlined.get(id(other), other) for other in stages if other is not stage]
                    continue
        position += 1
    return replace(staged, stages=tuple(stages))


def inline_into(producer: Stage, reader: Stage) -> Stage:
    """Return `reader` with its reads of the producer's output replaced by the value computed there."""

    def rewrite(load: TensorLoad) -> Expr | None:
        if not loads_of_any(load.indices) and not load.source.same_as(producer.output):
            return None
        indices = [replace_loads(index, rewrite) for index in load.indices]
        if not load.source.same_as(producer.output):
            return tirx.BufferLoad(load.source, indices)
        point = bind(producer.indices, indices)
        return replace_loads(substitute(producer.value, point), lambda read: _simplified(read, analyzer))

    analyzer = sym.Analyzer()
    for axis in reader.axes:
        analyzer.bind(axis.variable, ir.Range(0, axis.extent))
    return with_value(reader, replace_loads(reader.value, rewrite))


def loads_of_any(expressions: Sequence[Expr]) -> bool:
    """Return whether any of the expressions reads a buffer."""
    return any(loads_of(expression) for expression in expressions if not isinstance(expression, tirx.IntImm | Var))


def _simplified(load: TensorLoad, analyzer: sym.Analyzer) -> Expr:
    return tirx.BufferLoad(load.source, [analyzer.simplify(index) for index in load.indices])


def _may_disappear(stage: Stage, stages: Sequence[Stage | OpaqueStage], intermediate: Sequence[Var]) -> bool:
    if stage.is_reduction or not contains(intermediate, stage.output):
        return False
    writers = [other for other in stages if isinstance(other, Stage) and other.output.same_as(stage.output)]
    opaque = [other for other in stages if isinstance(other, OpaqueStage)]
    return len(writers) == 1 and not any(contains(other.buffers, stage.output) for other in opaque)


def _reads(stage: Stage, buffer: Var) -> bool:
    return any(load.source.same_as(buffer) for load in stage.loads())


def _worth_inlining(producer: Stage, reader: Stage) -> bool:
    reads = [load for load in reader.loads() if load.source.same_as(producer.output)]
    conditional = any(call.op.name == CONDITIONAL for call in calls_of(producer.value))
    if reader.is_reduction:
        # Under a reduction an element may be read many times, and a condition keeps its loop from being vectorized.
        if _is_move(producer.value):
            return not conditional
        return len(reads) == 1 and is_cheap(producer.value) and not conditional and _reads_once(producer, reader)
    if len(reads) == 1 and _reads_once(producer, reader):
        return True
    return is_cheap(producer.value) and len(reads) * len(producer.loads()) <= MAXIMAL_INLINED_LOADS


def _makes_a_product(before: Sequence[Stage], after: Sequence[Stage]) -> bool:
    """Return whether a reduction of a row becomes a product of several operands beside others that read the row.

    Alone it may be one: the rows of x * v summed are a matrix times a vector. The maximum of x * v before a softmax is
    one step of its rows.
    """
    pairs = zip(before, after, strict=True)
    return len(before) > 1 and any(
        new.is_reduction and reuses_operands(new) and not reuses_operands(old) for old, new in pairs
    )


def _is_move(value: Expr) -> bool:
    """Whether the value is one element of another buffer, at most converted to another type."""
    while isinstance(value, tirx.Cast):
        value = value.value
    return isinstance(value, TensorLoad)


def is_cheap(value: Expr) -> bool:
    """Return whether recomputing `value` costs no more than storing and loading it."""
    return all(call.op.name in CHEAP_CALLS for call in calls_of(value))


def _reads_once(producer: Stage, reader: Stage) -> bool:
    """Whether the reader's domain has as many points as the producer has elements (unknown counts as more)."""
    own = product([axis.extent for axis in producer.spatial])
    others = product([axis.extent for axis in reader.axes])
    if isinstance(own, int) and isinstance(others, int):
        return others <= own
    return len(producer.spatial) == len(reader.axes)
