"""Activation functions that exporters write out, as the one operator that they are.

    gelu(x)      = x/2 (1 + erf(x / sqrt 2))                               (Hendrycks and Gimpel, arXiv 1606.08415)
    gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))           (the same, section 2)
    silu(x)      = x sigmoid(x)
    sigmoid(x)   = 1 / (1 + exp(-x))
    hard_sigmoid(x) = min(max(x/6 + 1/2, 0), 1)                       (Howard et al., MobileNetV3, arXiv 1905.02244)

Relax has no operator for the last one; that form stands for it, which divides nothing, and x times it is hard_swish(x).
The constants count as these if they are within the rounding of their dtype. `simplify-algebra` goes before: it turns
powers into products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import tvm.ir
from tvm import relax

from passes.base import Dataflow, require
from passes.expression_patterns import Pattern
from passes.rule_pass import RepeatedPass
from passes.tensor_types import dtype_of, is_float, same_type

_ROOT_HALF, _ROOT_TWO, _ROOT_TWO_OVER_PI = math.sqrt(0.5), math.sqrt(2.0), math.sqrt(2 / math.pi)

_HARD_SIGMOID = f"minimum(maximum(x * {1 / 6} + 0.5, 0), 1)"


def _halved(curve: str) -> tuple[str, ...]:
    """Return the ways of writing x/2 (1 + curve)."""
    return (
        f"(x * 0.5) * ({curve} + 1)",
        f"x * (({curve} + 1) * 0.5)",
        f"(x * ({curve} + 1)) * 0.5",
        f"x * (({curve} * 0.5) + 0.5)",
    )


def _written_out() -> Iterator[tuple[str, str]]:
    """Yield how each function is written out."""
    for scaled in (f"x * {_ROOT_HALF}", f"x / {_ROOT_TWO}"):
        for pattern in _halved(f"erf({scaled})"):
            yield pattern, "gelu(x)"
    for argument in (
        f"(x + 0.044715 * (x * x * x)) * {_ROOT_TWO_OVER_PI}",
        f"(x * {_ROOT_TWO_OVER_PI}) * (1 + 0.044715 * (x * x))",
        f"(x * {_ROOT_TWO_OVER_PI}) * (1 + (0.044715 * x) * x)",
        f"x * {_ROOT_TWO_OVER_PI} + x * x * x * {0.044715 * _ROOT_TWO_OVER_PI}",
    ):
        for pattern in _halved(f"tanh({argument})"):
            yield pattern, "gelu_tanh(x)"
    yield "x * sigmoid(x)", "silu(x)"
    yield "1 / (exp(negative(x)) + 1)", "sigmoid(x)"
    yield "x / (exp(negative(x)) + 1)", "silu(x)"

    for clipped in (
        "minimum(maximum(x + 3, 0), 6)",
        "maximum(minimum(x + 3, 6), 0)",
        "minimum(relu(x + 3), 6)",
    ):
        for sixth in ("{} / 6", f"{{}} * {1 / 6}"):
            yield sixth.format(clipped), _HARD_SIGMOID
            yield sixth.format(f"(x * {clipped})"), f"x * {_HARD_SIGMOID}"


_FUNCTIONS = tuple((Pattern(pattern, exact=False), Pattern(function)) for pattern, function in _written_out())


@dataclass(frozen=True)
class WrittenOutActivation:
    """The operator that an expression is, and what it is applied to."""

    expr: relax.Expr
    function: Pattern
    argument: relax.Expr


@dataclass(frozen=True)
class RecognizeActivations(RepeatedPass[WrittenOutActivation]):
    """Put GELU, its tanh approximation, SiLU, sigmoid, and the hard sigmoid in the place of their formulas."""

    name: ClassVar[str] = "recognize-activations"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> WrittenOutActivation | None:
        """Match any way of writing one of the functions."""
        if not isinstance(expr, tvm.ir.Call) or not isinstance(expr.op, tvm.ir.Op) or not is_float(dtype_of(expr)):
            return None
        for written, function in _FUNCTIONS:
            if expr.op.name == written.operator:
                for parts in written.matches(expr, dataflow):
                    return WrittenOutActivation(expr, function, parts["x"])
        return None

    def check(self, match: WrittenOutActivation, dataflow: Dataflow) -> None:
        """Refuse where a constant gives the result another shape."""
        require(same_type(match.expr, match.argument), "the result has another shape than the function's argument")

    def rewrite(self, match: WrittenOutActivation) -> relax.Expr:
        """Return the call of the operator."""
        return match.function.build({"x": match.argument}, dtype_of(match.expr) or "")
