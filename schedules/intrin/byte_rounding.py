"""Numbers of fp32 rounded and limited to bytes, by an addition in place of a rounding and two conversions.

clip(round(x) + z, low, high) is round(clip(x, low - z, high - z)) + z for an integer z. The sum of a small number and
1.5 * 2**23 is that number rounded to nearest and to even, in the lowest bits of its mantissa (Hacker's Delight, 17-1,
on conversions by addition): as bytes of two's complement they are the result, which narrows with one instruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.byte_dot import WORD

_BYTES = ("int8", "uint8")
_ROUNDS = ("tirx.round", "tirx.nearbyint")
_MAGIC = 1.5 * 2.0**23
# Far below the numbers whose sums with it have no bit left for the units.
_LARGEST = 2.0**20
# Zero points may be added in 16 bits.
_LARGEST_ZERO = 2**14


@dataclass(frozen=True, eq=False)
class Rounding:
    """The byte clip(round(value) + zero, low, high) of a number of fp32; all but `value` are whole numbers.

    `dtype` is that of the byte, or the wider one that it is stored as. `zero` is of int32, and no larger than
    _LARGEST_ZERO: a constant, or a zero point that is read.
    """

    dtype: str
    value: Expr
    zero: Expr
    low: int
    high: int

    @property
    def _limited(self) -> Expr:
        low, high = ((tirx.const(limit, "int32") - self.zero).astype("float32") for limit in (self.low, self.high))
        return tirx.max(tirx.min(self.value, high), low)

    def by_addition(self) -> Expr:
        """Return the byte."""
        integer = tirx.reinterpret("int32", self._limited + _float(_MAGIC))
        return (integer + self.zero).astype(self.dtype)

    def as_float(self, shift: Expr) -> Expr:
        """Return the byte less a whole number, of int32, as a number of fp32."""
        whole = tirx.nearbyint(self._limited)
        if tvm_ffi.structural_equal(shift, self.zero):
            return whole
        return whole - (shift - self.zero).astype("float32")


def round_to_bytes(statement: Stmt) -> Stmt:
    """Return a statement whose casts of rounded and limited fp32 numbers to bytes take fewer instructions."""

    def rounded(cast: tirx.Cast) -> Expr:
        found = rounding_of(cast)
        return cast if found is None else found.by_addition()

    return tvm_ffi.structural_map(statement, (tirx.Cast, rounded))


def rounded_in_floats(value: Expr) -> Expr:
    """Return an expression with equal numbers in which none is rounded to a byte and becomes a number again.

    One instruction leaves a limited number whole, in place of four that make a byte of it and a number of that.
    """

    def kept(cast: tirx.Cast) -> Expr:
        whole = cast.value
        if str(cast.ty.dtype) != "float32" or str(whole.ty.dtype) != "int32":
            return cast
        shift: Expr = tirx.const(0, "int32")
        if isinstance(whole, tirx.Sub) and (isinstance(whole.b, tirx.IntImm) or _is_zero_point(whole.b)):
            whole, shift = whole.a, whole.b
        found = rounding_of(whole.value) if isinstance(whole, tirx.Cast) else None
        return cast if found is None else found.as_float(shift)

    return tvm_ffi.structural_map(value, (tirx.Cast, kept))


def rounding_of(cast: Expr) -> Rounding | None:
    """Return what a cast of a rounded and limited number to a byte computes, None for any other expression."""
    if not isinstance(cast, tirx.Cast):
        return None
    if str(cast.ty.dtype) == WORD:
        found = rounding_of(cast.value)
        return None if found is None else replace(found, dtype=WORD)
    dtype, limited = str(cast.ty.dtype), cast.value
    if dtype not in _BYTES or str(limited.ty.dtype) != "float32":
        return None
    if not isinstance(limited, tirx.Max) or not isinstance(limited.a, tirx.Min):
        return None
    low, high, value = _whole(limited.b), _whole(limited.a.b), limited.a.a
    zero: Expr | None = tirx.const(0, "int32")
    if isinstance(value, tirx.Add) and not isinstance(value.b, ir.Call):
        value, zero = value.a, _zero_point(value.b)
    if low is None or high is None or zero is None or not isinstance(value, ir.Call):
        return None
    if not isinstance(value.op, ir.Op) or value.op.name not in _ROUNDS or max(-low, high) > _LARGEST:
        return None
    return Rounding(dtype, value.args[0], zero, low, high)


def _zero_point(value: Expr) -> Expr | None:
    """Return what is added to a rounded number as an integer."""
    constant = _whole(value)
    if constant is not None:
        return tirx.const(constant, "int32") if abs(constant) <= _LARGEST_ZERO else None
    if isinstance(value, tirx.Cast) and _is_zero_point(value.value):
        return value.value
    return None


def _is_zero_point(value: Expr) -> bool:
    """Return whether a value is the byte of a tensor without axes as int32, as shared kernels read it."""
    if not isinstance(value, tirx.Cast) or str(value.ty.dtype) != "int32":
        return False
    read = value.value
    return isinstance(read, ir.TensorLoad) and not read.indices and str(read.source.dtype) in _BYTES


def _whole(value: Expr) -> int | None:
    """Return a constant that is a whole number."""
    number = float(value.value) if isinstance(value, tirx.FloatImm) else math.nan
    return int(number) if number.is_integer() else None


def _float(value: float) -> Expr:
    return tirx.const(value, "float32")
