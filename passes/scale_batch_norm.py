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

from passes.base import Dataflow, PatternPass, Refusal

_CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")


@dataclass(frozen=True)
class RemainingNormalization:
    """An inference-time normalization, and the convolution that alone reads its result if there is one."""

    normalization: tvm.ir.Call
    convolution: tvm.ir.Call | None


@dataclass(frozen=True)
class ScaleBatchNorm(PatternPass[RemainingNormalization]):
    """Fold a batch normalization with constant statistics into the convolution after it, or make it x * s + t."""

    name: ClassVar[str] = "scale-batch-norm"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> RemainingNormalization | None:
        """Match a convolution of a normalization's result that it alone reads, and the result of any normalization."""
        if isinstance(expr, tvm.ir.Call):
            convolution = dataflow.call(expr, *_CONVOLUTIONS)
            if convolution is None or not dataflow.read_once(convolution.args[0]):
                return None
            normalization = _normalization(dataflow.producer(convolution.args[0]), dataflow)
            if normalization is None or not _folds_forward(convolution, normalization):
                return None
            return RemainingNormalization(normalization, convolution)
        normalization = _normalization(expr, dataflow)
        return None if normalization is None else RemainingNormalization(normalization, None)

    def check(self, match: RemainingNormalization, dataflow: Dataflow) -> None:
        """Refuse statistics that are not constant, and training."""
        if match.normalization.attrs.training:
            raise Refusal("the normalization is not an inference-time one")
        if any(not isinstance(part, tvm.ir.GenericConst) for part in match.normalization.args[1:5]):
            raise Refusal("gamma, beta, mean or variance is not constant")

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


def _folds_forward(convolution: tvm.ir.Call, normalization: tvm.ir.Call) -> bool:
    """Return whether the convolution, of constant weights, reads channels of axis 1, and no padding that is shifted."""
    constant = isinstance(convolution.args[1], tvm.ir.GenericConst)
    known = all(isinstance(part, tvm.ir.GenericConst) for part in normalization.args[1:5])
    if not constant or not known or normalization.attrs.axis != 1 or normalization.attrs.training:
        return False
    return not any(int(pad) for pad in convolution.attrs.padding) or not _scale_and_shift(normalization)[1].any()


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
