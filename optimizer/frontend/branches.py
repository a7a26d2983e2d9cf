"""Dataflow blocks for modules with control flow, in which passes and fusion see every operator.

TVM's fusion fails on dataflow blocks inside of a branch. So what a branch computes becomes a private function,

    if c: x + y  else: x   ->   if c: f(x, y)  else: x      with f(x, y) = x + y

and every function consists of dataflow blocks around its branches. The symbols of its surroundings that a branch uses
are passed as one shape, so that its comparisons with them stay comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tvm
import tvm.ir
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator


def convert_to_dataflow(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with functions for its branches, and dataflow blocks around them.

    TVM's own pass is not used: it folds away every match_cast between symbols that are already bound, and with it the
    check that two dimensions are equal.
    """
    outliner = _Outliner(module)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            outliner.builder_.update_func(variable, outliner.outlined(function))
    outlined = outliner.builder_.get()
    for variable, function in outlined.functions_items():
        if isinstance(function, relax.Function):
            outlined.update_func(variable, _in_dataflow(outlined, function))
    return relax.transform.Normalize()(outlined)  # gives every expression its type


@mutator
class _Outliner(PyExprMutator):
    """Replaces what the branches of relax.If compute by calls of functions."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self._known: dict[tirx.Var, None] = {}  # the symbols that are bound where the visit stands, in order

    def outlined(self, function: relax.Function) -> relax.Function:
        """Return the function with calls in the place of what its branches compute."""
        self._known = dict.fromkeys(_symbols(parameter.ty for parameter in function.params))
        return self.visit_expr(function)

    def visit_match_cast_(self, binding: relax.MatchCast) -> None:
        """Note the symbols that are bound here."""
        super().visit_match_cast_(binding)
        self._known.update(dict.fromkeys(_symbols([binding.ty])))

    def visit_if_(self, op: relax.If) -> relax.Expr:
        """Replace both branches, those inside of them first."""
        condition, outside, branches = self.visit_expr(op.cond), dict(self._known), []
        for branch in (op.true_branch, op.false_branch):
            inner = self.visit_with_new_scope(branch)
            self._known = dict(outside)
            branches.append(self._called(inner))
        return relax.If(condition, *branches)

    def _called(self, branch: relax.SeqExpr) -> relax.SeqExpr:
        """Return a branch that calls a function of its content, or `branch` if that computes nothing."""
        bindings = [binding for block in branch.blocks for binding in block.bindings]
        if not any(_computes(binding) for binding in bindings):
            return branch
        captured = [variable for variable in relax.analysis.free_vars(branch) if not _is_symbol(variable)]
        occurring = {*_symbols_within(branch), *_symbols(variable.ty for variable in captured)}
        symbols = [symbol for symbol in self._known if symbol in occurring]
        sizes = [relax.Var("sizes", relax.ShapeType(symbols))] if symbols else []
        function = relax.utils.copy_with_new_vars(relax.Function([*sizes, *captured], branch))
        name = self.builder_.get_unique_name("branch")
        called = self.builder_.add_func(function, name)
        arguments = [*([relax.ShapeExpr(symbols)] if symbols else []), *captured]
        self.builder_._begin_binding_block()
        result = self.builder_.emit(tvm.ir.Call(called, arguments))
        return relax.SeqExpr([self.builder_._end_block()], result)


def _computes(binding: relax.Binding) -> bool:
    """Return whether a binding is worth a function: a call of an operator."""
    return (
        isinstance(binding, relax.VarBinding)
        and isinstance(binding.value, tvm.ir.Call)
        and isinstance(binding.value.op, tvm.ir.Op)
    )


def _symbols(types: Iterable[tvm.ir.Type]) -> list[tirx.Var]:
    """Return the symbols in types, in order of their first occurrence."""
    return list(dict.fromkeys(symbol for kind in types for symbol in relax.analysis.tir_vars_in_type(kind)))


def _is_symbol(variable: relax.Var) -> bool:
    return isinstance(variable.ty, tvm.ir.PrimType)


def _symbols_within(branch: relax.SeqExpr) -> list[tirx.Var]:
    """Return all symbols that occur in a branch, bound there or not."""
    function = relax.Function([], branch)
    return [*relax.analysis.defined_symbolic_vars(function), *relax.analysis.free_symbolic_vars(function)]


def _in_dataflow(module: tvm.IRModule, function: relax.Function) -> relax.Function:
    """Return a function whose bindings stand in dataflow blocks, but for those of relax.If."""
    blocks: list[list[relax.Binding]] = []
    for binding in (binding for block in function.body.blocks for binding in block.bindings):
        if not blocks or _is_if(binding) or _is_if(blocks[-1][-1]):
            blocks.append([])
        blocks[-1].append(binding)
    body = _DataflowBlocks(module).converted(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _is_if(binding: relax.Binding) -> bool:
    return isinstance(binding, relax.VarBinding) and isinstance(binding.value, relax.If)


@mutator
class _DataflowBlocks(PyExprMutator):
    """Makes dataflow variables of those that only their own block reads."""

    def converted(self, blocks: Sequence[Sequence[relax.Binding]], result: relax.Expr) -> relax.SeqExpr:
        """Return blocks of bindings as dataflow blocks, and those that hold a relax.If as they are."""
        reading = [{variable for binding in block for variable in _read(binding)} for block in blocks]
        made: list[relax.BindingBlock] = []
        for position, block in enumerate(blocks):
            outside = set(relax.analysis.free_vars(result)).union(*reading[position + 1 :])
            if _is_if(block[0]):
                made.append(relax.BindingBlock([self._binding(block[0], block[0].var)]))
                continue
            bindings: list[relax.Binding] = []
            for binding in block:
                own = binding.var
                if own not in outside:
                    own = relax.DataflowVar(own.name, own.ty)
                bindings.append(self._binding(binding, own))
                self.set_var_remap(binding.var, own)
            made.append(relax.DataflowBlock(bindings))
        return relax.SeqExpr(made, self.visit_expr(result))

    def _binding(self, binding: relax.Binding, variable: relax.Var) -> relax.Binding:
        value = self.visit_expr(binding.value)
        if isinstance(binding, relax.MatchCast):
            return relax.MatchCast(variable, value, binding.ty)
        return relax.VarBinding(variable, value)


def _read(binding: relax.Binding) -> list[relax.Var]:
    return list(relax.analysis.free_vars(binding.value))
