"""Dimensions that a function computes from other dimensions."""

from __future__ import annotations

import tvm.ir
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator


def defined_dimensions(function: relax.Function) -> dict[tirx.Var, tvm.ir.Expr]:
    """Return the symbols that a function binds to expressions of other ones, as the importer does for min and max."""
    values: dict[relax.Var, relax.Expr] = {}
    found: dict[tirx.Var, tvm.ir.Expr] = {}

    def call(expr: relax.Expr, operator: str) -> relax.Expr | None:
        value = values.get(expr, expr)
        if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == operator:
            return value.args[0]
        return None

    for block in function.body.blocks:
        for binding in block.bindings:
            values[binding.var] = binding.value
            if not isinstance(binding, relax.MatchCast) or not isinstance(binding.ty, relax.ShapeType):
                continue
            dimensions = binding.ty.values
            if dimensions is None:
                continue
            tensor = call(binding.value, "relax.tensor_to_shape")
            shape = None if tensor is None else call(tensor, "relax.shape_to_tensor")
            if shape is not None and isinstance(shape, relax.ShapeExpr):
                found.update(zip(dimensions, shape.values, strict=True))
    return found


def without_unused_dimensions(function: relax.Function) -> relax.Function:
    """Return the function without the bindings of such symbols that nothing uses."""
    defined = defined_dimensions(function)
    needed = relax.analysis.free_symbolic_vars(_Remover(list(defined)).visit_expr(function))
    unused = [symbol for symbol in defined if not any(symbol.same_as(other) for other in needed)]
    return _Remover(unused).visit_expr(function) if unused else function


@mutator
class _Remover(PyExprMutator):
    """Leaves out the bindings of shapes whose dimensions are all among some symbols."""

    def __init__(self, symbols: list[tirx.Var]) -> None:
        super().__init__()
        self._symbols = symbols

    def visit_match_cast_(self, binding: relax.MatchCast) -> None:
        """Leave out the binding, or visit it."""
        kind = binding.ty
        dimensions = kind.values if isinstance(kind, relax.ShapeType) else None
        if dimensions is None or not all(any(d.same_as(symbol) for symbol in self._symbols) for d in dimensions):
            super().visit_match_cast_(binding)
