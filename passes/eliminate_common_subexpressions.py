"""Equal computations, done once; unused ones, not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Pass, PassOutcome, Site
from passes.provenance import Bindings, Nodes, annotate, union

# TVM compares constants by their bytes, at every use of them. Beyond this many elements they are compared by storage.
_LARGE = 256


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Bind equal expressions once, then drop what nobody reads. All operators are pure, so any two equal ones agree."""

    name: ClassVar[str] = "eliminate-common-subexpressions"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Merge equal bindings of every function."""
        constants = _Constants()
        hidden = _with_bodies(module, lambda body: _Hider(module, constants).visit_expr(body))
        merged, sites = _annotated(hidden, relax.transform.EliminateCommonSubexpr()(hidden))
        shown = _with_bodies(merged, lambda body: _Shower(merged, constants).visit_expr(body))
        return PassOutcome(relax.transform.DeadCodeElimination()(shown), sites)


def _annotated(before: tvm.IRModule, merged: tvm.IRModule) -> tuple[tvm.IRModule, tuple[Site, ...]]:
    """Return `merged` with the nodes of what is gone at what took its place, and a site for each of the former."""
    sites: list[Site] = []
    nodes: dict[relax.Var, Nodes] = {}
    for variable, function in merged.functions_items():
        if not isinstance(function, relax.Function):
            continue
        old, new = Bindings(before[variable]), Bindings(function)
        for var, value in new.values.items():
            if var in old.values and isinstance(value, relax.Var) and not isinstance(old.values[var], relax.Var):
                survivor = value
                while isinstance(new.values.get(survivor), relax.Var):
                    survivor = new.values[survivor]
                sites.append(Site(var.name, None, old.nodes(var)))
                if survivor in new.values:
                    nodes[survivor] = union((nodes.get(survivor, new.nodes(survivor)), old.nodes(var)))
    return annotate(merged, nodes), tuple(sites)


def _with_bodies(module: tvm.IRModule, rewrite: Callable[[relax.Expr], relax.Expr]) -> tvm.IRModule:
    """Return the module with the body of every Relax function rewritten."""
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            body = rewrite(function.body)
            result.update_func(
                variable, relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
            )
    return result


class _Constants:
    """Large constants and the variables that stand for them, one for each storage."""

    def __init__(self) -> None:
        self._stand_ins: dict[tuple[int, str], relax.Var] = {}
        self.constants: dict[relax.Var, tvm.ir.GenericConst] = {}

    def stand_in(self, constant: tvm.ir.GenericConst) -> relax.Var:
        """Return the variable that stands for `constant`."""
        # Storage that is shared may be read in another shape: the type tells such constants apart.
        key = (int(constant.value.data_ptr()), str(constant.ty))
        if key not in self._stand_ins:
            self._stand_ins[key] = relax.Var("constant", constant.ty)
            self.constants[self._stand_ins[key]] = constant
        return self._stand_ins[key]


@mutator
class _Hider(PyExprMutator):
    def __init__(self, module: tvm.IRModule, constants: _Constants) -> None:
        super().__init__(module)
        self._constants = constants

    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> relax.Expr:
        """Replace a large tensor by the variable that stands for it."""
        if not isinstance(op.ty, relax.TensorType) or math.prod(map(int, op.value.shape)) <= _LARGE:
            return op
        return self._constants.stand_in(op)


@mutator
class _Shower(PyExprMutator):
    def __init__(self, module: tvm.IRModule, constants: _Constants) -> None:
        super().__init__(module)
        self._constants = constants

    def visit_var_(self, op: relax.Var) -> relax.Expr:
        """Put the constant back."""
        constant = self._constants.constants.get(op)
        return super().visit_var_(op) if constant is None else constant
