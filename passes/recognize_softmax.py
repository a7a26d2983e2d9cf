"""Softmax written out: exp(x - m) / sum(exp(x - m)) over one axis, for an m of x that is the same all along that axis.

softmax(x) = softmax(x - m) for any such m; exporters subtract the maximum, or nothing: then the sum overflows for x
beyond 88 in float32. The operator always subtracts the maximum, so that softmax(x - m) is written softmax(x), too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tvm.ir
from tvm import relax

from passes.base import Dataflow, require
from passes.expression_patterns import Pattern
from passes.rule_pass import RepeatedPass
from passes.tensor_types import dtype_of, is_one, kept_axes, same_type, shape_of

_SOFTMAX = Pattern("(e := exp(x)) / (s := sum(e))")
_SHIFTED = Pattern("x - m")


@dataclass(frozen=True)
class WrittenOutSoftmax:
    """The quotient, its argument, and the axes that the sum is over (None where they are not kept)."""

    expr: relax.Expr
    argument: relax.Expr
    axes: tuple[int, ...] | None


@dataclass(frozen=True)
class RecognizeSoftmax(RepeatedPass[WrittenOutSoftmax]):
    """Put the operator softmax in the place of its formula."""

    name: ClassVar[str] = "recognize-softmax"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> WrittenOutSoftmax | None:
        """Match a quotient of exponentials by their sum, and the operator of what was shifted before."""
        if not isinstance(expr, tvm.ir.Call) or dtype_of(expr) != "float32":
            return None
        for parts in _SOFTMAX.matches(expr, dataflow):
            axes = kept_axes(dataflow.producer(parts["s"]))
            return WrittenOutSoftmax(expr, _unshifted(parts["x"], axes, dataflow), axes)
        softmax = dataflow.call(expr, "relax.nn.softmax")
        if softmax is not None:
            axes = (int(softmax.attrs.axis) % expr.ty.ndim,)
            argument = _unshifted(softmax.args[0], axes, dataflow)
            return None if argument.same_as(softmax.args[0]) else WrittenOutSoftmax(expr, argument, axes)
        return None

    def check(self, match: WrittenOutSoftmax, dataflow: Dataflow) -> None:
        """Refuse sums over several axes."""
        require(match.axes is not None and len(match.axes) == 1, "not over one axis that is kept")
        require(same_type(match.expr, match.argument), "the result has another shape than the argument")

    def rewrite(self, match: WrittenOutSoftmax) -> relax.Expr:
        """Return the softmax of x over the axis of the sum."""
        assert match.axes is not None
        return relax.op.nn.softmax(match.argument, match.axes[0])


def _unshifted(argument: relax.Expr, axes: tuple[int, ...] | None, dataflow: Dataflow) -> relax.Expr:
    """Return x of an argument x - m where m is computed from x alone and has length 1 along `axes`."""
    for parts in _SHIFTED.matches(argument, dataflow):
        shift, shape = dataflow.producer(parts["m"]), shape_of(parts["m"])
        if axes is None or shape is None or len(shape) != argument.ty.ndim or not isinstance(shift, tvm.ir.Call):
            continue
        read = [variable for variable in relax.analysis.free_vars(shift) if isinstance(variable.ty, relax.TensorType)]
        alone = len(read) == 1 and read[0].same_as(parts["x"])
        if alone and all(is_one(shape[axis]) for axis in axes) and same_type(parts["x"], argument):
            return parts["x"]
    return argument
