"""The dtype in which sums, means and products are computed, and casts to and from it."""

from __future__ import annotations

from tvm import relax


def accumulation_dtype(dtype: str) -> str:
    """Return the dtype that elements of a floating-point `dtype` are summed in: at least float32."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def cast(expr: relax.Expr, dtype: str, wanted: str) -> relax.Expr:
    """Return `expr`, whose elements are of `dtype`, as `wanted`."""
    return expr if dtype == wanted else relax.op.astype(expr, wanted)
