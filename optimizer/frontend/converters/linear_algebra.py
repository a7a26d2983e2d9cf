"""Matrix products."""

from __future__ import annotations

from tvm import relax

from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter


@converter("MatMul")
def matmul(node: Node) -> Result:
    """Convert MatMul: numpy.matmul, batch dimensions broadcast."""
    return relax.op.matmul(node.expr(0), node.expr(1))
