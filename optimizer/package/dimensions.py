"""Symbolic dimensions: integer expressions such as "past + sequence", read from a manifest that nobody vouches for."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import lru_cache

MAX_EXPRESSION_LENGTH = 1000
MAX_DEPTH = 64

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_FUNCTIONS: dict[str, Callable[[int, int], int]] = {"min": min, "max": max}


@lru_cache(maxsize=4096)
def _parse(expression: str) -> ast.expr:
    """Return the syntax tree of an expression of integers, names, + - * // %, unary minus, min and max.

    Raises ValueError for anything else.
    """
    if len(expression) > MAX_EXPRESSION_LENGTH or not expression.isascii():
        raise ValueError(f"a dimension is written in at most {MAX_EXPRESSION_LENGTH} ASCII characters")
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"'{expression}' is not an integer expression") from error
    _check(tree, expression, MAX_DEPTH)
    return tree


def _check(node: ast.expr, expression: str, depth: int) -> None:
    if not depth:
        raise ValueError(f"'{expression:.40}...' nests more than {MAX_DEPTH} operators")
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return
        case ast.Name():
            return
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check(operand, expression, depth - 1)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            _check(left, expression, depth - 1)
            _check(right, expression, depth - 1)
        case ast.Call(func=ast.Name(id=name), args=[first, second], keywords=[]) if name in _FUNCTIONS:
            _check(first, expression, depth - 1)
            _check(second, expression, depth - 1)
        case _:
            raise ValueError(f"'{expression}' holds more than integers, names, + - * // %, min and max")


@lru_cache(maxsize=4096)
def symbols(expression: str) -> frozenset[str]:
    """Return the names that the expression depends on; raises ValueError when it is not a valid expression."""
    tree = _parse(expression)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called)


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """Return the expression's value; raises KeyError for an unbound name and ZeroDivisionError as Python does."""
    if expression in values:
        return values[expression]
    return _evaluate(_parse(expression), values)


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(operand=operand):
            return -_evaluate(operand, values)
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](_evaluate(left, values), _evaluate(right, values))
        case ast.Call(func=ast.Name(id=name), args=[first, second]):
            return _FUNCTIONS[name](_evaluate(first, values), _evaluate(second, values))
    raise AssertionError("_parse accepts no other node")
