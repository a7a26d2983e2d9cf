"""Matrix products and convolutions with operands of another floating-point type, and sums in fp32.

x @ W  ->  cast(x, dtype) @ cast(W, dtype), summed in fp32, cast back to the type that x @ W had. Constant operands are
cast at compile time, so that a 16-bit type halves the bytes of the weights. Everything else keeps its type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import tvm.ir
from tvm import relax

from passes.base import Dataflow, PatternPass, Refusal

_PRODUCTS: dict[str, Callable[..., relax.Expr]] = {
    "relax.matmul": relax.op.matmul,
    "relax.nn.conv1d": relax.op.nn.conv1d,
    "relax.nn.conv2d": relax.op.nn.conv2d,
    "relax.nn.conv3d": relax.op.nn.conv3d,
    "relax.nn.conv1d_transpose": relax.op.nn.conv1d_transpose,
    "relax.nn.conv2d_transpose": relax.op.nn.conv2d_transpose,
    "relax.nn.conv3d_transpose": relax.op.nn.conv3d_transpose,
}
_ATTRIBUTES = ("strides", "padding", "output_padding", "dilation", "groups", "data_layout", "kernel_layout")
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ConvertPrecision(PatternPass[tvm.ir.Call]):
    """Compute matrix products and convolutions with operands of `dtype` (float32, float16 or bfloat16)."""

    name: ClassVar[str] = "convert-precision"
    dtype: str = "bfloat16"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> tvm.ir.Call | None:
        """Match a product of two floating-point tensors."""
        call = dataflow.call(expr, *_PRODUCTS)
        return call if call is not None and all(_dtype(operand) in _FLOATS for operand in call.args) else None

    def check(self, match: tvm.ir.Call, dataflow: Dataflow) -> None:
        """Refuse products that compute in this type already."""
        if self.dtype not in _FLOATS:
            raise Refusal(f"{self.dtype} is not one of {', '.join(_FLOATS)}")
        if all(_dtype(operand) == self.dtype for operand in match.args):
            raise Refusal(f"both operands are {self.dtype} already")

    def rewrite(self, match: tvm.ir.Call) -> relax.Expr:
        """Return the product of the converted operands."""
        operands = [self._converted(operand) for operand in match.args]
        attributes = {name: getattr(match.attrs, name) for name in _ATTRIBUTES if hasattr(match.attrs, name)}
        result = _PRODUCTS[match.op.name](*operands, **attributes, out_dtype="float32")
        original = _dtype(match)
        return result if original == "float32" else relax.op.astype(result, original)

    def _converted(self, operand: relax.Expr) -> relax.Expr:
        if _dtype(operand) == self.dtype:
            return operand
        if isinstance(operand, tvm.ir.GenericConst):
            numpy_type = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
            return relax.const(operand.value.numpy().astype(numpy_type), self.dtype)
        return relax.op.astype(operand, self.dtype)


def _dtype(expr: relax.Expr) -> str:
    return str(expr.ty.dtype.dtype)
