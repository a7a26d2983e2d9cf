"""Arithmetic, comparison and logic of two or more tensors, broadcast against each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.converters.precision import HALF_TYPES, is_float, is_unsigned
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value

Binary = Callable[[relax.Expr, relax.Expr], relax.Expr]

_BINARY: dict[str, Binary] = {
    "Add": relax.op.add,
    "And": relax.op.logical_and,
    "BitwiseAnd": relax.op.bitwise_and,
    "BitwiseOr": relax.op.bitwise_or,
    "BitwiseXor": relax.op.bitwise_xor,
    "Equal": relax.op.equal,
    "Greater": relax.op.greater,
    "GreaterOrEqual": relax.op.greater_equal,
    "Less": relax.op.less,
    "LessOrEqual": relax.op.less_equal,
    "Mul": relax.op.multiply,
    "Or": relax.op.logical_or,
    "Sub": relax.op.subtract,
    "Xor": relax.op.logical_xor,
}

_VARIADIC: dict[str, Binary] = {"Max": relax.op.maximum, "Min": relax.op.minimum, "Sum": relax.op.add}

_EXPONENT_BITS = 6  # an exponent of 64 and above overflows 64 bits unless the base is -1, 0 or 1


def _register_binary(operator: str, function: Binary) -> None:
    @converter(operator, since=7)
    def convert(node: Node) -> Result:
        return function(*node.broadcast_operands(node.input(0), node.input(1)))


def _register_variadic(operator: str, function: Binary) -> None:
    @converter(operator, since=6)
    def convert(node: Node) -> Result:
        return _combined(node, function).expr


def _combined(node: Node, function: Binary) -> Value:
    result = node.input(0)
    for index in range(1, len(node.inputs)):
        result = node.emit(function(*node.broadcast_operands(result, node.input(index))))
    return result


@converter("Mean", since=6)
def mean(node: Node) -> Result:
    """Convert Mean: the sum of all inputs over their number."""
    total = _combined(node, relax.op.add)
    return relax.op.divide(total.expr, node.scalar(len(node.inputs), total.dtype))


@converter("Div", since=7)
def divide(node: Node) -> Result:
    """Convert Div: of integers the quotient towards zero, and 0 where the divisor is 0."""
    left, right = node.input(0), node.input(1)
    if is_float(left.dtype) or _divides_all(right):
        return relax.op.divide(*node.broadcast_operands(left, right))
    divisor, is_zero, is_minus_one = _guarded(node, right)
    quotient = node.emit(relax.op.divide(*node.broadcast_operands(left, divisor)))
    if is_minus_one is not None:
        negated = node.emit(relax.op.negative(left.expr))
        quotient = node.emit(relax.op.where(*node.broadcast_operands(is_minus_one, negated, quotient)))
    return relax.op.where(*node.broadcast_operands(is_zero, node.constant(np.zeros((), left.dtype)), quotient))


def _divides_all(divisor: Value) -> bool:
    """Return whether the machine divides every integer by all elements: not by 0, nor the least one by -1."""
    constant = divisor.constant
    return constant is not None and not np.any((constant == 0) | (constant == -1))


def _guarded(node: Node, divisor: Value) -> tuple[Value, Value, Value | None]:
    """Return divisors of which those that may end the process are 1, and where they were 0 and -1."""

    def equals(number: int) -> Value:
        return node.emit(relax.op.equal(divisor.expr, node.scalar(number, divisor.dtype)))

    is_zero, is_minus_one = equals(0), None if is_unsigned(divisor.dtype) else equals(-1)
    is_bad = is_zero if is_minus_one is None else node.emit(relax.op.logical_or(is_zero.expr, is_minus_one.expr))
    one = node.constant(np.ones((), divisor.dtype))
    return node.emit(relax.op.where(*node.broadcast_operands(is_bad, one, divisor))), is_zero, is_minus_one


@converter("Where", since=9)
def where(node: Node) -> Result:
    """Convert Where: elements of the second input where the first is true, else of the third."""
    return relax.op.where(*node.broadcast_operands(node.input(0), node.input(1), node.input(2)))


@converter("Mod", since=10)
def modulo(node: Node) -> Result:
    """Convert Mod: the remainder with the sign of the divisor, or of the dividend if `fmod` is set.

    Of integers it is 0 where the divisor is 0.
    """
    left, right = node.input(0), node.input(1)
    truncated = bool(node.integer("fmod", 0))
    if not is_float(left.dtype):
        # The remainders by 0 and -1, which may end the process, are 0; so are those by 1 in their place.
        divisor = right if _divides_all(right) else _guarded(node, right)[0]
        operands = node.broadcast_operands(left, divisor)
        return (relax.op.mod if truncated else relax.op.floor_mod)(*operands)
    dtype = "float64" if left.dtype == "float64" else "float32"
    wide = [node.emit(relax.op.astype(value.expr, dtype)) for value in (left, right)]
    remainder = node.compute(_float_remainder, *node.broadcast_operands(*wide), truncated)
    return remainder if dtype == left.dtype else relax.op.astype(remainder.expr, left.dtype)


def _float_remainder(left: te.Tensor, right: te.Tensor, truncated: bool) -> te.Tensor:
    """Return C's fmod, or the remainder with the sign of the divisor, which is fmod moved up by one divisor."""
    dtype = str(left.dtype)

    def element(x: tvm.ir.Expr, y: tvm.ir.Expr) -> tvm.ir.Expr:
        remainder = tirx.call_pure_extern(dtype, "fmodf" if dtype == "float32" else "fmod", x, y)
        if truncated:
            return remainder
        zero = tirx.const(0, dtype)
        signed_zero = tirx.Select(y < zero, tirx.const(-0.0, dtype), zero)
        opposite = tirx.any(tirx.all(remainder < zero, y > zero), tirx.all(remainder > zero, y < zero))
        moved = tirx.Select(opposite, remainder + y, remainder)
        return tirx.Select(remainder == zero, signed_zero, moved)

    return _broadcast_compute(left, right, element, "modulo")


