"""Steps of optimizers (domain ai.onnx.preview.training): Adagrad, Adam, Momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax

from optimizer.frontend.accumulation import cast
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter

_DOMAIN = "ai.onnx.preview.training"
# (node, rate, updates before, [x, gradient, accumulators...]) -> [new x, new accumulators...]
Step = Callable[[Node, relax.Expr, relax.Expr, Sequence[relax.Expr]], list[relax.Expr]]


def _register(operator: str, accumulators: int, step: Step) -> None:
    @converter(operator, domain=_DOMAIN)
    def convert(node: Node) -> Result:
        columns = 2 + accumulators
        count, rest = divmod(len(node.inputs) - 2, columns)
        if rest:
            raise node.unsupported(f"{len(node.inputs)} inputs")
        dtype = node.input(2).dtype
        rate, updates = (cast(node.expr(index), node.input(index).dtype, dtype) for index in (0, 1))
        results: list[list[relax.Expr]] = [[] for _ in range(1 + accumulators)]
        for tensor in range(count):
            values = [node.expr(2 + column * count + tensor) for column in range(columns)]
            for collected, value in zip(results, step(node, rate, updates, values), strict=True):
                collected.append(value)
        return [value for collected in results for value in collected]


def _number(node: Node, name: str, default: float | None = None) -> relax.Expr:
    return node.scalar(node.float(name, default), node.input(2).dtype)


def _regularized(node: Node, x: relax.Expr, gradient: relax.Expr) -> relax.Expr:
    """Return gradient + norm_coefficient * x."""
    return node.emit(relax.op.add(relax.op.multiply(_number(node, "norm_coefficient", 0.0), x), gradient)).expr


def _adagrad(node: Node, rate: relax.Expr, updates: relax.Expr, values: Sequence[relax.Expr]) -> list[relax.Expr]:
    """Return x - rate / (1 + t * decay) * g / (sqrt(h') + epsilon) and h' = h + g^2."""
    x, gradient, squares = values
    one = node.scalar(1, node.input(2).dtype)
    decayed = relax.op.add(one, relax.op.multiply(updates, _number(node, "decay_factor", 0.0)))
    gradient = _regularized(node, x, gradient)
    summed = node.emit(relax.op.add(squares, relax.op.multiply(gradient, gradient))).expr
    divisor = relax.op.add(relax.op.sqrt(summed), _number(node, "epsilon", 1e-6))
    step = relax.op.divide(relax.op.multiply(relax.op.divide(rate, decayed), gradient), divisor)
    return [relax.op.subtract(x, step), summed]


def _adam(node: Node, rate: relax.Expr, updates: relax.Expr, values: Sequence[relax.Expr]) -> list[relax.Expr]:
    """Return the step of Adam (arXiv 1412.6980), its bias correction applied to the rate when t > 0."""
    x, gradient, mean, squares = values
    one = node.scalar(1, node.input(2).dtype)
    alpha, beta = _number(node, "alpha", 0.9), _number(node, "beta", 0.999)
    gradient = _regularized(node, x, gradient)

    def blended(factor: relax.Expr, old: relax.Expr, new: relax.Expr) -> relax.Expr:
        kept = relax.op.multiply(factor, old)
        return node.emit(relax.op.add(kept, relax.op.multiply(relax.op.subtract(one, factor), new))).expr

    mean = blended(alpha, mean, gradient)
    squares = blended(beta, squares, relax.op.multiply(gradient, gradient))
    started = node.emit(relax.op.greater(updates, node.scalar(0, node.input(2).dtype))).expr
    factors = [relax.op.subtract(one, relax.op.power(base, updates)) for base in (beta, alpha)]
    corrected = relax.op.divide(relax.op.multiply(rate, relax.op.sqrt(factors[0])), factors[1])
    adjusted = node.emit(relax.op.where(started, corrected, rate)).expr
    root = relax.op.add(relax.op.sqrt(squares), _number(node, "epsilon", 1e-6))
    moved = relax.op.subtract(x, relax.op.multiply(adjusted, relax.op.divide(mean, root)))
    shrink = relax.op.subtract(one, _number(node, "norm_coefficient_post", 0.0))
    return [relax.op.multiply(shrink, moved), mean, squares]


def _momentum(node: Node, rate: relax.Expr, updates: relax.Expr, values: Sequence[relax.Expr]) -> list[relax.Expr]:
    """Return the step of stochastic gradient descent with standard or Nesterov momentum; beta counts when t > 0."""
    x, gradient, velocity = values
    dtype = node.input(2).dtype
    alpha = _number(node, "alpha")
    gradient = _regularized(node, x, gradient)
    started = relax.op.greater(updates, node.scalar(0, dtype))
    beta = node.emit(relax.op.where(started, _number(node, "beta"), node.scalar(1, dtype))).expr
    moved = relax.op.add(relax.op.multiply(alpha, velocity), relax.op.multiply(beta, gradient))
    velocity = node.emit(moved).expr
    step = velocity
    if node.string("mode") == "nesterov":
        step = relax.op.add(gradient, relax.op.multiply(alpha, velocity))
    return [relax.op.subtract(x, relax.op.multiply(rate, step)), velocity]


_register("Adagrad", 1, _adagrad)
_register("Adam", 2, _adam)
_register("Momentum", 1, _momentum)
