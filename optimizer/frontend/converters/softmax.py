"""Softmax and its kin, over one axis or (before opset 13) over all axes from one on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax

from optimizer.frontend.converters.precision import in_float32
from optimizer.frontend.dimensions import product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value

_FUNCTIONS: dict[str, Callable[..., relax.Expr]] = {
    "Softmax": relax.op.nn.softmax,
    "LogSoftmax": relax.op.nn.log_softmax,
}


def _register(operator: str, function: Callable[..., relax.Expr]) -> None:
    @converter(operator)
    def over_flattened(node: Node) -> Result:
        return _flattened(node, lambda value: in_float32(node, value, lambda x: function(x, -1)))

    @converter(operator, since=13)
    def over_axis(node: Node) -> Result:
        axis = node.axis(-1)
        return in_float32(node, node.input(), lambda x: function(x, axis))


for _operator, _function in _FUNCTIONS.items():
    _register(_operator, _function)


@converter("Hardmax")
def hardmax_over_flattened(node: Node) -> Result:
    """Convert Hardmax before opset 13: 1 at the first maximum of all axes from `axis` on."""
    return _flattened(node, lambda value: _hardmax(node, value, 1))


@converter("Hardmax", since=13)
def hardmax(node: Node) -> Result:
    """Convert Hardmax: 1 at the first maximum along the axis, 0 elsewhere."""
    return _hardmax(node, node.input(), node.axis(-1))


def _hardmax(node: Node, value: Value, axis: int) -> relax.Expr:
    first = node.emit(relax.op.argmax(value.expr, axis, keepdims=True))
    positions = node.emit(relax.op.arange(0, value.shape[axis], 1, "int64"))
    aligned = node.emit(relax.op.reshape(positions.expr, [-1, *(1,) * (value.rank - axis - 1)]))
    chosen = node.emit(relax.op.equal(first.expr, aligned.expr))
    return relax.op.astype(chosen.expr, value.dtype)


def _flattened(node: Node, function: Callable[[Value], relax.Expr]) -> relax.Expr:
    """Apply a function of a matrix to the input with its axes before and from `axis` (default 1) on merged."""
    value = node.input()
    axis = int(np.clip(node.checked_axis(node.integer("axis", 1), value.rank), 0, value.rank))
    shape = [product(value.shape[:axis]), product(value.shape[axis:])]
    matrix = node.emit(relax.op.reshape(value.expr, shape))
    return relax.op.reshape(node.emit(function(matrix)).expr, value.shape)
