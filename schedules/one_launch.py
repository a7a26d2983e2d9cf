"""Scheduled functions one after another in one launch, for sizes at which a launch takes as long as its work.

A launch wakes all threads and waits for the last of them, once for each function. Here all threads go through the
functions together: each computes its share of a parallel loop, one of them what is not parallel, and between two of
these they wait for each other, which takes less than ending one launch and beginning another.

That is worth its waiting for a single row: the function made here is for sizes of 1, which the code knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt
from tvm_ffi.structural import DefRegionKind

from schedules.intrin.load_fence import fence, with_fences
from schedules.intrin.rendezvous import Rendezvous
from schedules.loops import index, parallel, region
from schedules.report import SCHEDULED
from schedules.stages import loads_of, sequence, substitute
from targets.base import Target

_REGION = "pragma_parallel_launch_point"
_IMPORT = "pragma_import_llvm"
# A loop over one iteration alone would be taken for its body, which all threads run.
_TURNS = 2


class SeveralLaunchesError(Exception):
    """A function cannot be part of another one's launch; the message says why."""


@dataclass(frozen=True, eq=False)
class Part:
    """A scheduled function and, for each of its parameters, what it is called with: a buffer or a number."""

    function: tirx.PrimFunc
    arguments: tuple[Expr, ...]


def symbols_of(part: Part) -> dict[Var, Expr]:
    """Return the values of a function's symbols and parameters; raises SeveralLaunchesError where shapes differ."""
    values: dict[Var, Expr] = dict(zip(part.function.params, part.arguments, strict=True))
    pairs = [
        (own, given)
        for parameter, argument in zip(part.function.params, part.arguments, strict=True)
        if tirx.is_buffer_var(parameter)
        for own, given in zip(parameter.shape, argument.shape, strict=True)
    ]
    for own, given in pairs:
        if isinstance(own, tirx.Var):
            values.setdefault(own, given)
    analyzer = sym.Analyzer()
    if not all(analyzer.can_prove_equal(substitute(own, values), given) for own, given in pairs):
        raise SeveralLaunchesError("a function takes an argument in another shape than its caller knows")
    return values


def in_one_launch(
    parts: Sequence[Part], parameters: Sequence[Var], alone: Sequence[Var], target: Target
) -> tirx.PrimFunc:
    """Return the function of `parameters` that does what `parts` do in order where the symbols `alone` are 1.

    Raises SeveralLaunchesError.
    """
    ones = {symbol: index(1) for symbol in alone}
    launch = _Launch()
    for part in parts:
        launch.add(_body(part, ones))
    root = s_tir.SBlock([], [], [], "root", launch.statement(target), alloc_buffers=launch.static)
    function = tirx.PrimFunc(list(parameters), s_tir.SBlockRealize([], True, root), parts[0].function.ret_type)
    for key in ("s_tir", "tirx.noalias", SCHEDULED):
        function = function.with_attr(key, True)
    sizes = [size for each in parameters if tirx.is_buffer_var(each) for size in each.shape]
    for variable in tirx.analysis.undefined_vars(function.body, list(parameters)):
        if not any(variable.same_as(size) for size in sizes):
            raise SeveralLaunchesError(f"the size {variable.name} is that of no tensor")
    return function


def _body(part: Part, ones: Mapping[Var, Expr]) -> s_tir.SBlock:
    """Return a fresh copy of a function's root block in terms of its arguments, with some symbols replaced."""
    if not isinstance(part.function.body, s_tir.SBlockRealize):
        raise SeveralLaunchesError("a function has no root block")
    root = part.function.body.block
    values = {var: substitute(value, ones) for var, value in symbols_of(part).items()}
    values |= {buffer: _fresh(buffer, values) for buffer in root.alloc_buffers}

    def renamed(variable: Var, kind: DefRegionKind) -> Expr:
        if kind != DefRegionKind.NONE:
            values[variable] = _fresh(variable, values)
        return values.get(variable, variable)

    body = tvm_ffi.structural_map(root.body, with_def_region_kind=(Var, renamed))
    return s_tir.SBlock([], [], [], "root", body, alloc_buffers=[values[each] for each in root.alloc_buffers])


def _fresh(variable: Var, values: Mapping[Var, Expr]) -> Var:
    """Return another variable of the same type, of a buffer with its shape in terms of `values`."""
    if not tirx.is_buffer_var(variable):
        return Var(variable.name, variable.ty)
    shape = [sym.Analyzer().simplify(substitute(extent, values)) for extent in variable.shape]
    return tirx.decl_buffer(shape, str(variable.dtype), variable.name, scope=variable.scope(), layout=None)


