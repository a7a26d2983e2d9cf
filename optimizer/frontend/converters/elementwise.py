"""Elementwise operators: each output element depends on the input elements at the same (broadcast) position."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter

_UNARY: dict[str, Callable[[relax.Expr], relax.Expr]] = {
    "Relu": relax.op.nn.relu,
    "Sigmoid": relax.op.sigmoid,
    "Sqrt": relax.op.sqrt,
    "Tanh": relax.op.tanh,
}

_BINARY: dict[str, Callable[[relax.Expr, relax.Expr], relax.Expr]] = {
    "Add": relax.op.add,
    "Mul": relax.op.multiply,
    "Sub": relax.op.subtract,
}


def _register_unary(operator: str, function: Callable[[relax.Expr], relax.Expr]) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        return function(node.expr())


def _register_binary(operator: str, function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> None:
    @converter(operator, since=7)
    def convert(node: Node) -> Result:
        return function(*node.broadcast_operands(node.input(0), node.input(1)))


for _operator, _function in _UNARY.items():
    _register_unary(_operator, _function)
for _operator, _binary in _BINARY.items():
    _register_binary(_operator, _binary)
