"""TIR functions as lists of stages: the form that the schedules read and rewrite.

A legalized and fused PrimFunc is a root block with one loop nest after another, each around one block. A `Stage` is one
such nest reduced to its meaning: the buffer it writes, its spatial and reduction axes, and the value of an element.
What does not have that form (sorting, scans, scatters, calls with side effects) is kept verbatim as an `OpaqueStage`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.ir.prim.expr import BinaryOpExpr, CmpExpr
from tvm.tirx.stmt import Stmt

# TVM keeps a handful of operators in a domain of their own, apart from "tirx".
CONDITIONAL = "prim.if_then_else"
PURE_CALLS = frozenset({CONDITIONAL, "prim.likely"})
PURE = 1  # tirx.CallEffectKind.Pure; below it are annotations of expressions


@dataclass(frozen=True, eq=False)
class Axis:
    """One iteration variable of a stage with its extent (an integer where it is static)."""

    variable: Var
    extent: int | Expr

    @property
    def static(self) -> bool:
        return isinstance(self.extent, int)

    def fresh(self) -> Axis:
        """Return an axis of the same extent with a variable of its own."""
        return Axis(Var(self.variable.name, self.variable.ty), self.extent)


@dataclass(frozen=True, eq=False)
class Stage:
    """One element of `output` per point of the spatial axes, stored at `indices`.

    For a reduction `initial` is the value before the first step and `value`, which reads `output[indices]`, is the
    value after the next one; otherwise `initial` is None and `value` reads other buffers only.
    """

    output: Var
    indices: tuple[Expr, ...]
    spatial: tuple[Axis, ...]
    reduction: tuple[Axis, ...]
    initial: Expr | None
    value: Expr

    @property
    def is_reduction(self) -> bool:
        return self.initial is not None

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.spatial + self.reduction

    @cached_property
    def _loads(self) -> tuple[TensorLoad, ...]:
        return tuple(load for load in loads_of(self.value) if not load.source.same_as(self.output))

    def loads(self) -> list[TensorLoad]:
        """Return the reads of other buffers, in the order of the expression."""
        return list(self._loads)

    def at(self, point: Mapping[Var, Expr]) -> tuple[tuple[Expr, ...], Expr]:
        """Return the store indices and the value with the axes replaced by `point`."""
        return tuple(substitute(index, point) for index in self.indices), substitute(self.value, point)


@dataclass(frozen=True, eq=False)
class OpaqueStage:
    """A statement of the function that is kept as it is, with the buffers it touches."""

    statement: Stmt
    buffers: tuple[Var, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class StagedFunction:
    """A function's stages in program order; `intermediate` holds the buffers that live only inside the function."""

    function: tirx.PrimFunc
    stages: tuple[Stage | OpaqueStage, ...]
    intermediate: tuple[Var, ...]

    def rebuild(self, statements: Sequence[Stmt]) -> tirx.PrimFunc:
        """Return the function with `statements` as its body, allocating the intermediates that are still in use."""
        body = sequence(statements)
        used = buffers_of(body)
        kept = [buffer for buffer in self.intermediate if contains(used, buffer)]
        # TVM shrinks what a block allocates to what it can prove to be accessed, and writes loop variables into the
        # size where the bounds are symbolic.
        symbolic = [buffer for buffer in kept if not all(isinstance(extent, tirx.IntImm) for extent in buffer.shape)]
        static = [buffer for buffer in kept if not contains(symbolic, buffer)]
        body = sequence([*(tirx.AllocBuffer(buffer, {}) for buffer in symbolic), body])
        # It writes one into the size of a static one, too, whose rows have several axes, unless they become one.
        body, static = _with_flat_rows(body, static)
        root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=static)
        return self.function.with_body(s_tir.SBlockRealize([], True, root))


def _with_flat_rows(body: Stmt, buffers: Sequence[Var]) -> tuple[Stmt, list[Var]]:
    """Return a statement in which the axes of a row's number are one axis of a buffer, and the buffers it then has.

    Of an index such as [r // 14 // 14, r // 14 % 14, r % 14, c] that is r.
    """
    divided: list[Var] = []

    def find(access: TensorLoad | tirx.BufferStore) -> None:
        buffer = access.source if isinstance(access, TensorLoad) else access.buffer
        is_divided = any(isinstance(at, tirx.FloorDiv) for at in access.indices[:-1])
        if is_divided and contains(buffers, buffer) and not contains(divided, buffer):
            divided.append(buffer)

    tvm_ffi.structural_walk(body, [(TensorLoad, find), (tirx.BufferStore, find)])
    flat: dict[Var, Var] = {}
    for buffer in divided:
        *axes, last = (int(extent) for extent in buffer.shape)
        shape = [math.prod(axes), last]
        flat[buffer] = tirx.decl_buffer(shape, str(buffer.dtype), buffer.name, scope=buffer.scope(), layout=None)
    if not flat:
        return body, list(buffers)
    analyzer = sym.Analyzer()

    def place(buffer: Var, indices: Sequence[Expr]) -> tuple[Var, list[Expr]] | None:
        if buffer not in flat:
            return None
        row: Expr = indices[0]
        for extent, at in zip(buffer.shape[1:-1], indices[1:-1], strict=True):
            row = row * extent + at
        return flat[buffer], [analyzer.simplify(row), indices[-1]]

    rewritten = at_other_places(body, place)
    used = buffers_of(rewritten)
    if any(contains(used, buffer) for buffer in flat):
        return body, list(buffers)  # some code takes one as a whole
    return rewritten, [flat.get(buffer, buffer) for buffer in buffers]


