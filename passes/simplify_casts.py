"""Casts that change nothing, and casts of casts.

cast(x, dtype of x) is x. cast(cast(x, A), B) is cast(x, B) where A holds every value that x can have, and B holds them
too or is what x was: then neither way rounds, wraps or saturates. x != 0, which is how a cast to bool is imported, is x
where x is a cast of a bool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import tvm.ir
from tvm import relax

from passes.base import Dataflow
from passes.expression_patterns import is_uniform
from passes.rule_pass import RulePass
from passes.tensor_types import dtype_of, is_float, is_integer, numpy_dtype, same_type

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def holds_every_value(wide: str, narrow: str) -> bool:
    """Return whether every value of `narrow` is one of `wide` too; fp8 types, whose casts differ, never count."""
    if wide == narrow:
        return True
    if narrow == "bool":
        return is_integer(wide) or wide in _FLOATS
    if is_integer(narrow) and is_integer(wide):
        small, large = np.iinfo(narrow), np.iinfo(wide)
        return bool(large.min <= small.min and small.max <= large.max)
    if is_integer(narrow) and wide in _FLOATS:
        bounds = np.iinfo(narrow)
        return max(-int(bounds.min), int(bounds.max)) <= 2 << ml_dtypes.finfo(numpy_dtype(wide)).nmant
    if narrow not in _FLOATS or wide not in _FLOATS or is_float(narrow) != is_float(wide):
        return False
    small, large = (ml_dtypes.finfo(numpy_dtype(name)) for name in (narrow, wide))
    return bool(small.nmant <= large.nmant and small.maxexp <= large.maxexp and small.minexp >= large.minexp)


def _no_op(call: tvm.ir.Call, _: Dataflow) -> relax.Expr | None:
    """cast(x) -> x where x has that dtype."""
    return call.args[0] if dtype_of(call) == dtype_of(call.args[0]) else None


def _cast_of_cast(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """cast(cast(x, A), B) -> cast(x, B) where A and B hold every value of x."""
    inner = dataflow.call(call.args[0], "relax.astype")
    if inner is None:
        return None
    original, middle, final = dtype_of(inner.args[0]), dtype_of(inner), dtype_of(call)
    if original is None or middle is None or final is None:
        return None
    if not holds_every_value(middle, original) or not holds_every_value(final, original):
        return None
    return inner.args[0] if final == original else relax.op.astype(inner.args[0], final)


def _truth_of_boolean(call: tvm.ir.Call, dataflow: Dataflow) -> relax.Expr | None:
    """cast(b) != 0 -> b where b is a bool."""
    inner = dataflow.call(call.args[0], "relax.astype")
    if inner is None or dtype_of(inner.args[0]) != "bool" or not is_uniform(call.args[1], 0.0):
        return None
    return inner.args[0] if same_type(call, inner.args[0]) else None


@dataclass(frozen=True)
class SimplifyCasts(RulePass):
    """Remove casts that change nothing."""

    name: ClassVar[str] = "simplify-casts"
    rules: ClassVar = {"relax.astype": (_no_op, _cast_of_cast), "relax.not_equal": (_truth_of_boolean,)}
