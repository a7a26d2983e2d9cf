"""Batch normalization folded into the weights and bias of the convolution before it.

With s = gamma / sqrt(var + epsilon), which is constant at inference time:
    s * (conv(x, W) + b - mean) + beta  =  conv(x, s * W) + (s * (b - mean) + beta)
and likewise for transposed convolutions, whose output channels lie on the second axis of W
(Ioffe and Szegedy, Batch Normalization, 2015, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm.ir
from tvm import relax

from passes.base import Dataflow, PatternPass, Refusal

# By the layout of the weights: [O, I/groups, ...] and, transposed, [I, O/groups, ...].
_FORWARD = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")
_TRANSPOSED = ("relax.nn.conv1d_transpose", "relax.nn.conv2d_transpose", "relax.nn.conv3d_transpose")


@dataclass(frozen=True)
class NormalizedConvolution:
    """A convolution, the bias added to it if there is one, and the batch normalization of the sum."""

    convolution: tvm.ir.Call
    bias: relax.Expr | None
    normalization: tvm.ir.Call
    intermediates: tuple[relax.Expr, ...]


@dataclass(frozen=True)
class FoldBatchNorm(PatternPass[NormalizedConvolution]):
    """Fold an inference-time batch normalization into the convolution whose result it normalizes.

    Fires when the weights, the bias if there is one, and all statistics are constant, channels lie on axis 1, and
    nobody else reads the convolution's result.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> NormalizedConvolution | None:
        """Match convolution, optionally + bias, then the first field of batch_norm."""
        if not isinstance(expr, relax.TupleGetItem) or expr.index != 0:
            return None
        normalization = dataflow.call(expr.tuple_value, "relax.nn.batch_norm")
        if normalization is None:
            return None
        data = normalization.args[0]
        addition = dataflow.call(data, "relax.add")
        bias, result = (addition.args[1], addition.args[0]) if addition is not None else (None, data)
        convolution = dataflow.call(result, *_FORWARD, *_TRANSPOSED)
        if convolution is None:
            return None
        return NormalizedConvolution(convolution, bias, normalization, (expr.tuple_value, data, result))

    def check(self, match: NormalizedConvolution, dataflow: Dataflow) -> None:
        """Refuse what is not constant, not per output channel, or read elsewhere."""
        if match.normalization.attrs.axis != 1 or match.normalization.attrs.training:
            raise Refusal("the normalization is not an inference-time one over axis 1")
        if _constant(match.convolution.args[1]) is None:
            raise Refusal("the convolution's weights are not constant")
        if any(_constant(statistic) is None for statistic in match.normalization.args[1:5]):
            raise Refusal("gamma, beta, mean or variance is not constant")
        if match.bias is not None:
            bias = _constant(match.bias)
            if bias is None:
                raise Refusal("what is added to the convolution is not constant")
            if not _is_per_channel(bias, match):
                raise Refusal("what is added to the convolution differs within a channel")
        if not all(dataflow.read_once(part) for part in match.intermediates):
            raise Refusal("the convolution's result has another user")

    def rewrite(self, match: NormalizedConvolution) -> relax.Expr:
        """Return the convolution with scaled weights, plus one bias."""
        weights = _known(match.convolution.args[1])
        gamma, beta, mean, variance = (_known(part).astype(np.float64) for part in match.normalization.args[1:5])
        attributes = match.normalization.attrs
        scale = 1.0 / np.sqrt(variance + attributes.epsilon)
        if attributes.scale:
            scale = scale * gamma
        channels = scale.size
        bias = np.zeros(channels) if match.bias is None else _known(match.bias).astype(np.float64).reshape(-1)
        shift = scale * (bias - mean) + (beta if attributes.center else 0.0)
        ones = (1,) * (weights.ndim - 1)
        call = match.convolution
        scaled = _scaled(weights, scale, call).astype(weights.dtype)
        convolution = tvm.ir.Call(call.op, [call.args[0], _const(scaled)], call.attrs)
        return relax.op.add(convolution, _const(shift.astype(weights.dtype).reshape(1, channels, *ones[1:])))


def _scaled(weights: np.ndarray, scale: np.ndarray, convolution: tvm.ir.Call) -> np.ndarray:
    """Return weights with those of each output channel multiplied by its scale, in fp64."""
    taps = (1,) * (weights.ndim - 2)
    if convolution.op.name in _FORWARD:
        return weights * scale.reshape(-1, 1, *taps)
    groups = int(convolution.attrs.groups)
    grouped = weights.reshape(groups, -1, *weights.shape[1:])
    return (grouped * scale.reshape(groups, 1, -1, *taps)).reshape(weights.shape)


def _is_per_channel(bias: np.ndarray, match: NormalizedConvolution) -> bool:
    spatial = match.convolution.args[1].ty.ndim - 2
    channels = _known(match.normalization.args[1]).size
    return bias.size in (1, channels) and bias.shape[-spatial:] == (1,) * spatial


def _constant(expr: relax.Expr) -> np.ndarray | None:
    return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None


def _known(expr: relax.Expr) -> np.ndarray:
    array = _constant(expr)
    if array is None:
        raise TypeError(f"{expr} is not a constant")
    return array


def _const(array: np.ndarray) -> relax.Expr:
    return relax.const(np.ascontiguousarray(array), array.dtype.name)
