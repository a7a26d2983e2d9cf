"""In what precision an operator is computed, where that differs from the type of its input."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from optimizer.frontend.node import Node
from optimizer.frontend.value import Value

HALF_TYPES = ("float16", "bfloat16")


def in_float32(node: Node, value: Value, function: Callable[[relax.Expr], relax.Expr]) -> relax.Expr:
    """Return `function` of a value; 16-bit floats are computed in float32 and rounded once, at the end."""
    if value.dtype not in HALF_TYPES:
        return function(value.expr)
    widened = node.emit(relax.op.astype(value.expr, "float32"))
    return relax.op.astype(node.emit(function(widened.expr)).expr, value.dtype)


def is_float(dtype: str) -> bool:
    """Return whether a dtype is a floating-point one."""
    return "float" in dtype


def is_unsigned(dtype: str) -> bool:
    """Return whether a dtype is an unsigned integer."""
    return dtype.startswith("uint")


__all__ = ["HALF_TYPES", "in_float32", "is_float", "is_unsigned"]
