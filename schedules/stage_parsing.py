"""Reading a TIR function as stages: each loop nest that has the form of one, the others kept as they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.stages import (
    PURE,
    PURE_CALLS,
    Axis,
    OpaqueStage,
    Stage,
    StagedFunction,
    as_extent,
    buffers_of,
    calls_of,
    contains,
    loads_of,
    replace_loads,
    simplify_indices,
    substitute,
    variables_of,
)


class NotAStageError(Exception):
    """A loop nest is not of the form of a stage; the message says why."""


# Merging kernels, dividing work, prepacking and scheduling ask for the stages of the same functions, nine times each,
# and for what they are as a whole.
@functools.lru_cache(maxsize=1024)
def parse(function: tirx.PrimFunc) -> StagedFunction | None:
    """Return the stages of `function`, or None where it has no root block with loop nests below it."""
    if not isinstance(function.body, s_tir.SBlockRealize):
        return None
    root = function.body.block
    if root.iter_vars or root.match_buffers or root.init is not None:
        return None
    statements = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    stages = []
    for statement in statements:
        if not isinstance(statement, tirx.For | s_tir.SBlockRealize):
            return None  # a declaration or binding whose scope is the whole function
        try:
            stages.append(_parse_stage(statement, alone=len(statements) == 1))
        except NotAStageError as reason:
            stages.append(OpaqueStage(statement, tuple(buffers_of(statement)), str(reason)))
    return StagedFunction(function, tuple(stages), tuple(root.alloc_buffers))


def _parse_stage(statement: Stmt, *, alone: bool) -> Stage:
    loops: list[tirx.For] = []
    while isinstance(statement, tirx.For):
        if statement.kind != tirx.ForKind.SERIAL or not _is_zero(statement.min) or statement.annotations:
            raise NotAStageError("a loop is not a plain serial loop from zero")
        loops.append(statement)
        statement = statement.body
    if not isinstance(statement, s_tir.SBlockRealize):
        raise NotAStageError("the loop nest holds more than one block")
    block = statement.block
    if block.alloc_buffers or block.match_buffers or not isinstance(block.body, tirx.BufferStore):
        raise NotAStageError("the block's body is not one store")
    if not (isinstance(statement.predicate, tirx.IntImm) and int(statement.predicate) == 1):
        raise NotAStageError("the block has a predicate")
    axes = _block_axes(block, list(statement.iter_values), loops)
    return _make_stage(block, axes, alone)


def _is_zero(expression: Expr) -> bool:
    return isinstance(expression, tirx.IntImm) and int(expression) == 0


def _block_axes(block: s_tir.SBlock, values: list[Expr], loops: list[tirx.For]) -> list[tuple[Axis, int]]:
    bound: list[Var] = []
    axes = []
    for axis, value in zip(block.iter_vars, values, strict=True):
        unit = _is_zero(value) and as_extent(axis.dom.extent) == 1
        if not unit:
            if not any(value.same_as(loop.loop_var) for loop in loops) or contains(bound, value):
                raise NotAStageError("a block axis is not bound to a loop of its own")
            bound.append(value)
        axes.append((Axis(axis.var, as_extent(axis.dom.extent)), int(axis.iter_type)))
    if len(bound) != len(loops):
        raise NotAStageError("a loop is bound to no block axis")
    return axes


def _make_stage(block: s_tir.SBlock, axes: list[tuple[Axis, int]], alone: bool) -> Stage:
    """Return the stage of a block; one that is `alone` in its function may store to a part of its output."""
    spatial = tuple(axis for axis, kind in axes if kind == tirx.IterVar.DataPar)
    reduction = tuple(axis for axis, kind in axes if kind == tirx.IterVar.CommReduce)
    if len(spatial) + len(reduction) != len(axes):
        raise NotAStageError("an axis is neither spatial nor a reduction")
    store = block.body
    indices = tuple(store.indices)
    initial = None
    if block.init is not None:
        if not isinstance(block.init, tirx.BufferStore) or not block.init.buffer.same_as(store.buffer):
            raise NotAStageError("the initialization is not one store to the output")
        initial = block.init.value
    if (initial is None) != (not reduction):
        raise NotAStageError("a reduction without initialization, or the reverse")
    if not _is_injective(indices, spatial, shifted=alone):
        raise NotAStageError("elements of the output are not written once each in order of the axes")
    stage = Stage(store.buffer, indices, spatial, reduction, initial, store.value)
    _check_reads(stage)
    return without_unit_axes(stage)


def without_unit_axes(stage: Stage) -> Stage:
    """Return `stage` with axes of extent 1 replaced by 0; a reduction with none left becomes a plain value."""
    units = {axis.variable: _zero(axis) for axis in stage.axes if axis.extent == 1}
    if not units and stage.reduction:
        return stage
    indices, value = stage.at(units)
    indices, value = simplify_indices(indices), simplify_loads(value)
    spatial = tuple(axis for axis in stage.spatial if axis.extent != 1)
    reduction = tuple(axis for axis in stage.reduction if axis.extent != 1)
    initial = stage.initial
    if initial is not None:
        initial = substitute(initial, units)
        if not reduction:
            first = initial
            value = replace_loads(value, lambda load: first if load.source.same_as(stage.output) else None)
            initial = None
    return Stage(stage.output, indices, spatial, reduction, initial, value)


def _zero(axis: Axis) -> Expr:
    return tirx.const(0, axis.variable.ty)


def simplify_loads(expression: Expr) -> Expr:
    """Return `expression` with the indices of its buffer reads in simplest form."""
    return replace_loads(expression, lambda load: tirx.BufferLoad(load.source, list(simplify_indices(load.indices))))


def _is_injective(indices: Sequence[Expr], spatial: Sequence[Axis], *, shifted: bool) -> bool:
    """Whether `indices` are distinct spatial variables or zeros and leave out only axes of extent 1.

    Where `shifted` is allowed, something that does not depend on the axes may be added to a variable.
    """
    seen: list[Var] = []
    for index in indices:
        if isinstance(index, tirx.IntImm):
            continue
        variable = _without_shift(index, spatial) if shifted else index
        if not any(variable.same_as(axis.variable) for axis in spatial) or contains(seen, variable):
            return False
        seen.append(variable)
    return all(axis.extent == 1 or contains(seen, axis.variable) for axis in spatial)


def _without_shift(index: Expr, spatial: Sequence[Axis]) -> Expr:
    """Return the variable of an axis that `index` is a shift of, else `index`."""
    moving = [v for v in variables_of(index) if any(v.same_as(axis.variable) for axis in spatial)]
    if len(moving) == 1 and isinstance(index, tirx.Add):
        for operand, other in ((index.a, index.b), (index.b, index.a)):
            if operand.same_as(moving[0]) and not contains(variables_of(other), moving[0]):
                return operand
    return index


def _check_reads(stage: Stage) -> None:
    for call in calls_of(stage.value):
        if not isinstance(call.op, ir.Op):
            raise NotAStageError("the value calls a function")
        effect = call.op.get_attr("TCallEffectKind")
        if call.op.name not in PURE_CALLS and (effect is None or int(effect) > PURE):
            raise NotAStageError(f"the value calls {call.op.name}, which may have side effects")
    for load in loads_of(stage.value):
        if load.source.same_as(stage.output) and not (stage.is_reduction and _same(load.indices, stage.indices)):
            raise NotAStageError("the value reads other elements of the output")


def _same(left: Sequence[Expr], right: Sequence[Expr]) -> bool:
    return len(left) == len(right) and all(tvm_ffi.structural_equal(a, b) for a, b in zip(left, right, strict=True))
