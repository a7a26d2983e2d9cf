"""TIR functions as lists of stages: the form that the schedules read and rewrite.

A legalized and fused PrimFunc is a root block with one loop nest after another, each around one block. A `Stage` is one
such nest reduced to its meaning: the buffer it writes, its spatial and reduction axes, and the value of an element.
What does not have that form (sorting, scans, scatters, calls with side effects) is kept verbatim as an `OpaqueStage`.
`stage_parsing.py` reads a function as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def operands(node: Expr | Stmt) -> list[Expr | Stmt]:
    """Return the operands of arithmetic, however deep, that are no constants; anything else as it is.

    Analyses ask of every index what occurs in it: reading attributes takes a tenth of the time of a general walk.
    """
    found: list[Expr | Stmt] = []
    pending = [node]
    while pending:
        part = pending.pop()
        if isinstance(part, BinaryOpExpr | CmpExpr):
            pending += (part.b, part.a)
        elif not isinstance(part, tirx.IntImm | tirx.FloatImm):
            found.append(part)
    return found


def is_number(node: Expr | Stmt) -> bool:
    """Return whether a node is a variable that is no buffer."""
    return isinstance(node, Var) and isinstance(node.ty, ir.PrimType)


def loads_of(node: Expr | Stmt) -> list[TensorLoad]:
    """Return every buffer read below `node`."""
    found: list[TensorLoad] = []
    for part in operands(node):
        if not is_number(part):
            tvm_ffi.structural_walk(part, (TensorLoad, found.append))
    return found


def variables_of(node: Expr | Stmt) -> list[Var]:
    """Return every variable (buffers too) that occurs below `node`, once each."""
    found: list[Var] = []

    def note(variable: Var) -> None:
        if not contains(found, variable):
            found.append(variable)

    for part in operands(node):
        if isinstance(part, Var) and is_number(part):
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


def simplify_indices(indices: Sequence[Expr]) -> tuple[Expr, ...]:
    """Return index expressions in simplest form."""
    analyzer = sym.Analyzer()
    return tuple(analyzer.simplify(index) for index in indices)


def with_value(stage: Stage, value: Expr) -> Stage:
    """Return `stage` with another value expression."""
    return replace(stage, value=value)
