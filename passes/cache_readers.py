"""What reads a cache: products with queries, which sum over channels, or with probabilities, which sum over tokens."""

from __future__ import annotations

import tvm.ir
from tvm import relax, tirx

from passes.base import Dataflow
from passes.tensor_types import equal_shapes, shape_of
from passes.views import Digit, Element, behind_view, whole
from schedules.access import occurs

_ELEMENTWISE = ("relax.astype", "relax.multiply", "relax.divide")


def summed_axes(function: relax.Function, dataflow: Dataflow, cache: relax.Var) -> set[int]:
    """Return the axes of `cache` that the matrix products of a function sum over, which read it through views."""
    found: set[int] = set()
    for block in function.body.blocks:
        for binding in block.bindings:
            call = dataflow.call(binding.var, "relax.matmul")
            if call is not None:
                found |= {axis for side in (0, 1) for axis in _summed(call, side, dataflow, cache)}
    return found


def _summed(product: tvm.ir.Call, side: int, dataflow: Dataflow, cache: relax.Var) -> set[int]:
    """Return the axes of `cache` that an operand of a product sums over, if the operand is made of it."""
    operand = product.args[side]
    shape = shape_of(operand)
    if shape is None or len(shape) < 2:
        return set()
    digits = [Digit(tirx.Var(f"i{axis}", "int64"), extent) for axis, extent in enumerate(shape)]
    made = dataflow.producer(cache)
    summed = digits[-1 if side == 0 else -2]
    element: Element | None = Element(operand, tuple(whole(digit) for digit in digits))
    while element is not None and not dataflow.producer(element.tensor).same_as(made):
        viewed = behind_view(element, dataflow)
        call = dataflow.call(element.tensor, *_ELEMENTWISE)
        if viewed is None and call is not None and equal_shapes(shape_of(call.args[0]), shape_of(call)):
            viewed = Element(call.args[0], element.indices)
        element = viewed
    if element is None:
        return set()
    return {
        axis for axis, index in enumerate(element.indices) if any(occurs(digit.value, summed.value) for digit in index)
    }


__all__ = ["summed_axes"]
