"""What the type of an expression says: dtype and shape, and whether two shapes are equal for all symbols."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import tvm.ir
import tvm.sym
from tvm import relax, tirx

Dimension = tvm.ir.Expr

_NARROW_FLOATS = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def dtype_of(expr: relax.Expr) -> str | None:
    """Return the dtype of a tensor, or None for anything else."""
    if not isinstance(expr.ty, relax.TensorType) or expr.ty.dtype is None:
        return None
    return str(expr.ty.dtype.dtype)


def shape_of(expr: relax.Expr) -> tuple[Dimension, ...] | None:
    """Return the dimensions of a tensor, or None where they are not known."""
    if not isinstance(expr.ty, relax.TensorType) or not isinstance(expr.ty.shape, relax.ShapeExpr):
        return None
    return tuple(expr.ty.shape.values)


def known_shape(expr: relax.Expr) -> list[Dimension]:
    """Return the dimensions of a tensor; raises ValueError where they are not known."""
    shape = shape_of(expr)
    if shape is None:
        raise ValueError(f"the shape of {expr} is not known")
    return list(shape)


def is_float(dtype: str | None) -> bool:
    """Return whether a dtype is one of floating-point numbers."""
    return dtype is not None and dtype.startswith(("float", "bfloat"))


def is_integer(dtype: str | None) -> bool:
    """Return whether a dtype is one of integers, which wrap around."""
    return dtype is not None and dtype.startswith(("int", "uint"))


def numpy_dtype(dtype: str) -> np.dtype:
    """Return numpy's dtype of the same name."""
    return np.dtype(getattr(ml_dtypes, dtype) if dtype in _NARROW_FLOATS else dtype)


def equal(left: Dimension | int, right: Dimension | int) -> bool:
    """Return whether two dimensions are equal for all values of their symbols."""
    return tvm.sym.Analyzer().can_prove_equal(_expression(left), _expression(right))


def _expression(dimension: Dimension | int) -> Dimension:
    return tirx.IntImm("int64", dimension) if isinstance(dimension, int) else dimension


def is_one(dimension: Dimension | int) -> bool:
    """Return whether a dimension is the number 1."""
    return isinstance(dimension, tirx.IntImm | int) and int(dimension) == 1


def equal_shapes(left: Sequence[Dimension] | None, right: Sequence[Dimension] | None) -> bool:
    """Return whether two shapes are known and equal."""
    if left is None or right is None or len(left) != len(right):
        return False
    return all(equal(a, b) for a, b in zip(left, right, strict=True))


def same_type(left: relax.Expr, right: relax.Expr) -> bool:
    """Return whether two tensors have the same dtype and the same known shape."""
    return dtype_of(left) == dtype_of(right) is not None and equal_shapes(shape_of(left), shape_of(right))


def constant_of(expr: relax.Expr) -> np.ndarray | None:
    """Return the value of a constant tensor."""
    return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None


def constant(array: np.ndarray, dtype: str | None = None) -> relax.Expr:
    """Return a constant tensor."""
    return relax.const(np.ascontiguousarray(array), dtype or array.dtype.name)


def kept_axes(reduction: relax.Expr) -> tuple[int, ...] | None:
    """Return the axes of a reduction that keeps them with length 1, as non-negative numbers; None for any other."""
    if not isinstance(reduction, tvm.ir.Call) or not reduction.attrs.keepdims:
        return None
    rank = reduction.args[0].ty.ndim
    if reduction.attrs.axis is None:
        return tuple(range(rank))
    return tuple(sorted(int(axis) % rank for axis in reduction.attrs.axis))
