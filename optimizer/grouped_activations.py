"""Activations of group normalizations, computed before the axes of groups and of their channels are joined again.

A group normalization splits the axis of channels, normalizes, and joins the two axes. What reads its result would be a
kernel of its own, whose axes are not those of the normalization: f(reshape(x)) = reshape(f(x)) for an elementwise f
puts it into the same kernel, and the reshape is left with nothing to do but to name the memory.
"""

from __future__ import annotations

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from optimizer.legalization import normalized_groups
from passes.tensor_types import is_one, shape_of

_UNARY = ("clip", "exp", "log", "negative", "sigmoid", "tanh", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu")
_BINARY = ("add", "divide", "maximum", "minimum", "multiply", "subtract")
_ELEMENTWISE = frozenset(f"relax.{name}" for name in (*_UNARY, "nn.silu", *_BINARY))


def activate_groups(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with what is computed of single elements of a group normalization before they are rearranged.

    Operators fire that read results of one group normalization, and single numbers.
    """
    rewriter = _Rewriter(module)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
    return relax.transform.DeadCodeElimination()(rewriter.builder_.get()) if rewriter.grouped else module


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        # What a variable is a reshape of, and the group normalization that this comes from.
        self.grouped: dict[relax.Var, tuple[relax.Expr, relax.Var]] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Bind a group normalization, and what is computed of it, to a reshape of its groups."""
        value = binding.value
        if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op):
            grouped = self._normalized(value, binding.var) or self._computed(value)
            if grouped is not None:
                self.grouped[binding.var] = grouped
                binding = relax.VarBinding(binding.var, relax.op.reshape(grouped[0], binding.var.ty.shape))
        super().visit_var_binding_(binding)

    def _normalized(self, call: tvm.ir.Call, variable: relax.Var) -> tuple[relax.Expr, relax.Var] | None:
        if call.op.name != "relax.nn.group_norm":
            return None
        normalized = normalized_groups(self.builder_, self.visit_expr(call))
        return None if normalized is None else (self.builder_.emit(normalized), variable)

    def _computed(self, call: tvm.ir.Call) -> tuple[relax.Expr, relax.Var] | None:
        sources = [self.grouped[argument] for argument in call.args if argument in self.grouped]
        if call.op.name not in _ELEMENTWISE or not sources or any(not s[1].same_as(sources[0][1]) for s in sources):
            return None
        if not all(argument in self.grouped or _is_number(argument) for argument in call.args):
            return None
        arguments = [self.grouped[a][0] if a in self.grouped else self.visit_expr(a) for a in call.args]
        return self.builder_.emit(relax.Call(call.op, arguments, call.attrs)), sources[0][1]


def _is_number(expr: relax.Expr) -> bool:
    """Return whether an argument is one number of a rank that does not reach beyond the groups' axes."""
    if not isinstance(expr.ty, relax.TensorType):
        return True
    shape = shape_of(expr)
    return shape is not None and all(is_one(extent) for extent in shape)
