"""Batch normalizations that no convolution before them took: folded into the one after them, or scale and shift.

With s = gamma / sqrt(var + epsilon) and t = beta - s * mean, which are constant at inference time:
    conv(batch_norm(x), W) = conv(x, s * W) + sum over the taps and input channels of W * t,
where the convolution is not padded, or t is 0: padding is zero behind the normalization, and not before it. Elsewhere
    batch_norm(x) = x * s + t,
which, unlike the operator, is fused with what is around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm.ir
from tvm import relax

from passes.base import Dataflow, PatternPass, require

_CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")


@dataclass(frozen=True)
class RemainingNormalization:
    """A normalization whose `result` is used, and the convolution that reads that where the two are a site together."""

    normalization: tvm.ir.Call
    result: relax.Expr
    convolution: tvm.ir.Call | None


@dataclass(frozen=True)
class ScaleBatchNorm(PatternPass[RemainingNormalization]):
    """Fold a batch normalization with constant statistics into the convolution after it, or make it x * s + t."""

    name: ClassVar[str] = "scale-batch-norm"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> RemainingNormalization | None:
        """Match a convolution of a normalization's result, and the result of any normalization."""
        convolution = dataflow.call(expr, *_CONVOLUTIONS) if isinstance(expr, tvm.ir.Call) else None
        result = expr if convolution is None else convolution.args[0]
        normalization = _normalization(dataflow.producer(result), dataflow)
        if normalization is None or (convolution is not None and not _is_constant(normalization)):
            return None
        return RemainingNormalization(normalization, result, convolution)

    def check(self, match: RemainingNormalization, dataflow: Dataflow) -> None:
        """Refuse statistics that are not constant, training, and convolutions that cannot take a normalization."""
        require(not match.normalization.attrs.training, "the normalization is not an inference-time one")
        require(_is_constant(match.normalization), "gamma, beta, mean or variance is not constant")
        if match.convolution is not None:
            _check_forward(match.convolution, match.normalization)
            require(dataflow.read_once(match.result), "something else reads the normalization before the convolution")

    def rewrite(self, match: RemainingNormalization) -> relax.Expr:
        """Return the convolution with scaled weights plus a bias, or the scaled and shifted data."""
        data = match.normalization.args[0]
        scale, shift = _scale_and_shift(match.normalization)
        dtype = str(data.ty.dtype.dtype)
        if match.convolution is None:
            axis = int(match.normalization.attrs.axis) % data.ty.ndim
            shape = [-1 if position == axis else 1 for position in range(data.ty.ndim)]
            scaled = relax.op.multiply(data, _const(scale.reshape(shape), dtype))
            return relax.op.add(scaled, _const(shift.reshape(shape), dtype))
        weights = match.convolution.args[1].value.numpy().astype(np.float64)
        taps = (1,) * (weights.ndim - 2)
        groups = int(match.convolution.attrs.groups)
        per_group = weights.reshape(groups, -1, *weights.shape[1:])
        folded = (per_group * scale.reshape(groups, 1, -1, *taps)).reshape(weights.shape)
        bias = (per_group * shift.reshape(groups, 1, -1, *taps)).sum(axis=tuple(range(2, per_group.ndim)))
        call = match.convolution
        convolution = tvm.ir.Call(call.op, [data, _const(folded, dtype)], call.attrs)
        if not shift.any():
            return convolution
        return relax.op.add(convolution, _const(bias.reshape(1, -1, *taps), dtype))


def _normalization(expr: relax.Expr, dataflow: Dataflow) -> tvm.ir.Call | None:
    """Return the batch normalization whose result `expr` takes from its tuple."""
    if not isinstance(expr, relax.TupleGetItem) or expr.index != 0:
        return None
    return dataflow.call(expr.tuple_value, "relax.nn.batch_norm")


def _is_constant(normalization: tvm.ir.Call) -> bool:
    return all(isinstance(part, tvm.ir.GenericConst) for part in normalization.args[1:5])


def _check_forward(convolution: tvm.ir.Call, normalization: tvm.ir.Call) -> None:
    """Refuse weights that are not constant, channels of another axis, and padding that would be shifted."""
    require(isinstance(convolution.args[1], tvm.ir.GenericConst), "the weights of the convolution are not constant")
    require(normalization.attrs.axis == 1, "the normalization is not over the convolution's channels")
    padded = any(int(pad) for pad in convolution.attrs.padding)
    shifted = padded and _scale_and_shift(normalization)[1].any()
    require(not shifted, "the convolution pads what is normalized with zeros, which before that are other numbers")


def _scale_and_shift(normalization: tvm.ir.Call) -> tuple[np.ndarray, np.ndarray]:
    """Return s and t in fp64."""
    gamma, beta, mean, variance = (part.value.numpy().astype(np.float64) for part in normalization.args[1:5])
    attributes = normalization.attrs
    scale = 1.0 / np.sqrt(variance + attributes.epsilon)
    if attributes.scale:
        scale = scale * gamma
    return scale, (beta if attributes.center else 0.0) - scale * mean


def _const(array: np.ndarray, dtype: str) -> relax.Expr:
    return relax.const(np.ascontiguousarray(array.astype(dtype)), dtype)
