"""Patterns of expressions, written as Python writes them: `x * rsqrt((v := mean(x * x)) + e)`.

A name stands for any expression, the same one wherever it occurs; a number for a constant of which all elements have
that value. `name := pattern` gives a part a name. Operators and calls stand for the Relax operators of `OPERATORS`. The
operands of commutative operators match in either order.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np
import tvm.ir
import tvm_ffi
from tvm import relax

from passes.base import Dataflow
from passes.tensor_types import constant_of, dtype_of, is_float, numpy_dtype

# Constants with more elements than this are not searched for a value that all of them have.
MOST_ELEMENTS = 1 << 16

_BINARY = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide", ast.Pow: "power"}
_COMMUTATIVE = frozenset({"add", "multiply", "maximum", "minimum", "logical_and", "logical_or"})
_PLAIN = (
    *("abs", "add", "ceil", "clip", "divide", "erf", "exp", "floor", "logical_and", "logical_not", "logical_or"),
    *("max", "maximum", "mean", "minimum", "multiply", "negative", "power", "round", "rsqrt", "sigmoid", "sign"),
    *("sqrt", "subtract", "sum", "tanh", "where"),
)
_NEURAL = ("gelu", "gelu_tanh", "relu", "silu", "softmax")
OPERATORS: Mapping[str, str] = {
    **{name: f"relax.{name}" for name in _PLAIN},
    **{name: f"relax.nn.{name}" for name in _NEURAL},
}

Parts = Mapping[str, relax.Expr]


@dataclass(frozen=True)
class Pattern:
    """The structure that `text` describes. `exact` asks numbers to be equal, else within the rounding of their type."""

    text: str
    exact: bool = True

    @cached_property
    def tree(self) -> ast.expr:
        return ast.parse(self.text, mode="eval").body

    @property
    def operator(self) -> str:
        """Return the name of the Relax operator that a match ends in."""
        return OPERATORS[_called(self.tree)[0]]

    def matches(self, expr: relax.Expr, dataflow: Dataflow) -> Iterator[Parts]:
        """Yield the parts by name for every way in which `expr` has the structure."""
        yield from self._alternatives(self.tree, expr, {}, dataflow)

    def build(self, parts: Parts, dtype: str) -> relax.Expr:
        """Return the expression with names replaced by `parts` and numbers of `dtype`."""
        return _build(self.tree, parts, dtype)

    def names(self) -> frozenset[str]:
        """Return the names that occur."""
        return frozenset(node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)) - frozenset(OPERATORS)

    def _alternatives(self, node: ast.expr, expr: relax.Expr, parts: Parts, dataflow: Dataflow) -> Iterator[Parts]:
        if isinstance(node, ast.NamedExpr):
            for found in self._alternatives(node.value, expr, parts, dataflow):
                yield from _bound(node.target.id, expr, found)
        elif isinstance(node, ast.Name):
            yield from _bound(node.id, expr, parts)
        elif (number := _number(node)) is not None:
            if is_uniform(expr, number, exact=self.exact):
                yield parts
        else:
            yield from self._operands(node, expr, parts, dataflow)

    def _operands(self, node: ast.expr, expr: relax.Expr, parts: Parts, dataflow: Dataflow) -> Iterator[Parts]:
        name, operands = _called(node)
        call = dataflow.call(expr, OPERATORS[name])
        if call is None:
            return
        orders = [operands, operands[::-1]] if name in _COMMUTATIVE else [operands]
        for order in orders:
            yield from self._all(order, list(call.args), parts, dataflow)

    def _all(self, nodes: list[ast.expr], exprs: list[relax.Expr], parts: Parts, dataflow: Dataflow) -> Iterator[Parts]:
        if len(nodes) != len(exprs):
            return
        if not nodes:
            yield parts
            return
        for found in self._alternatives(nodes[0], exprs[0], parts, dataflow):
            yield from self._all(nodes[1:], exprs[1:], found, dataflow)


def is_uniform(expr: relax.Expr, number: float, *, exact: bool = True) -> bool:
    """Return whether `expr` is a constant of which all elements are `number`; 0 and -0.0 are different numbers."""
    dtype = dtype_of(expr)
    shape = expr.ty.shape.values if isinstance(expr, tvm.ir.GenericConst) and dtype is not None else None
    if shape is None or np.prod([int(dimension) for dimension in shape]) > MOST_ELEMENTS:
        return False
    array = constant_of(expr)
    if array is None or not array.size:
        return False
    if not is_float(dtype):
        return bool((array == number).all()) and not (number == 0 and np.signbit(number))
    values = array.astype(np.float64)
    if exact:
        return bool((values == number).all() and (np.signbit(values) == np.signbit(number)).all())
    epsilon = float(ml_dtypes.finfo(numpy_dtype(dtype or "")).eps)
    return bool(np.allclose(values, number, rtol=2 * epsilon, atol=0))


def uniform_value(expr: relax.Expr) -> float | None:
    """Return the value that all elements of a small constant have, or None."""
    array = constant_of(expr) if isinstance(expr, tvm.ir.GenericConst) else None
    if array is None or not array.size or array.size > MOST_ELEMENTS:
        return None
    values = array.reshape(-1).astype(np.float64)
    return float(values[0]) if (values == values[0]).all() else None


def _bound(name: str, expr: relax.Expr, parts: Parts) -> Iterator[Parts]:
    known = parts.get(name)
    if known is None:
        yield {**parts, name: expr}
    elif known.same_as(expr) or _equal_constants(known, expr):
        yield parts


def _equal_constants(left: relax.Expr, right: relax.Expr) -> bool:
    return isinstance(left, tvm.ir.GenericConst) and tvm_ffi.structural_equal(left, right)


def _called(node: ast.expr) -> tuple[str, list[ast.expr]]:
    """Return the operator that `node` calls, and its operands."""
    if isinstance(node, ast.NamedExpr):
        return _called(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)], [node.left, node.right]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return "negative", [node.operand]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id, node.args
    raise ValueError(f"a pattern may not contain {ast.unparse(node)}")


def _number(node: ast.expr) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _number(node.operand)
        return None if number is None else -number
    return float(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, int | float) else None


def _build(node: ast.expr, parts: Parts, dtype: str) -> relax.Expr:
    if isinstance(node, ast.Name):
        return parts[node.id]
    number = _number(node)
    if number is not None:
        return relax.const(np.array(number).astype(numpy_dtype(dtype)), dtype)
    name, operands = _called(node)
    return _function(name)(*(_build(operand, parts, dtype) for operand in operands))


def _function(name: str) -> Callable[..., relax.Expr]:
    return getattr(relax.op.nn if name in _NEURAL else relax.op, name)
