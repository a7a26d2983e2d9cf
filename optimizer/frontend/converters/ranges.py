"""Range: evenly spaced numbers, whose count is a dimension wherever the bounds are."""

from __future__ import annotations

import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.dimensions import Dimension, as_expression, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value

_ZERO = tirx.const(0, "int64")


@converter("Range", since=11)
def number_range(node: Node) -> Result:
    """Convert Range: start, start + delta, ..., up to and without the limit."""
    bounds = [_known_integer(node.input(index)) for index in range(3)]
    start, limit, delta = bounds
    if start is not None and limit is not None and isinstance(delta, int) and delta != 0:
        return _range_of_dimensions(node, start, limit, delta)
    dtype = node.input(0).dtype

    def count(first: te.Tensor, last: te.Tensor, step: te.Tensor) -> te.Tensor:
        # The schema's formula: max(ceil((limit - start) / delta), 0), in the type of the operands.
        steps = _ceiling_quotient(last() - first(), step(), dtype)
        return te.compute((1,), lambda _: tirx.max(steps, _ZERO), name="count")

    tensors = [node.expr(index) for index in range(3)]
    (length,) = node.compute_shape(count, *tensors)

    def elements(first: te.Tensor, step: te.Tensor) -> te.Tensor:
        return te.compute((length,), lambda i: first() + tirx.Cast(dtype, i) * step(), name="range")

    return node.compute(elements, tensors[0], tensors[2])


def _known_integer(value: Value) -> Dimension | None:
    integers = value.integers
    return None if integers is None or integers.size != 1 else integers.ravel()[0]


def _range_of_dimensions(node: Node, start: Dimension, limit: Dimension, delta: int) -> Result:
    """Return a range with bounds of dimensions: a vector whose length is an expression of them."""
    distance = simplified((limit - start) * (1 if delta > 0 else -1))
    if isinstance(distance, int):
        distance = max(distance, 0)
    elif not node.graph.symbols.proves(distance >= 0):
        distance = node.graph.bound_dimension(tirx.max(distance, _ZERO), node.output_hint)
    step = abs(delta)
    length = simplified((distance + (step - 1)) // step)
    first, dtype = as_expression(start), node.input(0).dtype
    if isinstance(length, int) and length == 0:
        return relax.op.zeros((0,), dtype)
    last = as_expression(simplified(start + length * delta))
    return relax.op.arange(first, last, delta, dtype)


def _ceiling_quotient(distance: tvm.ir.Expr, step: tvm.ir.Expr, dtype: str) -> tvm.ir.Expr:
    if "float" in dtype:
        return tirx.Cast("int64", te.ceil(distance / step))
    wide, divisor = tirx.Cast("int64", distance), tirx.Cast("int64", step)
    return -tirx.floordiv(-wide, divisor)
