"""The scales between an integer sum and the codes that it is rounded to, folded into one multiplication and addition.

    round((float(x - z) * s + b) * c)           =  round(float(x) * (s * c) + (b - z * s) * c)
    round((float(x) * s + DQ(y, t, u)) * c)     =  round(float(x) * (s * c) + DQ(y, t * c, u))
    round(relu(v) * c), round(clip(v, l, h) * c)    likewise, for a positive c

    (x - z) + b                                 =  x - (z - b)                      for z, b of int32, exactly

for constants z, s, b, c, t, u. Numbers are rounded once instead of two or three times; one on the border of two codes
may go to the other. Limits that the codes have anyway are left out:

    clip(round(clip(v, l, h)) + u, low, high)   =  clip(round(v) + u, low, high)    with l, h rounded beyond low, high
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm.ir
from numpy.typing import NDArray
from tvm import relax

from passes.base import Dataflow
from passes.rule_pass import Rule, RulePass
from passes.tensor_types import constant, constant_of, dtype_of

_Scaled = Callable[[tvm.ir.Call, float, Dataflow], relax.Expr | None]


def _folded(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """Return a rounding of a scaled sum of scaled integers whose scales are one."""
    product = dataflow.call(call.args[0], "relax.multiply")
    factor = None if product is None else _positive(product.args[1])
    if product is None or factor is None or not dataflow.read_once(call.args[0]):
        return None
    scaled = _scaled(product.args[0], factor, dataflow)
    return None if scaled is None else relax.op.round(scaled)


def _limited(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """Return limited codes whose numbers were limited to more before they were rounded, without the latter."""
    low, high, zero, value = float(call.args[1].value), float(call.args[2].value), 0.0, call.args[0]
    shifted = dataflow.call(value, "relax.add")
    if shifted is not None:
        offset = constant_of(shifted.args[1])
        if offset is None or offset.size != 1 or not float(offset.item()).is_integer():
            return None
        zero, value = float(offset.item()), shifted.args[0]
    whole = dataflow.call(value, "relax.round")
    inner = None if whole is None else dataflow.call(whole.args[0], "relax.clip", "relax.nn.relu")
    if inner is None or dtype_of(call) != "float32":
        return None
    bounds = (0.0, np.inf) if inner.op.name == "relax.nn.relu" else tuple(float(each.value) for each in inner.args[1:])
    if np.rint(np.float32(bounds[0])) > low - zero or np.rint(np.float32(bounds[1])) < high - zero:
        return None
    rounded = relax.op.round(inner.args[0])
    return relax.op.clip(rounded if shifted is None else relax.op.add(rounded, shifted.args[1]), low, high)


def _corrected_once(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """Return an integer sum to which a bias is added with the bias in the correction that is taken from it."""
    bias, difference = constant_of(call.args[1]), dataflow.call(call.args[0], "relax.subtract")
    if bias is None or difference is None or dtype_of(call) != "int32" or not dataflow.read_once(call.args[0]):
        return None
    correction = constant_of(difference.args[1])
    if correction is None:
        return None
    joined = np.subtract(correction, bias, dtype=np.int32)
    if joined.size > max(correction.size, bias.size):
        return None  # one of each row and one of each column
    return relax.op.subtract(difference.args[0], constant(joined))


def _scaled(expr: relax.Expr, factor: float, dataflow: Dataflow) -> relax.Expr | None:
    """Return `expr` times a positive factor, where that takes no operation more; None where it would."""
    array = constant_of(dataflow.producer(expr))
    if array is not None:
        return _constant(array.astype(np.float64) * factor)
    call = dataflow.call(expr, *_SCALED)
    if call is None or dtype_of(call) != "float32":
        return None
    if call.op.name != "relax.dequantize" and not dataflow.read_once(expr):
        return None
    return _SCALED[call.op.name](call, factor, dataflow)


def _scaled_product(call: tvm.ir.Call, factor: float, dataflow: Dataflow) -> relax.Expr | None:
    """Scale the integers of a sum, less what is constant for each output, which is taken from the result instead."""
    scales, integers = constant_of(call.args[1]), dataflow.call(call.args[0], "relax.astype")
    if scales is None or integers is None or dtype_of(integers.args[0]) != "int32":
        return None
    new = scales.astype(np.float64) * factor
    difference = dataflow.call(integers.args[0], "relax.subtract")
    correction = None if difference is None else constant_of(difference.args[1])
    if difference is None or correction is None or not dataflow.read_once(integers.args[0]):
        return relax.op.multiply(call.args[0], _constant(new))
    product = relax.op.multiply(relax.op.astype(difference.args[0], "float32"), _constant(new))
    return relax.op.add(product, _constant(-correction.astype(np.float64) * new))


def _scaled_sum(call: tvm.ir.Call, factor: float, dataflow: Dataflow) -> relax.Expr | None:
    left, right = (_scaled(operand, factor, dataflow) for operand in call.args)
    if left is None or right is None:
        return None
    more, own = constant_of(right), _added(left)
    if more is None or own is None:
        return relax.op.add(left, right)
    return relax.op.add(left.args[0], _constant(own.astype(np.float64) + more))


def _added(expr: relax.Expr) -> NDArray[np.generic] | None:
    """Return the constant that a sum adds."""
    is_sum = isinstance(expr, tvm.ir.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == "relax.add"
    return constant_of(expr.args[1]) if is_sum else None


def _scaled_codes(call: tvm.ir.Call, factor: float, _: Dataflow) -> relax.Expr | None:
    scale = constant_of(call.args[1])
    if scale is None:
        return None
    scaled = _constant(scale.astype(np.float64) * factor)
    return relax.op.dequantize(call.args[0], scaled, call.args[2], axis=call.attrs.axis, out_dtype="float32")


def _scaled_relu(call: tvm.ir.Call, factor: float, dataflow: Dataflow) -> relax.Expr | None:
    scaled = _scaled(call.args[0], factor, dataflow)
    return None if scaled is None else relax.op.nn.relu(scaled)


def _scaled_clip(call: tvm.ir.Call, factor: float, dataflow: Dataflow) -> relax.Expr | None:
    scaled = _scaled(call.args[0], factor, dataflow)
    low, high = (float(bound.value) * factor for bound in call.args[1:])
    return None if scaled is None else relax.op.clip(scaled, low, high)


def _positive(expr: relax.Expr) -> float | None:
    array = constant_of(expr)
    return float(array.item()) if array is not None and array.size == 1 and array.item() > 0 else None


def _constant(values: NDArray[np.float64]) -> relax.Expr:
    return constant(np.asarray(values, np.float32))


_SCALED: Mapping[str, _Scaled] = {
    "relax.multiply": _scaled_product,
    "relax.add": _scaled_sum,
    "relax.dequantize": _scaled_codes,
    "relax.nn.relu": _scaled_relu,
    "relax.clip": _scaled_clip,
}


@dataclass(frozen=True)
class FoldRequantization(RulePass):
    """Fold the scales of codes into those of the integer sums and the codes that they are made of."""

    name: ClassVar[str] = "fold-requantization"
    rules: ClassVar[Mapping[str, tuple[Rule, ...]]] = {
        "relax.add": (_corrected_once,),
        "relax.round": (_folded,),
        "relax.clip": (_limited,),
    }
