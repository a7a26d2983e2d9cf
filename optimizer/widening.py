"""Tensors of 16 bits widened where they are read.

Passes share one widened tensor between all that read it. Fused to what rounded it, it is what is stored: twice the
bytes, and each reader takes twice as many. Widened by each reader for itself, it costs an instruction in its kernel.
"""

from __future__ import annotations

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.tensor_types import dtype_of

_NARROW = frozenset({"float16", "bfloat16"})
_WIDE = "float32"


def widen_at_readers(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with conversions from 16-bit floats to fp32 made anew for each call that reads them."""
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            result.update_func(variable, _Widening(module).visit_expr(function))
    return relax.transform.DeadCodeElimination()(result)


@mutator
class _Widening(PyExprMutator):
    """Repeats conversions before what reads them, beyond the first reader."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self._widened: dict[relax.Var, tvm.ir.Call] = {}
        self._read: set[relax.Var] = set()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Bind a value that reads widenings of its own."""
        if _widens(binding.value):
            self._widened[binding.var] = binding.value
        elif isinstance(binding.value, tvm.ir.Call):
            own = [self._own(argument) for argument in binding.value.args]
            if any(new is not old for new, old in zip(own, binding.value.args, strict=True)):
                value = binding.value
                call = tvm.ir.Call(value.op, own, value.attrs, value.ty_args, value.span)
                binding = relax.VarBinding(binding.var, self.builder_.normalize(call))
        super().visit_var_binding_(binding)

    def _own(self, argument: relax.Expr) -> relax.Expr:
        """Return an argument, or a widening like it that nothing else reads."""
        if isinstance(argument, relax.Tuple):
            fields = [self._own(value) for value in argument.fields]
            same = all(new is old for new, old in zip(fields, argument.fields, strict=True))
            return argument if same else relax.Tuple(fields)
        if not isinstance(argument, relax.Var) or argument not in self._widened:
            return argument
        if argument not in self._read:
            self._read.add(argument)
            return argument
        return self.builder_.emit(self.visit_expr(self._widened[argument]), argument.name)


def _widens(value: relax.Expr) -> bool:
    if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.Op) or value.op.name != "relax.astype":
        return False
    return dtype_of(value) == _WIDE and dtype_of(value.args[0]) in _NARROW