def at_other_places(body: Stmt, place: Callable[[Var, Sequence[Expr]], tuple[Var, list[Expr]] | None]) -> Stmt:
    """Return a statement that reads and writes elements of buffers at the buffer and indices that `place` says."""

    def read(load: TensorLoad, mutator: tvm_ffi.StructuralMutator) -> Expr:
        load = mutator.default_mutate(load)
        moved = place(load.source, load.indices)
        return load if moved is None else tirx.BufferLoad(*moved)

    def write(store: tirx.BufferStore, mutator: tvm_ffi.StructuralMutator) -> Stmt:
        store = mutator.default_mutate(store)
        moved = place(store.buffer, store.indices)
        return store if moved is None else tirx.BufferStore(moved[0], store.value, moved[1])

    return tvm_ffi.structural_mutate(body, [(TensorLoad, read), (tirx.BufferStore, write)])


class NotAStageError(Exception):
    """A loop nest is not of the form of a stage; the message says why."""


def contains(variables: Sequence[Var], variable: Var) -> bool:
    """Return whether `variable` itself (not an equal one) is among `variables`."""
    return any(variable.same_as(other) for other in variables)


def bind(indices: Sequence[Expr], actual: Sequence[Expr]) -> dict[Var, Expr]:
    """Return the values of the axes that make `indices`, plain axes and zeros, equal to `actual`."""
    return {own: value for own, value in zip(indices, actual, strict=True) if not isinstance(own, tirx.IntImm)}


def sequence(statements: Sequence[Stmt]) -> Stmt:
    """Return the statements as one."""
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def as_extent(extent: Expr) -> int | Expr:
    """Return a constant extent as a Python integer."""
    return int(extent) if isinstance(extent, tirx.IntImm) else extent


def _operands(node: Expr | Stmt) -> Iterator[Expr | Stmt]:
    """Yield the operands of arithmetic, however deep, that are no constants; anything else as it is.

    Analyses ask of every index what occurs in it: reading attributes takes a tenth of the time of a general walk.
    """
    if isinstance(node, BinaryOpExpr | CmpExpr):
        yield from _operands(node.a)
        yield from _operands(node.b)
    elif not isinstance(node, tirx.IntImm | tirx.FloatImm):
        yield node


def _is_number(node: Expr | Stmt) -> bool:
    """Return whether a node is a variable that is no buffer."""
    return isinstance(node, Var) and isinstance(node.ty, ir.PrimType)


def loads_of(node: Expr | Stmt) -> list[TensorLoad]:
    """Return every buffer read below `node`."""
    found: list[TensorLoad] = []
    for part in _operands(node):
        if not _is_number(part):
            tvm_ffi.structural_walk(part, (TensorLoad, found.append))
    return found


def variables_of(node: Expr | Stmt) -> list[Var]:
    """Return every variable (buffers too) that occurs below `node`, once each."""
    found: list[Var] = []

    def note(variable: Var) -> None:
        if not contains(found, variable):
            found.append(variable)

    for part in _operands(node):
        if isinstance(part, Var) and _is_number(part):
            note(part)
        else:
            tvm_ffi.structural_walk(part, (Var, note))
    return found


def buffers_of(node: Expr | Stmt) -> list[Var]:
    """Return the buffers that occur below `node`, once each."""
    return [variable for variable in variables_of(node) if tirx.is_buffer_var(variable)]


def substitute(expression: Expr, values: Mapping[Var, Expr]) -> Expr:
    """Return `expression` with variables replaced."""
    if not values:
        return expression
    return tvm_ffi.structural_map(expression, (Var, lambda variable: values.get(variable, variable)))


def replace_loads(expression: Expr, rewrite: Callable[[TensorLoad], Expr | None]) -> Expr:
    """Return `expression` with each buffer read replaced by `rewrite(read)`, where that is not None."""
    if not loads_of(expression):
        return expression

    def visit(load: TensorLoad, mutator: tvm_ffi.StructuralMutator) -> Expr:
        replacement = rewrite(load)
        return mutator.default_mutate(load) if replacement is None else replacement

    return tvm_ffi.structural_mutate(expression, (TensorLoad, visit))


def replaced(expression: Expr, part: Expr, other: Expr) -> Expr:
    """Return `expression` with `other` in place of `part` itself (not of equal ones)."""

    def visit(node: Expr, mutator: tvm_ffi.StructuralMutator) -> Expr:
        return other if node.same_as(part) else mutator.default_mutate(node)

    return tvm_ffi.structural_mutate(expression, (type(part), visit))


def calls_of(expression: Expr) -> list[ir.Call]:
    """Return every call below `expression`."""
    found: list[ir.Call] = []
    tvm_ffi.structural_walk(expression, (ir.Call, found.append))
    return found


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


def simplify_indices(indices: Sequence[Expr]) -> tuple[Expr, ...]:
    """Return index expressions in simplest form."""
    analyzer = sym.Analyzer()
    return tuple(analyzer.simplify(index) for index in indices)


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


def with_value(stage: Stage, value: Expr) -> Stage:
    """Return `stage` with another value expression."""
    return replace(stage, value=value)
