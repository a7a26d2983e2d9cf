"""Range: evenly spaced numbers. Exporters make positions and causal masks of it, with dimensions for bounds."""

from __future__ import annotations

import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.dimensions import Dimension, as_expression, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter

_ZERO = tirx.const(0, "int64")


@converter("Range", since=11)
def number_range(node: Node) -> Result:
    """Convert Range: start, start + delta, ..., up to and without the limit."""
    bounds = [node.input(index) for index in range(3)]
    start, limit, delta = (None if bound.integers is None else bound.integers.item() for bound in bounds)
    dtype = bounds[0].dtype
    if start is not None and limit is not None and isinstance(delta, int) and delta != 0:
        return _range_of_dimensions(node, start, limit, delta, dtype)
    # The scalars stay tensors: they may be negative, which TVM's symbols are not.
    first, last, step = (node.reshape(bound, ()).expr for bound in bounds)
    (length,) = node.compute_shape(_count, first, last, step)
    wide = accumulation_dtype(dtype)

    def elements(begin: te.Tensor, stride: te.Tensor, size: tvm.ir.Expr) -> te.Tensor:
        def element(i: tirx.Var) -> tvm.ir.Expr:
            return (begin().astype(wide) + i.astype(wide) * stride().astype(wide)).astype(dtype)

        return te.compute((size,), element, name="range")

    return node.compute(elements, first, step, as_expression(length))


def _range_of_dimensions(node: Node, start: Dimension, limit: Dimension, delta: int, dtype: str) -> relax.Expr:
    """Return a range whose length is a dimension: an expression of those that bound it."""
    distance = simplified((limit - start) * (1 if delta > 0 else -1))
    if isinstance(distance, int):
        distance = max(distance, 0)
    elif not node.graph.symbols.proves(distance >= 0):
        distance = node.graph.bound_dimension(tirx.max(distance, _ZERO), node.output_hint)
    step = abs(delta)
    length = simplified((distance + (step - 1)) // step)
    if isinstance(length, int) and length == 0:
        return relax.op.zeros((0,), dtype)
    last = as_expression(simplified(start + length * delta))
    return relax.op.arange(as_expression(start), last, delta, dtype)


def _count(first: te.Tensor, last: te.Tensor, step: te.Tensor) -> te.Tensor:
    """Return max(ceil((last - first) / step), 0), the schema's formula, as an int64 tensor of one element."""
    begin, end, stride = first(), last(), step()
    if "float" in str(first.dtype):
        steps = tirx.ceil((end.astype("float64") - begin.astype("float64")) / stride.astype("float64"))
        return te.compute((1,), lambda _: tirx.max(steps.astype("int64"), _ZERO), name="count")
    distance, size = end.astype("int64") - begin.astype("int64"), stride.astype("int64")
    # The divisor of floordiv is made positive: that is the case that TVM lowers without a check of signs.
    forward = tirx.Select(size < 0, -distance, distance)
    width = tirx.max(tirx.abs(size), tirx.const(1, "int64"))
    return te.compute((1,), lambda _: tirx.max(tirx.floordiv(forward + width - 1, width), _ZERO), name="count")
