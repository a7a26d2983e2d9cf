"""Dimensions that a function binds to expressions of others, and only those."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax, tirx
from tvm.relax import op

from passes.defined_dimensions import defined_dimensions, without_unused_dimensions

_LENGTH, _LONGER = tirx.Var("length", "int64"), tirx.Var("longer", "int64")


def _function(computed: Callable[[relax.Expr], relax.Expr] | None = None, *, is_used: bool = False) -> relax.Function:
    """Return a function that binds a symbol to a length and one, or what is `computed` of them."""
    x = relax.Var("x", relax.TensorType((_LENGTH,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        shape = builder.emit(op.shape_to_tensor(relax.ShapeExpr([_LENGTH + 1])))
        tensor = shape if computed is None else builder.emit(computed(shape))
        builder.match_cast(builder.emit(op.tensor_to_shape(tensor)), relax.ShapeType([_LONGER]))
        result = builder.emit(op.zeros((_LONGER,), "float32") if is_used else op.exp(x))
        builder.emit_func_output(result)
    return builder.get()["main"]


def _match_casts(function: relax.Function) -> int:
    return sum(isinstance(binding, relax.MatchCast) for block in function.body.blocks for binding in block.bindings)


def test_a_dimension_is_the_expression_that_its_shape_is_made_of() -> None:
    ((symbol, expression),) = defined_dimensions(_function()).items()
    assert symbol.same_as(_LONGER)
    tvm.ir.assert_structural_equal(expression, _LENGTH + 1, map_free_vars=True)


def test_what_a_tensor_computed_of_a_shape_says_is_not_known() -> None:
    assert defined_dimensions(_function(op.abs)) == {}


def test_dimensions_that_nothing_uses_are_left_out() -> None:
    assert _match_casts(without_unused_dimensions(_function())) == 0
    used = _function(is_used=True)
    assert without_unused_dimensions(used).same_as(used)
    unknown = _function(op.abs)
    assert without_unused_dimensions(unknown).same_as(unknown)
