"""Dataflow blocks for modules with control flow."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


def convert_to_dataflow(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with dataflow blocks everywhere but inside of branches, where TVM's FuseOps fails on them."""
    converted = relax.transform.ConvertToDataflow()(module)
    for variable, function in converted.functions_items():
        if isinstance(function, relax.Function):
            converted.update_func(variable, _PlainBranches(converted).visit_expr(function))
    return converted


@mutator
class _PlainBranches(PyExprMutator):
    """Replaces the dataflow blocks inside of branches by plain binding blocks."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self._depth = 0

    def visit_if_(self, op: relax.If) -> relax.Expr:
        self._depth += 1
        branches = [self.visit_with_new_scope(branch) for branch in (op.true_branch, op.false_branch)]
        self._depth -= 1
        return relax.If(self.visit_expr(op.cond), *branches)

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        if self._depth == 0:
            return super().visit_dataflow_block_(block)
        self.builder_._begin_binding_block()
        for binding in block.bindings:
            self.visit_binding(binding)
        return self.builder_._end_block()

    def visit_dataflow_var_def_(self, var: relax.DataflowVar) -> relax.Var:
        if self._depth == 0:
            return super().visit_dataflow_var_def_(var)
        plain = relax.Var(var.name, var.ty)
        self.set_var_remap(var, plain)
        return plain
