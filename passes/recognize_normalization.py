"""Normalizations that exporters write out, as the one operator that they are.

    layer_norm(x) = (x - mean) / sqrt(variance + epsilon) * scale + shift          (Ba et al., arXiv 1607.06450)
    rms_norm(x)   = x / sqrt(mean(x^2) + epsilon) * scale                          (Zhang, Sennrich, arXiv 1910.07467)
    instance_norm: layer_norm over the spatial axes, scale and shift per channel   (Ulyanov et al., arXiv 1607.08022)

The statistics are found first, as an operator with a scale of 1 and a shift of 0; `absorb-scales` then adds what
follows. In the operators the variance is the mean of the squared differences, whichever way it was written.
`simplify-algebra` goes before: it turns x / sqrt(y) into x * rsqrt(y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm.ir
from tvm import relax, tirx

from passes.base import Dataflow, require
from passes.expression_patterns import Pattern, uniform_value
from passes.rule_pass import RepeatedPass
from passes.tensor_types import Dimension, constant, dtype_of, kept_axes, known_shape, same_type

# A scale of ones with more elements than this would cost more than what it replaces, if nothing absorbs it.
MOST_NORMALIZED = 1 << 16

_CENTERED = (
    Pattern("(d := x - (m := mean(x))) * rsqrt((v := mean(d * d)) + e)"),
    Pattern("(x - (m := mean(x))) * rsqrt(((v := mean(x * x)) - m * m) + e)"),
)
_UNCENTERED = (Pattern("x * rsqrt((v := mean(x * x)) + e)"),)


@dataclass(frozen=True)
class WrittenOutNormalization:
    """The normalized value, what is normalized, epsilon, and the axes that each mean is over (None if not kept)."""

    expr: relax.Expr
    data: relax.Expr
    epsilon: relax.Expr
    axes: tuple[tuple[int, ...] | None, ...]
    centered: bool


@dataclass(frozen=True)
class RecognizeNormalization(RepeatedPass[WrittenOutNormalization]):
    """Put layer_norm, rms_norm or instance_norm in the place of their formulas."""

    name: ClassVar[str] = "recognize-normalization"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> WrittenOutNormalization | None:
        """Match a value multiplied by the reciprocal root of its variance or mean square."""
        if not isinstance(expr, tvm.ir.Call) or not isinstance(expr.op, tvm.ir.Op) or expr.op.name != "relax.multiply":
            return None
        for pattern in (*_CENTERED, *_UNCENTERED):
            for parts in pattern.matches(expr, dataflow):
                axes = tuple(kept_axes(dataflow.producer(parts[name])) for name in "vm" if name in parts)
                return WrittenOutNormalization(expr, parts["x"], parts["e"], axes, pattern in _CENTERED)
        return None

    def check(self, match: WrittenOutNormalization, dataflow: Dataflow) -> None:
        """Refuse dtypes, axes and constants that the operators do not take."""
        require(dtype_of(match.expr) == "float32", "statistics of this dtype are not computed in float32")
        require(uniform_value(match.epsilon) is not None, "epsilon is not one constant")
        require(None not in match.axes, "a mean does not keep its axes")
        require(len(set(match.axes)) == 1, "the mean and the variance are over different axes")
        require(same_type(match.expr, match.data), "the result has another shape than what is normalized")
        rank, axes = match.data.ty.ndim, _axes(match)
        require(0 < len(axes) < rank and axes == list(range(rank))[-len(axes) :], "the axes are not the last ones")
        shape = [_static(dimension) for dimension in _scale_shape(match)]
        known = [extent for extent in shape if extent is not None]
        require(len(known) == len(shape), "the shape of the scale is not known")
        require(math.prod(known) <= MOST_NORMALIZED, f"a scale of more than {MOST_NORMALIZED} elements")

    def rewrite(self, match: WrittenOutNormalization) -> relax.Expr:
        """Return the operator with a scale of 1 and a shift of 0."""
        shape = [int(dimension) for dimension in _scale_shape(match)]
        ones, zeros = constant(np.ones(shape, "float32")), constant(np.zeros(shape, "float32"))
        axes, rank = _axes(match), match.data.ty.ndim
        epsilon = uniform_value(match.epsilon)
        assert epsilon is not None
        if _is_instance(match):
            return relax.op.nn.instance_norm(match.data, ones, zeros, channel_axis=1, axes=axes, epsilon=epsilon)
        trailing = [axis - rank for axis in axes]
        if match.centered:
            return relax.op.nn.layer_norm(match.data, ones, zeros, axes=trailing, epsilon=epsilon)
        return relax.op.nn.rms_norm(match.data, ones, axes=trailing, epsilon=epsilon)


def _is_instance(match: WrittenOutNormalization) -> bool:
    """Whether all axes but those of batch and channel are normalized, and there are at least two.

    Or one, where a scale along it would be unknown or too large: groups of channels and positions as one axis.
    """
    rank, axes = match.data.ty.ndim, _axes(match)
    if not match.centered or axes[0] != 2 or rank < 3:
        return False
    last = _static(known_shape(match.data)[-1])
    return rank >= 4 or last is None or last > MOST_NORMALIZED


def _axes(match: WrittenOutNormalization) -> list[int]:
    return list(match.axes[0] or ())


def _scale_shape(match: WrittenOutNormalization) -> list[Dimension]:
    shape = known_shape(match.data)
    return [shape[1]] if _is_instance(match) else [shape[axis] for axis in _axes(match)]


def _static(dimension: Dimension) -> int | None:
    return int(dimension) if isinstance(dimension, tirx.IntImm) else None
