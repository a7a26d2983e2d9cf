"""Operators that only move or rename elements: reshape, transpose, slice, concat, and their kin."""

from __future__ import annotations

from tvm import relax

from optimizer.frontend.dimensions import product, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.dimensions import Dimension


@converter("Reshape", since=5)
def reshape(node: Node) -> Result:
    """Convert Reshape: 0 copies the input's dimension (unless allowzero), -1 takes what is left."""
    data = node.input(0)
    wanted = node.shape_argument(1)
    copy_zero = not node.integer("allowzero", 0)
    shape: list[Dimension] = [
        data.shape[axis] if copy_zero and isinstance(size, int) and size == 0 else size for axis, size in enumerate(wanted)
    ]
    if -1 in [size for size in shape if isinstance(size, int)]:
        free = next(axis for axis, size in enumerate(shape) if isinstance(size, int) and size == -1)
        rest = product(size for axis, size in enumerate(shape) if axis != free)
        shape[free] = simplified(product(data.shape) // rest)
    return relax.op.reshape(data.expr, shape)
