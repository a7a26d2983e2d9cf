"""Conversion to and from the 8-bit floats of ONNX, which TVM's own casts get wrong.

Formats: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433 (E4M3, E5M2); Noune et al., "8-bit
Numerical Formats for Deep Neural Networks", arXiv 2206.02915 (FNUZ); OCP Microscaling Formats v1.0 (E8M0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.node import Node
from optimizer.frontend.value import TensorValue, Value, numpy_dtype

_MANTISSA_BITS = 23  # of float32
_BIAS = 127
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class _Format:
    """A format with sign: its mantissa bits, its smallest normal exponent, and the codes of its special values."""

    mantissa_bits: int
    least_exponent: int
    greatest: int
    overflow: int  # where nothing saturates: infinity, or NaN where there is none
    nan: int
    signed_specials: bool  # NaN has a sign and there is a negative zero


_FORMATS = {
    "float8_e4m3fn": _Format(3, -6, 0x7E, 0x7F, 0x7F, True),
    "float8_e4m3fnuz": _Format(3, -7, 0x7F, 0x80, 0x80, False),
    "float8_e5m2": _Format(2, -14, 0x7B, 0x7C, 0x7E, True),
    "float8_e5m2fnuz": _Format(2, -15, 0x7F, 0x80, 0x80, False),
}
_POWERS_OF_TWO = "float8_e8m0fnu"
FLOAT8_TYPES = (*_FORMATS, _POWERS_OF_TWO)


def from_float8(node: Node, value: Value) -> TensorValue:
    """Return the float32 value of each 8-bit float, looked up in a table."""
    table = np.arange(256, dtype=np.uint8).view(numpy_dtype(value.dtype)).astype(np.float32)

    def looked_up(codes: te.Tensor, values: te.Tensor) -> te.Tensor:
        return te.compute(
            codes.shape,
            lambda *index: values[tirx.reinterpret("uint8", codes[index]).astype("int32")],
            name="from_float8",
        )

    return node.compute(looked_up, value.expr, relax.const(table))


def to_float8(node: Node, value: Value, dtype: str) -> TensorValue:
    """Return `value` rounded to an 8-bit float by the rules of the node's attributes `saturate` and `round_mode`."""
    wide = value.expr if value.dtype == "float32" else node.emit(relax.op.astype(value.expr, "float32")).expr
    saturate = bool(node.integer("saturate", 1))
    round_mode = node.string("round_mode", "up")
    if dtype == _POWERS_OF_TWO and not saturate:
        raise node.unsupported("a cast to float8_e8m0 without saturation is not supported")

    def encoded(tensor: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tvm.ir.Expr:
            bits = tirx.reinterpret("uint32", tensor[index])
            if dtype == _POWERS_OF_TWO:
                code = _power_of_two_code(bits, round_mode)
            else:
                code = _code(bits, _FORMATS[dtype], saturate)
            return tirx.reinterpret(dtype, code.astype("uint8"))

        return te.compute(tensor.shape, element, name="to_float8")

    return node.compute(encoded, wide)


def _code(bits: tvm.ir.Expr, form: _Format, saturate: bool) -> tvm.ir.Expr:
    """Return the 8-bit code of the float32 with these bits, rounded half to even."""
    magnitude = bits & _uint32(_MAGNITUDE)
    sign = bits >> _uint32(31)
    least = _uint32(_BIAS + form.least_exponent)
    # The magnitude in units of the last place of its binade, or of the subnormal numbers.
    exponent = tirx.min(tirx.max(magnitude >> _uint32(_MANTISSA_BITS), least), _uint32(2 * _BIAS - 1))
    scale = (_uint32(2 * _BIAS + form.mantissa_bits) - exponent) << _uint32(_MANTISSA_BITS)
    units = tirx.reinterpret("float32", magnitude) * tirx.reinterpret("float32", scale)
    finite = tirx.Select(magnitude < _uint32(_INFINITY), units, tirx.const(0, "float32"))
    rounded = tirx.nearbyint(finite).astype("uint32")
    code = rounded + ((exponent - least) << _uint32(form.mantissa_bits))
    too_large = tirx.any(code > _uint32(form.greatest), magnitude == _uint32(_INFINITY))
    is_nan = magnitude > _uint32(_INFINITY)
    beyond = form.greatest if saturate else form.overflow
    code = tirx.Select(is_nan, _uint32(form.nan), tirx.Select(too_large, _uint32(beyond), code))
    signed = code | (sign << _uint32(7))
    if form.signed_specials:
        return signed
    return tirx.Select(tirx.any(code == _uint32(0), code == _uint32(form.nan)), code, signed)


def _power_of_two_code(bits: tvm.ir.Expr, round_mode: str) -> tvm.ir.Expr:
    """Return the biased exponent of a positive float32, which is its code, rounded up, down or to nearest."""
    exponent = (bits & _uint32(_MAGNITUDE)) >> _uint32(_MANTISSA_BITS)
    fraction = bits & _uint32((1 << _MANTISSA_BITS) - 1)
    half = 1 << (_MANTISSA_BITS - 1)
    step = {
        "up": fraction > _uint32(0),
        "down": tirx.const(False, "bool"),
        # Ties go up, except from the subnormal numbers.
        "nearest": tirx.any(fraction > _uint32(half), tirx.all(fraction == _uint32(half), exponent > _uint32(0))),
    }[round_mode]
    code = tirx.min(exponent + tirx.Select(step, _uint32(1), _uint32(0)), _uint32(254))
    is_nan = tirx.all(exponent == _uint32(255), fraction > _uint32(0))
    return tirx.Select(is_nan, _uint32(255), code)


def _uint32(number: int) -> tvm.ir.Expr:
    return tirx.const(number, "uint32")


__all__ = ["FLOAT8_TYPES", "from_float8", "to_float8"]
