"""Activations that are rounded to bfloat16 where they are computed, with the arithmetic that its few digits need."""

from __future__ import annotations

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr

from schedules.intrin.register_tables import gelu_to_round
from schedules.intrin.vector_math import Function

_HALF, _ROOT_HALF = 0.5, 0.5**0.5


def to_round(value: Expr) -> tuple[Expr, Function]:
    """Return what to compute of an fp32 expression lane by lane, and what makes of that vector the one to round."""
    argument = _gelu(value)
    return (value, lambda computed: computed) if argument is None else (argument, gelu_to_round)


def _gelu(value: Expr) -> Expr | None:
    """Return x where `value` is x (1/2 + erf(x sqrt(1/2)) / 2) in fp32, as TVM writes it; None for another."""
    if not isinstance(value, tirx.Mul) or str(value.ty.dtype) != "float32":
        return None
    argument, factor = value.a, value.b
    if not isinstance(factor, tirx.Add) or not _is_constant(factor.a, _HALF):
        return None
    half = factor.b
    if not isinstance(half, tirx.Mul) or not _is_constant(half.b, _HALF) or not isinstance(half.a, ir.Call):
        return None
    function = half.a.op
    if not isinstance(function, ir.Op) or function.name != "tirx.erf":
        return None
    scaled = half.a.args[0]
    if not isinstance(scaled, tirx.Mul) or not _is_constant(scaled.b, _ROOT_HALF):
        return None
    return argument if tvm_ffi.structural_equal(scaled.a, argument) else None


def _is_constant(value: Expr, wanted: float) -> bool:
    return isinstance(value, tirx.FloatImm) and abs(float(value.value) - wanted) < 2.0**-24
