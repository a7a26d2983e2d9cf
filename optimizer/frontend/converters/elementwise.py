"""Functions of one tensor, element by element, other than activations."""

from __future__ import annotations

from collections.abc import Callable

from onnx import helper
from tvm import relax, te, tirx

from optimizer.frontend.converters.precision import HALF_TYPES, in_float32, is_float, is_unsigned
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import NARROW_TYPES

Unary = Callable[[relax.Expr], relax.Expr]

# Exact in every type, so that 16-bit floats need no wider ones.
_EXACT: dict[str, Unary] = {
    "BitwiseNot": relax.op.bitwise_not,
    "Ceil": relax.op.ceil,
    "Floor": relax.op.floor,
    "Identity": lambda x: x,
    "Neg": relax.op.negative,
    "Not": relax.op.logical_not,
    "Round": relax.op.round,
}

_ROUNDED: dict[str, Unary] = {
    "Acos": relax.op.acos,
    "Acosh": relax.op.acosh,
    "Asin": relax.op.asin,
    "Asinh": relax.op.asinh,
    "Atan": relax.op.atan,
    "Atanh": relax.op.atanh,
    "Cos": relax.op.cos,
    "Cosh": relax.op.cosh,
    "Erf": relax.op.erf,
    "Exp": relax.op.exp,
    "Log": relax.op.log,
    "Sin": relax.op.sin,
    "Sinh": relax.op.sinh,
    "Sqrt": relax.op.sqrt,
    "Tan": relax.op.tan,
}


def _register_exact(operator: str, function: Unary) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        value = node.input()
        return node.emit(function(value.expr), value.narrow_type)


def _register_rounded(operator: str, function: Unary) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        return in_float32(node, node.input(), function)


@converter("Abs")
def absolute(node: Node) -> Result:
    """Convert Abs: the magnitude; of an unsigned integer, itself."""
    return node.expr() if is_unsigned(node.input().dtype) else relax.op.abs(node.expr())


@converter("Reciprocal")
def reciprocal(node: Node) -> Result:
    """Convert Reciprocal: 1 / x."""
    value = node.input()
    return relax.op.divide(node.scalar(1, value.dtype), value.expr)


@converter("Sign")
def sign(node: Node) -> Result:
    """Convert Sign: -1, 0 or 1; NaN stays NaN."""
    value = node.input()
    if is_unsigned(value.dtype):
        return relax.op.minimum(value.expr, node.scalar(1, value.dtype))
    if not is_float(value.dtype):
        return relax.op.sign(value.expr)
    return in_float32(node, value, _sign_of_float)


def _sign_of_float(x: relax.Expr) -> relax.Expr:
    """Return what Sign says by two choices: zeros and NaN stand for themselves. TVM's sign takes branches."""
    zero, one, minus_one = (relax.const(number, str(x.ty.dtype.dtype)) for number in (0, 1, -1))
    return relax.op.where(relax.op.greater(x, zero), one, relax.op.where(relax.op.less(x, zero), minus_one, x))


@converter("IsNaN")
def is_nan(node: Node) -> Result:
    """Convert IsNaN."""
    return relax.op.isnan(_at_least_float32(node))


@converter("IsInf")
def is_infinite(node: Node) -> Result:
    """Convert IsInf: whether an element is an infinity of a sign that is asked for."""
    value = _at_least_float32(node)
    dtype = "float64" if node.input().dtype == "float64" else "float32"
    positive, negative = node.integer("detect_positive", 1), node.integer("detect_negative", 1)
    if positive and negative:
        return relax.op.isinf(value)
    if not positive and not negative:
        return relax.op.zeros(list(node.input().shape), "bool")
    return relax.op.equal(value, node.scalar(float("inf") if positive else float("-inf"), dtype))


def _at_least_float32(node: Node) -> relax.Expr:
    value = node.input()
    if value.dtype.startswith("float8"):
        raise node.unsupported(f"{value.dtype} input is not supported")
    return relax.op.astype(value.expr, "float32") if value.dtype in HALF_TYPES else value.expr


@converter("Clip", since=6)
def clip_to_attributes(node: Node) -> Result:
    """Convert Clip with bounds as attributes."""
    dtype = node.input().dtype
    low = node.scalar(node.float("min"), dtype) if node.has_attribute("min") else None
    high = node.scalar(node.float("max"), dtype) if node.has_attribute("max") else None
    return _clipped(node, low, high)


@converter("Clip", since=11)
def clip(node: Node) -> Result:
    """Convert Clip: min(max(x, low), high), either bound optional."""
    low, high = node.optional_input(1), node.optional_input(2)
    return _clipped(node, None if low is None else low.expr, None if high is None else high.expr)


def _clipped(node: Node, low: relax.Expr | None, high: relax.Expr | None) -> relax.Expr:
    result = node.expr()
    if low is not None:
        result = relax.op.maximum(result, low)
    if high is not None:
        result = relax.op.minimum(result, high)
    return result


@converter("BitCast")
def bit_cast(node: Node) -> Result:
    """Convert BitCast: the same bits read as another type of the same width."""
    value, target = node.input(), node.integer("to")
    if value.narrow_type is not None or target in NARROW_TYPES:
        raise node.unsupported("types narrower than a byte are not supported")
    dtype = helper.tensor_dtype_to_np_dtype(target).name
    if value.dtype == "bool" and dtype in ("int8", "uint8"):
        return relax.op.astype(value.expr, dtype)
    if "bool" in (value.dtype, dtype):
        raise node.unsupported(f"{value.dtype} as {dtype} is not supported")

    def reinterpreted(tensor: te.Tensor) -> te.Tensor:
        return te.compute(tensor.shape, lambda *index: tirx.reinterpret(dtype, tensor[index]), name="bit_cast")

    return node.compute(reinterpreted, value.expr)


for _operator, _function in _EXACT.items():
    _register_exact(_operator, _function)
for _operator, _function in _ROUNDED.items():
    _register_rounded(_operator, _function)