@converter("BitShift", since=11)
def bit_shift(node: Node) -> Result:
    """Convert BitShift: by a negative count, or one of the type's width and more, only copies of the sign are left."""
    left, right = node.broadcast_operands(node.input(0), node.input(1))
    dtype = node.input().dtype
    width = np.dtype(dtype).itemsize * 8
    to_left = node.string("direction") == "LEFT"

    def element(x: tvm.ir.Expr, count: tvm.ir.Expr) -> tvm.ir.Expr:
        zero, last = tirx.const(0, dtype), tirx.const(width - 1, dtype)
        inside = tirx.all(count >= zero, count <= last)
        within = tirx.Select(inside, count, last)
        shifted = x << within if to_left else x >> within
        beyond = zero if to_left or is_unsigned(dtype) else shifted
        return tirx.Select(inside, shifted, beyond)

    return node.compute(lambda x, y: _broadcast_compute(x, y, element, "bit_shift"), left, right)


@converter("Pow", since=7)
def power(node: Node) -> Result:
    """Convert Pow: the result has the type of the base."""
    base, exponent = node.input(0), node.input(1)
    if is_float(base.dtype):
        return _float_power(node, base, exponent)
    if is_float(exponent.dtype):
        left, right = node.broadcast_operands(_as_type(node, base, "float64"), _as_type(node, exponent, "float64"))
        return relax.op.astype(node.emit(relax.op.power(left, right)).expr, base.dtype)
    return node.compute(_integer_power, *node.broadcast_operands(base, _as_type(node, exponent, base.dtype)))


def _float_power(node: Node, base: Value, exponent: Value) -> Result:
    if exponent.constant is not None and exponent.rank == 0 and exponent.constant == 2:
        return relax.op.multiply(base.expr, base.expr)
    wide = "float32" if base.dtype in HALF_TYPES else base.dtype
    if exponent.dtype == "float64":
        wide = "float64"
    left, right = node.broadcast_operands(_as_type(node, base, wide), _as_type(node, exponent, wide))
    return _as_type(node, node.emit(relax.op.power(left, right)), base.dtype)


def _as_type(node: Node, value: Value, dtype: str) -> Value:
    return value if value.dtype == dtype else node.emit(relax.op.astype(value.expr, dtype))


def _integer_power(base: te.Tensor, exponent: te.Tensor) -> te.Tensor:
    """Return the power by repeated squaring, modulo 2 ** width; a negative exponent gives the truncated quotient."""
    dtype = str(base.dtype)
    zero, one = tirx.const(0, dtype), tirx.const(1, dtype)

    def element(x: tvm.ir.Expr, count: tvm.ir.Expr) -> tvm.ir.Expr:
        result, square = one, x
        for bit in range(_EXPONENT_BITS):
            result = tirx.Select(((count >> tirx.const(bit, dtype)) & one) == one, result * square, result)
            square = square * square
        result = tirx.Select(tirx.all(x == zero, count > zero), zero, result)
        odd = (count & one) == one
        if is_unsigned(dtype):
            return result
        inverse = tirx.Select(x == one, one, tirx.Select(x == -one, tirx.Select(odd, x, one), zero))
        return tirx.Select(count < zero, inverse, result)

    return _broadcast_compute(base, exponent, element, "power")


def _broadcast_compute(
    left: te.Tensor, right: te.Tensor, element: Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr], name: str
) -> te.Tensor:
    rank = max(len(left.shape), len(right.shape))

    def at(tensor: te.Tensor, index: tuple[tirx.Var, ...]) -> tvm.ir.Expr:
        own = index[rank - len(tensor.shape) :]
        return tensor(*(0 if _is_one(extent) else i for i, extent in zip(own, tensor.shape, strict=True)))

    padded = [[1] * (rank - len(tensor.shape)) + list(tensor.shape) for tensor in (left, right)]
    shape = [b if _is_one(a) else a for a, b in zip(*padded, strict=True)]
    return te.compute(shape, lambda *index: element(at(left, index), at(right, index)), name=name)


def _is_one(extent: int | tvm.ir.Expr) -> bool:
    return int(extent) == 1 if isinstance(extent, int | tirx.IntImm) else False


for _operator, _function in _BINARY.items():
    _register_binary(_operator, _function)
for _operator, _function in _VARIADIC.items():
    _register_variadic(_operator, _function)
