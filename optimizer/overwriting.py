"""Sums written over one of their terms: the memory of what a kernel adds becomes that of its result.

A core that writes a line reads it first. Where a result lies where its term did, that line is in the cache already, and
there is one tensor less to hold. The schedule says which arguments a kernel reads only where it writes next; here such
an argument is overwritten where nobody reads it afterwards. This has to come when calls write into tensors that are
bound, and before memory is planned for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import tvm
import tvm.ir
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from schedules.report import overwritable_of

_ALLOCATES = "relax.builtin.alloc_tensor"


def write_over_terms(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module, in which calls write into bound tensors, without those that a term can give its memory for."""
    places = {variable: overwritable_of(function) for variable, function in module.functions_items()}
    if not any(places.values()):
        return module
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function) and isinstance(function.body, relax.SeqExpr):
            replaced = _replaced(function.body, places)
            if replaced:
                result.update_func(variable, _InPlace(module, replaced).visit_expr(function))
    return result


@dataclass
class _Tensor:
    """A tensor that is allocated: which bindings use it, in order, and whether anything but calls does."""

    variable: relax.Var
    uses: list[int] = field(default_factory=list)
    escapes: bool = False


def _replaced(body: relax.SeqExpr, places: Mapping[tvm.ir.GlobalVar, tuple[int, ...]]) -> dict[relax.Var, relax.Var]:
    """Return the tensors that are not needed, and the ones whose memory they can have."""
    bindings = [binding for block in body.blocks for binding in block.bindings]
    tensors = _tensors(body, bindings)
    replaced: dict[relax.Var, relax.Var] = {}
    for number, binding in enumerate(bindings):
        call = binding.value
        if not isinstance(call, tvm.ir.Call) or not isinstance(call.op, tvm.ir.GlobalVar):
            continue
        for place in places.get(call.op, ()):
            term, output = (tensors.get(each) for each in (call.args[place], call.args[-1]))
            if term is not None and output is not None and _can_take(output, term, number):
                replaced[output.variable] = replaced.get(term.variable, term.variable)
                break
    return replaced


def _can_take(output: _Tensor, term: _Tensor, call: int) -> bool:
    """Return whether a call that first writes `output` reads `term` once, and last."""
    alike = tvm_ffi.structural_equal(output.variable.ty, term.variable.ty)
    is_last = term.uses[-1] == call and term.uses.count(call) == 1
    return alike and is_last and output.uses[0] == call and not output.escapes and not term.escapes


def _tensors(body: relax.SeqExpr, bindings: Iterable[relax.Binding]) -> dict[relax.Expr, _Tensor]:
    """Return the tensors that a function allocates, by all names that they have."""
    tensors: dict[relax.Expr, _Tensor] = {}
    for number, binding in enumerate(bindings):
        value = binding.value
        if isinstance(value, relax.Var) and value in tensors:
            tensors[binding.var] = tensors[value]
            continue
        is_call = isinstance(value, tvm.ir.Call)
        for variable in _variables(value):
            if variable in tensors:
                tensors[variable].uses.append(number)
                tensors[variable].escapes |= not (is_call and isinstance(value.op, tvm.ir.GlobalVar))
        if is_call and isinstance(value.op, tvm.ir.Op) and value.op.name == _ALLOCATES:
            tensors[binding.var] = _Tensor(binding.var)
    for variable in _variables(body.body):
        if variable in tensors:
            tensors[variable].escapes = True
    return tensors


def _variables(expression: relax.Expr) -> list[relax.Var]:
    """Return the variables in an expression, each as often as it occurs."""
    reads = _Reads()
    reads.visit_expr(expression)
    return reads.found


@visitor
class _Reads(PyExprVisitor):
    """Collects what is read."""

    def __init__(self) -> None:
        self.found: list[relax.Var] = []

    def visit_var_(self, op: relax.Var) -> None:
        self.found.append(op)


@mutator
class _InPlace(PyExprMutator):
    """Binds no tensor that has another one's memory."""

    def __init__(self, module: tvm.IRModule, replaced: Mapping[relax.Var, relax.Var]) -> None:
        super().__init__(module)
        self._replaced = replaced

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        other = self._replaced.get(binding.var)
        if other is None:
            super().visit_var_binding_(binding)
        else:
            self.set_var_remap(binding.var, self.visit_expr(other))
