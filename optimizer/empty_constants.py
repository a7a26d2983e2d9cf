"""Constants of no elements, made at run time: TVM writes them into an executable, but cannot read them back."""

from __future__ import annotations

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.tensor_types import constant_of, dtype_of


def make_empty_constants(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with zeros of the same shape in the place of constants that have no elements."""
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            result.update_func(variable, _Maker(module).visit_expr(function))
    return result


@mutator
class _Maker(PyExprMutator):
    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> relax.Expr:
        """Replace a tensor without elements."""
        array = constant_of(op) if isinstance(op.ty, relax.TensorType) else None
        if array is None or array.size:
            return op
        return self.builder_.emit(relax.op.zeros(list(array.shape), dtype_of(op) or ""))