@dataclass
class _Launch:
    """What all threads go through together, and what is allocated and brought along around that."""

    static: list[Var] = field(default_factory=list)
    symbolic: list[Var] = field(default_factory=list)
    sources: list[Expr] = field(default_factory=list)
    meetings: Rendezvous = field(default_factory=Rendezvous)
    _steps: list[Stmt] = field(default_factory=list)
    _of_one: list[Stmt] = field(default_factory=list)

    def add(self, root: s_tir.SBlock) -> None:
        """Append what a function does."""
        self.static.extend(root.alloc_buffers)
        self._add(root.body)

    def statement(self, target: Target) -> Stmt:
        """Return the launch with the allocations of symbolic size around it."""
        self._flush()
        if not self._steps:
            raise SeveralLaunchesError("the functions do nothing")
        first, *others = self._steps
        if isinstance(
            first, tirx.IfThenElse
        ):  # which may have meetings of its own, for which threads have to be counted
            first, others = tirx.Evaluate(0), self._steps
        body = region([*self.meetings.begin(first), *self._in_turn(others)])
        body = with_fences(self.meetings.around(body, target), target)
        for source in reversed(self.sources):
            body = tirx.AttrStmt(tirx.const(0, "int32"), _IMPORT, source, body)
        return sequence([*(tirx.AllocBuffer(buffer, {}) for buffer in self.symbolic), body])

    def _in_turn(self, steps: Sequence[Stmt]) -> list[Stmt]:
        """Return the steps, with meetings of all threads in between."""
        return [part for step in steps for part in (self.meetings.meet(), step)][1:]

    def _flush(self) -> None:
        if not self._of_one:
            return
        # Two tensors of different functions may be the same memory.
        body = sequence([part for each in self._of_one for part in (fence(), each)][1:])
        self._steps.append(parallel(_TURNS, lambda turn: tirx.IfThenElse(turn < 1, body, None)))
        self._of_one = []

    def _step(self, statement: Stmt) -> None:
        self._flush()
        self._steps.append(statement)

    def _add(self, statement: Stmt) -> None:
        """Append a statement outside of any launch of its own."""
        if isinstance(statement, tirx.SeqStmt):
            for each in statement.seq:
                self._add(each)
        elif isinstance(statement, tirx.AllocBuffer):
            constant = all(isinstance(extent, tirx.IntImm) for extent in statement.buffer.shape)
            (self.static if constant else self.symbolic).append(statement.buffer)
        elif isinstance(statement, tirx.AttrStmt) and statement.attr_key == _IMPORT:
            if not any(tvm_ffi.structural_equal(statement.value, other) for other in self.sources):
                self.sources.append(statement.value)
            self._add(statement.body)
        elif isinstance(statement, tirx.IfThenElse):
            self._choose(statement)
        elif not _has_launch(statement):
            self._of_one.append(statement)
        elif isinstance(statement, tirx.AttrStmt) and statement.attr_key == _REGION:
            self._step(_with_shares(statement.body))
        elif isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
            if _is_one(statement.extent):
                self._of_one.append(_in_order(statement))
            else:
                self._step(statement)
        else:
            raise SeveralLaunchesError("a function launches threads in a loop, or depending on a computed value")

    def _choose(self, statement: tirx.IfThenElse) -> None:
        """Append a condition: the branch that it always takes, or for all threads the same of both."""
        condition = sym.Analyzer().simplify(statement.condition)
        branches = (statement.then_case, statement.else_case)
        if isinstance(condition, tirx.IntImm):
            taken = branches[0 if int(condition) else 1]
            if taken is not None:
                self._add(taken)
        elif not _has_launch(statement):
            self._of_one.append(statement)
        else:
            if loads_of(condition):
                raise SeveralLaunchesError("a function launches threads depending on a computed value")
            parts = [_Launch(self.static, self.symbolic, self.sources, self.meetings) for _ in branches]
            for part, branch in zip(parts, branches, strict=True):
                if branch is not None:
                    part._add(branch)
            self._step(tirx.IfThenElse(condition, *(part._branch() for part in parts)))

    def _branch(self) -> Stmt:
        self._flush()
        return sequence(self._in_turn(self._steps)) if self._steps else tirx.Evaluate(0)


def _with_shares(body: Stmt) -> Stmt:
    """Return what a launch does; a parallel loop of a single iteration in it would be taken for its body."""

    def shared(each: tirx.For) -> Stmt:
        if each.kind != tirx.ForKind.PARALLEL or not _is_one(each.extent):
            return each
        return parallel(_TURNS, lambda turn: tirx.IfThenElse(turn < 1, _in_order(each), None))

    return tvm_ffi.structural_map(body, (tirx.For, shared))


def _is_one(extent: Expr) -> bool:
    return sym.Analyzer().can_prove_equal(extent, index(1))


def _in_order(each: tirx.For) -> tirx.For:
    """Return a loop whose iterations run one after another."""
    return tirx.For(each.loop_var, each.min, each.extent, tirx.ForKind.SERIAL, each.body)


def _has_launch(statement: Stmt) -> bool:
    found: list[Stmt] = []

    def visit(each: tirx.For) -> None:
        if each.kind == tirx.ForKind.PARALLEL:
            found.append(each)

    tvm_ffi.structural_walk(statement, (tirx.For, visit))
    return bool(found)
