"""Numbers of fp32 rounded and limited to bytes, by an addition in place of a rounding and two conversions.

clip(round(x) + z, low, high) is round(clip(x, low - z, high - z)) + z for an integer z. The sum of a small number and
1.5 * 2**23 is that number rounded to nearest and to even, in the lowest bits of its mantissa (Hacker's Delight, 17-1,
on conversions by addition): as bytes of two's complement they are the result, which narrows with one instruction.
"""

from __future__ import annotations

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

_BYTES = ("int8", "uint8")
_ROUNDS = ("tirx.round", "tirx.nearbyint")
_MAGIC = 1.5 * 2.0**23
# Far below the numbers whose sums with it have no bit left for the units.
_LARGEST = 2.0**20


def round_to_bytes(statement: Stmt) -> Stmt:
    """Return a statement whose casts of rounded and limited fp32 numbers to bytes take fewer instructions."""

    def rounded(cast: tirx.Cast) -> Expr:
        result = _rounded(cast)
        return cast if result is None else result

    return tvm_ffi.structural_map(statement, (tirx.Cast, rounded))


def _rounded(cast: tirx.Cast) -> Expr | None:
    dtype, limited = str(cast.ty.dtype), cast.value
    if dtype not in _BYTES or str(limited.ty.dtype) != "float32":
        return None
    if not isinstance(limited, tirx.Max) or not isinstance(limited.a, tirx.Min):
        return None
    low, high, value = _number(limited.b), _number(limited.a.b), limited.a.a
    zero: float | None = 0.0
    if isinstance(value, tirx.Add) and not isinstance(value.b, ir.Call):
        value, zero = value.a, _number(value.b)
    if low is None or high is None or zero is None or not zero.is_integer() or not isinstance(value, ir.Call):
        return None
    if not isinstance(value.op, ir.Op) or value.op.name not in _ROUNDS or max(-low, high, abs(zero)) > _LARGEST:
        return None
    clipped = tirx.max(tirx.min(value.args[0], _float(high - zero)), _float(low - zero))
    integer = tirx.reinterpret("int32", clipped + _float(_MAGIC))
    return (integer + tirx.const(int(zero), "int32") if zero else integer).astype(dtype)


def _number(value: Expr) -> float | None:
    return float(value.value) if isinstance(value, tirx.FloatImm) else None


def _float(value: float) -> Expr:
    return tirx.const(value, "float32")
