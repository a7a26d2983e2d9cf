"""The four 8-bit floating-point types of ONNX, converted bit by bit (TVM's own casts of them are wrong on CPUs).

Layouts and rounding: "FP8 Formats for Deep Learning", arXiv 2209.05433, and arXiv 2206.02915 for the `fnuz` types.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import te, tirx


@dataclass(frozen=True)
class Float8:
    """A format: 1 sign bit, exponent, `mantissa` bits. `largest` is the code of the largest finite number."""

    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    nan: int
    unsigned_zero: bool  # fnuz: there is no -0, its code is the only NaN


FLOAT8_FORMATS = {
    "float8_e4m3fn": Float8(mantissa=3, bias=7, largest=0x7E, infinity=None, nan=0x7F, unsigned_zero=False),
    "float8_e4m3fnuz": Float8(mantissa=3, bias=8, largest=0x7F, infinity=None, nan=0x80, unsigned_zero=True),
    "float8_e5m2": Float8(mantissa=2, bias=15, largest=0x7B, infinity=0x7C, nan=0x7F, unsigned_zero=False),
    "float8_e5m2fnuz": Float8(mantissa=2, bias=16, largest=0x7F, infinity=None, nan=0x80, unsigned_zero=True),
}
_FLOAT32_MANTISSA, _FLOAT32_BIAS = 23, 127


def decode(element: tirx.Expr, dtype: str) -> tirx.Expr:
    """Return a float32 expression of the value of `element`, which is of the 8-bit `dtype`."""
    layout = FLOAT8_FORMATS[dtype]
    code = tirx.Cast("int64", tirx.reinterpret("uint8", element))
    magnitude = code & _bits(0x7F)
    shift = _FLOAT32_MANTISSA - layout.mantissa
    bits = (magnitude << _bits(shift)) + _bits((_FLOAT32_BIAS - layout.bias) << _FLOAT32_MANTISSA)
    fraction = magnitude & _bits((1 << layout.mantissa) - 1)
    subnormal = tirx.Cast("float32", fraction) * tirx.const(2.0 ** (1 - layout.bias - layout.mantissa), "float32")
    is_subnormal = magnitude < _bits(1 << layout.mantissa)
    value = tirx.Select(is_subnormal, subnormal, _float32(bits))
    if layout.infinity is not None:
        value = tirx.Select(magnitude == _bits(layout.infinity), tirx.const(float("inf"), "float32"), value)
    value = tirx.Select(code >= _bits(0x80), -value, value)
    is_nan = code == _bits(layout.nan) if layout.unsigned_zero else magnitude > _bits(layout.infinity or layout.largest)
    return tirx.Select(is_nan, tirx.const(float("nan"), "float32"), value)


def encode(value: tirx.Expr, dtype: str, *, saturate: bool) -> tirx.Expr:
    """Return the float32 `value` as the 8-bit `dtype`, rounded half to even.

    What is out of range becomes the largest finite number with `saturate`, else infinity, or NaN where the type has
    no infinity. NaN stays NaN.
    """
    layout = FLOAT8_FORMATS[dtype]
    bits = tirx.Cast("int64", tirx.reinterpret("uint32", value))
    magnitude = bits & _bits(0x7FFFFFFF)
    shift = _FLOAT32_MANTISSA - layout.mantissa
    odd = (magnitude >> _bits(shift)) & _bits(1)
    rounded = (magnitude + _bits((1 << (shift - 1)) - 1) + odd) >> _bits(shift)
    normal = rounded - _bits((_FLOAT32_BIAS - layout.bias) << layout.mantissa)
    is_small = magnitude < _bits((_FLOAT32_BIAS + 1 - layout.bias) << _FLOAT32_MANTISSA)
    small = tirx.Select(is_small, _float32(magnitude), tirx.const(0, "float32"))
    steps = te.nearbyint(small * tirx.const(2.0 ** (layout.bias + layout.mantissa - 1), "float32"))
    code = tirx.Select(is_small, tirx.Cast("int64", steps), normal)
    overflow = layout.nan if layout.infinity is None else layout.infinity
    beyond = layout.largest if saturate else overflow
    code = tirx.Select(code > _bits(layout.largest), _bits(beyond), code)
    negative = bits >= _bits(0x80000000)
    if layout.unsigned_zero:
        negative = tirx.all(negative, code > _bits(0))
    code = tirx.Select(negative, code | _bits(0x80), code)
    is_nan = magnitude > _bits(0xFF << _FLOAT32_MANTISSA)
    code = tirx.Select(is_nan, _bits(layout.nan), code)
    return tirx.reinterpret(dtype, tirx.Cast("uint8", code))


def _bits(number: int) -> tirx.Expr:
    """Return a constant for bit arithmetic, which is in int64: call_te widens int32, and mishandles uint32."""
    return tirx.const(number, "int64")


def _float32(bits: tirx.Expr) -> tirx.Expr:
    return tirx.reinterpret("float32", tirx.Cast("uint32", bits))
