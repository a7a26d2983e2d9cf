"""Ranges of integers whose bounds are dimensions, as exporters make positions and causal masks of them."""

from __future__ import annotations

from tvm import relax, tirx

from optimizer.frontend.dimensions import Dimension, as_expression, simplified
from optimizer.frontend.node import Node


def range_of_dimensions(node: Node, start: Dimension, limit: Dimension, delta: int, dtype: str) -> relax.Expr:
    """Return the vector start, start + delta, ..., up to and without the limit; its length is a dimension."""
    distance = simplified((limit - start) * (1 if delta > 0 else -1))
    if isinstance(distance, int):
        distance = max(distance, 0)
    elif not node.graph.symbols.proves(distance >= 0):
        distance = node.graph.bound_dimension(tirx.max(distance, tirx.const(0, "int64")), node.output_hint)
    step = abs(delta)
    length = simplified((distance + (step - 1)) // step)
    if isinstance(length, int) and length == 0:
        return relax.op.zeros((0,), dtype)
    last = as_expression(simplified(start + length * delta))
    return relax.op.arange(as_expression(start), last, delta, dtype)
