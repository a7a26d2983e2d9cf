"""Algebraic identities, as a table.

An identity holds for every value of its dtypes, NaN, infinities and both zeros among them, up to the sign of NaN. That
is why x + 0 is not x for floating-point numbers: -0.0 + 0 is 0. Those marked *rounded* are exact but for one more or
one less rounding of the result. What would overflow where the original does not, or the reverse, is not here: x * c * d
is kept for floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import tvm.ir
from tvm import relax

from passes.base import Dataflow, Refusal
from passes.expression_patterns import Parts, Pattern
from passes.rule_pass import RepeatedPass
from passes.tensor_types import constant_of, dtype_of, equal_shapes, is_float, is_integer, is_one, same_type, shape_of


@dataclass(frozen=True)
class Identity:
    """`before` may be computed as `after` for tensors of the dtypes that `only` accepts, where `given` holds."""

    before: str
    after: str
    only: Callable[[str | None], bool] = bool
    given: Callable[[Parts, Dataflow], bool] = lambda parts, dataflow: True

    @cached_property
    def left(self) -> Pattern:
        return Pattern(self.before)

    @cached_property
    def right(self) -> Pattern:
        return Pattern(self.after)


def _is_power_of_two(parts: Parts, _: Dataflow) -> bool:
    """Whether `c` is a power of two whose reciprocal is a normal number: dividing and multiplying round alike."""
    values = constant_of(parts["c"])
    if values is None or values.size != 1 or isinstance(parts["x"], tvm.ir.GenericConst):
        return False
    value = float(values.reshape(-1)[0].astype(np.float64))
    return value != 0 and np.isfinite(value) and abs(np.frexp(value)[0]) == 0.5 and 2.0**-14 <= abs(value) <= 2.0**14


def _never_negative_zero(parts: Parts, dataflow: Dataflow) -> bool:
    return dataflow.call(parts["x"], *_WITHOUT_NEGATIVE_ZERO) is not None


def _smaller_divisor(parts: Parts, _: Dataflow) -> bool:
    """Whether `y` is broadcast to `x`."""
    dividend, divisor = shape_of(parts["x"]) or (), shape_of(parts["y"]) or ()
    aligned = zip(dividend[::-1], divisor[::-1], strict=False)
    return len(dividend) > len(divisor) or any(is_one(b) and not is_one(a) for a, b in aligned)


def _both_constant(parts: Parts, _: Dataflow) -> bool:
    return all(isinstance(parts[name], tvm.ir.GenericConst) and not shape_of(parts[name]) for name in "cd")


_WITHOUT_NEGATIVE_ZERO = ("relax.abs", "relax.exp", "relax.sigmoid", "relax.nn.softmax")

IDENTITIES = (
    Identity("x * 1", "x"),
    Identity("x / 1", "x"),
    Identity("x ** 1", "x"),
    Identity("x - 0", "x"),
    Identity("x + 0", "x", is_integer),
    Identity("x + -0.0", "x", is_float),
    Identity("x + 0", "x", is_float, _never_negative_zero),
    Identity("x * -1", "negative(x)"),
    Identity("negative(negative(x))", "x"),
    Identity("x + negative(y)", "x - y"),
    Identity("x - negative(y)", "x + y"),
    Identity("x ** 2", "x * x"),  # rounded
    Identity("x ** 3", "x * x * x"),  # rounded
    Identity("x ** -1", "1 / x", is_float),  # rounded
    Identity("1 / sqrt(x)", "rsqrt(x)", is_float),
    Identity("x / sqrt(y)", "x * rsqrt(y)", is_float, _smaller_divisor),  # rounded; a root and a quotient per y
    Identity("x / c", "x * (1 / c)", is_float, _is_power_of_two),
    Identity("(x * c) * d", "x * (c * d)", is_integer, _both_constant),
    Identity("(x + c) + d", "x + (c + d)", is_integer, _both_constant),
    Identity("abs(abs(x))", "abs(x)"),
    Identity("abs(negative(x))", "abs(x)"),
    Identity("relu(relu(x))", "relu(x)"),
    Identity("floor(floor(x))", "floor(x)"),
    Identity("ceil(ceil(x))", "ceil(x)"),
    Identity("round(round(x))", "round(x)"),
    Identity("sign(sign(x))", "sign(x)"),
    Identity("maximum(x, x)", "x"),
    Identity("minimum(x, x)", "x"),
    Identity("where(c, x, x)", "x"),
    Identity("where(logical_not(c), x, y)", "where(c, y, x)"),
    Identity("logical_not(logical_not(x))", "x"),
    Identity("logical_and(x, x)", "x"),
    Identity("logical_or(x, x)", "x"),
    Identity("logical_and(x, 1)", "x"),
    Identity("logical_or(x, 0)", "x"),
)


@dataclass(frozen=True)
class AppliedIdentity:
    """An identity that applies to an expression, with the expression's parts."""

    identity: Identity
    expr: relax.Expr
    parts: Parts


@dataclass(frozen=True)
class SimplifyAlgebra(RepeatedPass[AppliedIdentity]):
    """Apply the identities of the table that make an expression cheaper."""

    name: ClassVar[str] = "simplify-algebra"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> AppliedIdentity | None:
        """Match the left-hand side of the first identity that holds."""
        if not isinstance(expr, tvm.ir.Call) or not isinstance(expr.op, tvm.ir.Op):
            return None
        for identity in _BY_OPERATOR.get(expr.op.name, ()):
            if not identity.only(dtype_of(expr)):
                continue
            for parts in identity.left.matches(expr, dataflow):
                if identity.given(parts, dataflow):
                    return AppliedIdentity(identity, expr, parts)
        return None

    def check(self, match: AppliedIdentity, dataflow: Dataflow) -> None:
        """Refuse where what falls away is what the result has its shape from."""
        kept = [match.parts[name] for name in sorted(match.identity.right.names())]
        if match.identity.after in match.parts:
            fits = same_type(match.expr, kept[0])
        else:
            fits = any(equal_shapes(shape_of(match.expr), shape_of(part)) for part in kept)
        if not fits:
            raise Refusal(
                f"{match.identity.before} -> {match.identity.after}: the result is broadcast to another shape"
            )

    def rewrite(self, match: AppliedIdentity) -> relax.Expr:
        """Return the right-hand side."""
        return match.identity.right.build(match.parts, dtype_of(match.expr) or "")


_BY_OPERATOR: dict[str, tuple[Identity, ...]] = {}
for _identity in IDENTITIES:
    _BY_OPERATOR[_identity.left.operator] = (*_BY_OPERATOR.get(_identity.left.operator, ()), _identity)
