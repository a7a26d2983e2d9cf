"""Activation functions. Those of 16-bit floats are computed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax, te, tirx
from tvm.ir import Expr

from optimizer.frontend.converters.precision import in_float32
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter

_SELU_ALPHA = 1.67326319217681884765625  # the ONNX schema's defaults
_SELU_GAMMA = 1.05070102214813232421875
_MISH_LIMIT = 20  # from here on Mish rounds to x, in fp64, too, and the square of the exponential is finite


@converter("Relu")
def relu(node: Node) -> Result:
    """Convert Relu: max(x, 0)."""
    return relax.op.nn.relu(node.expr())


@converter("LeakyRelu")
def leaky_relu(node: Node) -> Result:
    """Convert LeakyRelu: x where positive, alpha x elsewhere."""
    return relax.op.nn.leakyrelu(node.expr(), node.float("alpha", 0.01))


@converter("PRelu", since=7)
def parametric_relu(node: Node) -> Result:
    """Convert PRelu: x where positive, slope x elsewhere; the slope broadcasts to x."""
    data, slope = node.broadcast_operands(node.input(0), node.input(1))
    negative = relax.op.less(data, node.scalar(0, node.input().dtype))
    return relax.op.where(negative, relax.op.multiply(data, slope), data)


@converter("ThresholdedRelu", since=10)
def thresholded_relu(node: Node) -> Result:
    """Convert ThresholdedRelu: x where it is above alpha, else 0."""
    dtype = node.input().dtype
    above = relax.op.greater(node.expr(), node.scalar(node.float("alpha", 1.0), dtype))
    return relax.op.where(above, node.expr(), node.scalar(0, dtype))


@converter("Shrink", since=9)
def shrink(node: Node) -> Result:
    """Convert Shrink: x + bias below -lambd, x - bias above lambd, 0 between."""
    x, dtype = node.expr(), node.input().dtype
    bias, limit = node.float("bias", 0.0), node.float("lambd", 0.5)
    if "int" in dtype and (bias != int(bias) or limit != int(limit)):
        raise node.unsupported("integer input with a fractional bias or lambd is not supported")
    bias_scalar, limit_scalar = node.scalar(bias, dtype), node.scalar(limit, dtype)
    above = relax.op.where(relax.op.greater(x, limit_scalar), relax.op.subtract(x, bias_scalar), node.scalar(0, dtype))
    return relax.op.where(relax.op.less(x, node.scalar(-limit, dtype)), relax.op.add(x, bias_scalar), above)


@converter("Gelu", since=20)
def gelu(node: Node) -> Result:
    """Convert Gelu: x times the normal distribution function of x, exact or by tanh."""
    approximate = node.string("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise node.unsupported(f"approximate '{approximate}' is unknown")
    function = relax.op.nn.gelu if approximate == "none" else relax.op.nn.gelu_tanh
    return in_float32(node, node.input(), function)


def _scalar(number: float, x: relax.Expr) -> relax.Expr:
    return relax.const(number, str(x.ty.dtype.dtype))


def _elu(node: Node, x: relax.Expr) -> relax.Expr:
    return _exponential_below_zero(x, node.float("alpha", 1.0), 1.0)


def _selu(node: Node, x: relax.Expr) -> relax.Expr:
    gamma = node.float("gamma", _SELU_GAMMA)
    return relax.op.multiply(_exponential_below_zero(x, node.float("alpha", _SELU_ALPHA), 1.0), _scalar(gamma, x))


def _celu(node: Node, x: relax.Expr) -> relax.Expr:
    alpha = node.float("alpha", 1.0)
    return _exponential_below_zero(x, alpha, alpha)


def _exponential_below_zero(x: relax.Expr, factor: float, divisor: float) -> relax.Expr:
    """Return x where positive, else factor (exp(x / divisor) - 1)."""
    # The exponential sees no positive x: an overflow there would be multiplied away, but only if finite.
    low = relax.op.minimum(x, _scalar(0, x))
    scaled = low if divisor == 1.0 else relax.op.divide(low, _scalar(divisor, x))
    curve = relax.op.subtract(relax.op.exp(scaled), _scalar(1, x))
    return relax.op.where(relax.op.greater(x, _scalar(0, x)), x, relax.op.multiply(_scalar(factor, x), curve))


def _sigmoid(_: Node, x: relax.Expr) -> relax.Expr:
    return relax.op.sigmoid(x)


def _tanh(_: Node, x: relax.Expr) -> relax.Expr:
    return relax.op.tanh(x)


def _hard_sigmoid(node: Node, x: relax.Expr) -> relax.Expr:
    return _clipped_line(x, node.float("alpha", 0.2), node.float("beta", 0.5))


def _hard_swish(_: Node, x: relax.Expr) -> relax.Expr:
    return relax.op.multiply(x, _clipped_line(x, 1 / 6, 0.5))


def _clipped_line(x: relax.Expr, slope: float, offset: float) -> relax.Expr:
    line = relax.op.add(relax.op.multiply(x, _scalar(slope, x)), _scalar(offset, x))
    return relax.op.minimum(relax.op.maximum(line, _scalar(0, x)), _scalar(1, x))


def _softsign(_: Node, x: relax.Expr) -> relax.Expr:
    return relax.op.divide(x, relax.op.add(relax.op.abs(x), _scalar(1, x)))


def _swish(node: Node, x: relax.Expr) -> relax.Expr:
    alpha = node.float("alpha", 1.0)
    if alpha == 1.0:
        return relax.op.nn.silu(x)
    return relax.op.multiply(x, relax.op.sigmoid(relax.op.multiply(x, _scalar(alpha, x))))


def _softplus(node: Node, x: relax.Expr) -> relax.Expr:
    return node.compute(softplus, x).expr


def _mish(node: Node, x: relax.Expr) -> relax.Expr:
    return node.compute(mish, x).expr


def mish(tensor: te.Tensor) -> te.Tensor:
    """Return x tanh(log(1 + exp(x))) = x n / (n + 2) with e = exp(x) and n = e (e + 2), where nothing cancels."""
    two, limit = (tirx.const(number, tensor.dtype) for number in (2, _MISH_LIMIT))

    def value(*index: Expr) -> Expr:
        # No bindings: a schedule that repeats them would bind a variable twice. LLVM computes equal terms once.
        e = tirx.exp(tirx.min(limit, tensor[index]))
        n = e * (e + two)
        return tensor[index] * (n / (n + two))

    return te.compute(tensor.shape, value, name="mish")


def softplus(tensor: te.Tensor) -> te.Tensor:
    """Return log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), which neither overflows nor cancels."""
    zero = tirx.const(0, tensor.dtype)
    return te.compute(
        tensor.shape,
        lambda *index: tirx.max(tensor[index], zero) + tirx.log1p(tirx.exp(-tirx.abs(tensor[index]))),
        name="softplus",
    )


_FUNCTIONS: dict[str, Callable[[Node, relax.Expr], relax.Expr]] = {
    "Celu": _celu,
    "Elu": _elu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Mish": _mish,
    "Selu": _selu,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Swish": _swish,
    "Tanh": _tanh,
}


def _register(operator: str, function: Callable[[Node, relax.Expr], relax.Expr]) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        return in_float32(node, node.input(), lambda x: function(node, x))


for _operator, _function in _FUNCTIONS.items():
    _register(_operator, _function)
