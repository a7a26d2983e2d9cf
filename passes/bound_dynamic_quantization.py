"""Dynamic quantization of numbers that are known not to be negative: its zero point is 0.

    minimum(min(x), 0)                                                      =  0        for x >= 0
    uint8(clip(round(-minimum(min(x), 0) / scale), 0, 255))                 =  0        for x >= 0, scale > 0

These are the least number and the zero point of DynamicQuantizeLinear; of NaN it defines neither. A zero point of 0
takes no pass over the data, pads with zeros, and leaves nothing to correct in integer products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm.ir
from tvm import relax

from passes.base import Dataflow
from passes.expression_patterns import is_uniform
from passes.rule_pass import Rule, RulePass
from passes.tensor_types import constant_of, dtype_of

# What is never negative, whatever its operands are.
_NEVER_NEGATIVE = frozenset(
    f"relax.{name}" for name in ("nn.relu", "nn.softmax", "abs", "exp", "sigmoid", "sqrt", "square")
)
# What is not negative where no operand is: for each operator how many of the first arguments are operands.
_KEEPS: Mapping[str, int] = {
    **{f"relax.{name}": 1 for name in ("max", "min", "mean", "sum", "permute_dims", "reshape", "flatten", "squeeze")},
    **{f"relax.{name}": 1 for name in ("expand_dims", "strided_slice", "astype", "nn.relu6", "broadcast_to")},
    **{f"relax.nn.{kind}_pool{rank}d": 1 for kind in ("max", "avg") for rank in (1, 2, 3)},
    **{f"relax.{name}": 2 for name in ("add", "multiply", "divide", "maximum", "minimum")},
}


def is_never_negative(expr: relax.Expr, dataflow: Dataflow) -> bool:
    """Return whether no element of a tensor is less than zero, but for NaN."""
    pending, seen = [expr], set[relax.Var]()
    while pending:
        part = pending.pop()
        if isinstance(part, relax.Var):
            if part in seen:
                continue
            seen.add(part)
        operands = _operands(dataflow.producer(part), dataflow)
        if operands is None:
            return False
        pending.extend(operands)
    return True


def _operands(value: relax.Expr, dataflow: Dataflow) -> list[relax.Expr] | None:
    """Return the operands of which none may be negative for `value` not to be; None where that does not suffice."""
    array = constant_of(value)
    if array is not None:
        return [] if bool((array >= 0).all()) else None
    if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.Op):
        return None
    name = value.op.name
    if name in _NEVER_NEGATIVE or (name == "relax.clip" and float(value.args[1].value) >= 0):
        return []
    if name == "relax.maximum":
        bounds = [constant_of(dataflow.producer(argument)) for argument in value.args]
        if any(bound is not None and bool((bound >= 0).all()) for bound in bounds):
            return []
    return list(value.args[: _KEEPS[name]]) if name in _KEEPS else None


def _least(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """minimum(min(x), 0) -> 0."""
    return relax.const(0.0, "float32") if _is_least_of_none_negative(call, dataflow) else None


def _zero_point(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """uint8(clip(round(-minimum(min(x), 0) / scale), 0, 255)) -> 0."""
    value: relax.Expr = call.args[0]
    if dtype_of(call) != "uint8":
        return None
    for operator in ("relax.clip", "relax.round", "relax.divide", "relax.negative"):
        inner = dataflow.call(value, operator)
        if inner is None:
            return None
        value = inner.args[0]
    least = dataflow.call(value, "relax.minimum")
    found = least is not None and _is_least_of_none_negative(least, dataflow)
    return relax.const(0, "uint8") if found else None


def _constant_cast(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """Cast a constant zero point."""
    array = constant_of(dataflow.producer(call.args[0]))
    if array is None or array.size != 1 or array.dtype != np.uint8:
        return None
    return relax.const(array.astype(dtype_of(call)), dtype_of(call))


def _is_least_of_none_negative(call: tvm.ir.Call, dataflow: Dataflow) -> bool:
    least = dataflow.call(call.args[0], "relax.min")
    of_all = least is not None and least.attrs.axis is None and dtype_of(call) == "float32" and not call.ty.ndim
    zero = of_all and is_uniform(dataflow.producer(call.args[1]), 0.0)
    return zero and least is not None and is_never_negative(least.args[0], dataflow)


@dataclass(frozen=True)
class BoundDynamicQuantization(RulePass):
    """Quantize what is never negative with a zero point of 0 where the model computes one."""

    name: ClassVar[str] = "bound-dynamic-quantization"
    rules: ClassVar[Mapping[str, tuple[Rule, ...]]] = {
        "relax.minimum": (_least,),
        "relax.astype": (_zero_point, _constant_cast),
    }
