"""Softmax written out: exp(x - max(x)) / sum(exp(x - max(x))), with or without the maximum, over one axis.

Without the maximum the sum overflows for x beyond 88 in float32; the operator always subtracts it, and agrees
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tvm.ir
from tvm import relax

from passes.base import Dataflow, require
from passes.expression_patterns import Pattern
from passes.rule_pass import RepeatedPass
from passes.tensor_types import dtype_of, kept_axes, same_type

_PATTERNS = (
    Pattern("(e := exp(x - (m := max(x)))) / (s := sum(e))"),
    Pattern("(e := exp(x)) / (s := sum(e))"),
)


@dataclass(frozen=True)
class WrittenOutSoftmax:
    """The quotient, its argument, and the axes that each reduction is over (None where they are not kept)."""

    expr: relax.Expr
    argument: relax.Expr
    axes: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class RecognizeSoftmax(RepeatedPass[WrittenOutSoftmax]):
    """Put the operator softmax in the place of its formula."""

    name: ClassVar[str] = "recognize-softmax"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> WrittenOutSoftmax | None:
        """Match a quotient of exponentials by their sum."""
        if not isinstance(expr, tvm.ir.Call) or dtype_of(expr) != "float32":
            return None
        for pattern in _PATTERNS:
            for parts in pattern.matches(expr, dataflow):
                axes = tuple(kept_axes(dataflow.producer(parts[name])) for name in "sm" if name in parts)
                return WrittenOutSoftmax(expr, parts["x"], axes)
        return None

    def check(self, match: WrittenOutSoftmax, dataflow: Dataflow) -> None:
        """Refuse reductions over several or different axes."""
        require(all(axes is not None and len(axes) == 1 for axes in match.axes), "not over one axis that is kept")
        require(len(set(match.axes)) == 1, "the maximum and the sum are over different axes")
        require(same_type(match.expr, match.argument), "the result has another shape than the argument")

    def rewrite(self, match: WrittenOutSoftmax) -> relax.Expr:
        """Return the softmax of x over the axis of the sum."""
        axes = match.axes[0]
        assert axes is not None
        return relax.op.nn.softmax(match.argument, axes[0])
