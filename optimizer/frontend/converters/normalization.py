"""Normalizations: subtract a mean, divide by a deviation or a norm, scale and shift.

Statistics are computed in two passes (the mean, then the mean of the squared differences) in at least float32: the
difference E[x^2] - E[x]^2 loses all digits where the mean is large against the deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax, te, tirx

from optimizer.frontend.accumulation import accumulation_dtype, cast
from optimizer.frontend.dimensions import Shape, product, provably_equal, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value


@dataclass(frozen=True)
class _Moments:
    mean: relax.Expr
    centered: relax.Expr
    variance: relax.Expr


def _moments(node: Node, data: relax.Expr, axes: Sequence[int]) -> _Moments:
    """Return mean, data - mean, and population variance over `axes` (kept as axes of length 1)."""
    mean = node.emit(relax.op.mean(data, list(axes), keepdims=True)).expr
    centered = node.emit(relax.op.subtract(data, mean)).expr
    variance = node.emit(relax.op.mean(relax.op.multiply(centered, centered), list(axes), keepdims=True)).expr
    return _Moments(mean, centered, variance)


def _inverse_deviation(node: Node, variance: relax.Expr, dtype: str) -> relax.Expr:
    epsilon = node.scalar(node.float("epsilon", 1e-5), dtype)
    return node.emit(relax.op.rsqrt(relax.op.add(variance, epsilon))).expr


def _wide(node: Node, value: Value) -> relax.Expr:
    """Return `value` in the dtype that statistics are computed in."""
    return node.cast(value, accumulation_dtype(value.dtype)).expr


def _per_channel(node: Node, value: Value, rank: int, dtype: str) -> relax.Expr:
    """Return a [C] value as [1, C, 1, ...]."""
    return node.cast(node.reshape(value, (1, value.shape[0], *[1] * (rank - 2))), dtype).expr


def _scaled(data: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    return relax.op.add(relax.op.multiply(data, scale), bias)


@converter("BatchNormalization", since=7)
def batch_normalization(node: Node) -> Result:
    """Convert BatchNormalization: normalize each channel with given statistics, or those of the batch in training."""
    data = node.input(0)
    if data.rank < 2:
        raise node.unsupported("an input without a channel axis")
    if node.version < 9 and not node.integer("spatial", 1) and data.rank > 2:
        raise node.unsupported("spatial=0: statistics per position are not supported")
    dtype = accumulation_dtype(data.dtype)
    statistics = [node.cast(node.input(index), dtype).expr for index in range(1, 5)]
    training = node.integer("training_mode", 0) if node.version >= 14 else any(map(node.has_output, range(1, 5)))
    if training:
        return _training_normalization(node, dtype)
    epsilon = node.float("epsilon", 1e-5)
    normalized = relax.op.nn.batch_norm(_wide(node, data), *statistics, axis=1, epsilon=epsilon, training=False)
    return cast(node.emit(relax.TupleGetItem(node.graph.builder.emit(normalized), 0)).expr, dtype, data.dtype)


def _training_normalization(node: Node, dtype: str) -> Result:
    """Return the batch normalized by its own statistics, and the running statistics after it."""
    data = node.input(0)
    axes = [axis for axis in range(data.rank) if axis != 1]
    scale, bias = (_per_channel(node, node.input(index), data.rank, dtype) for index in (1, 2))
    moments = _moments(node, _wide(node, data), axes)
    normalized = relax.op.multiply(moments.centered, _inverse_deviation(node, moments.variance, dtype))
    momentum = node.float("momentum", 0.9)
    running: list[relax.Expr] = []
    for index, current in ((3, moments.mean), (4, moments.variance)):
        given = node.input(index)
        flat = node.emit(relax.op.squeeze(current, axes)).expr
        updated = relax.op.add(
            relax.op.multiply(node.cast(given, dtype).expr, node.scalar(momentum, dtype)),
            relax.op.multiply(flat, node.scalar(1.0 - momentum, dtype)),
        )
        running.append(cast(updated, dtype, given.dtype))
    return [cast(_scaled(normalized, scale, bias), dtype, data.dtype), *running]


@converter("InstanceNormalization")
def instance_normalization(node: Node) -> Result:
    """Convert InstanceNormalization: normalize each channel of each sample over its spatial axes."""
    data = node.input(0)
    if data.rank < 3:
        raise node.unsupported("an input without spatial axes")
    dtype = accumulation_dtype(data.dtype)
    scale, bias = (node.cast(node.input(index), dtype).expr for index in (1, 2))
    axes, epsilon = list(range(2, data.rank)), node.float("epsilon", 1e-5)
    result = relax.op.nn.instance_norm(_wide(node, data), scale, bias, channel_axis=1, axes=axes, epsilon=epsilon)
    return cast(result, dtype, data.dtype)


@converter("GroupNormalization", since=18)
def group_normalization(node: Node) -> Result:
    """Convert GroupNormalization: normalize each group of channels of each sample (arXiv 1803.08494).

    Scale and bias are per group in opset 18, per channel from opset 21 on.
    """
    data, groups = node.input(0), node.integer("num_groups")
    dtype = accumulation_dtype(data.dtype)
    rest = product(data.shape[1:])
    if isinstance(rest, int) and rest % groups:
        raise node.unsupported(f"{data.shape[1]} channels do not divide into {groups} groups")
    if node.version >= 21 and data.rank > 2 and isinstance(data.shape[1], int):
        scale, bias = (node.cast(node.input(index), dtype).expr for index in (1, 2))
        axes, epsilon = list(range(2, data.rank)), node.float("epsilon", 1e-5)
        result = relax.op.nn.group_norm(_wide(node, data), scale, bias, groups, 1, axes, epsilon)
        return cast(result, dtype, data.dtype)
    grouped = node.reshape(node.cast(data, dtype), (data.shape[0], groups, simplified(rest // groups)))
    moments = _moments(node, grouped.expr, [2])
    normalized = node.emit(relax.op.multiply(moments.centered, _inverse_deviation(node, moments.variance, dtype)))
    if node.version < 21:
        scale, bias = (_per_channel(node, node.input(index), 3, dtype) for index in (1, 2))
        scaled = node.reshape(node.emit(_scaled(normalized.expr, scale, bias)), data.shape).expr
    else:
        scale, bias = (_per_channel(node, node.input(index), data.rank, dtype) for index in (1, 2))
        scaled = _scaled(node.reshape(normalized, data.shape).expr, scale, bias)
    return cast(scaled, dtype, data.dtype)


@converter("LayerNormalization")
def layer_normalization(node: Node) -> Result:
    """Convert LayerNormalization: normalize over the axes from `axis` on; optionally the mean and 1/deviation too."""
    data, scale, bias = node.input(0), node.input(1), node.optional_input(2)
    axis = node.axis(-1)
    normalized_shape = data.shape[axis:]
    plain = not node.has_output(1) and not node.has_output(2) and data.dtype != "float64"
    if plain and _has_shape(scale, normalized_shape) and (bias is None or _has_shape(bias, normalized_shape)):
        dtype = data.dtype if data.dtype == "float16" else accumulation_dtype(data.dtype)
        shift = _zeros(node, scale) if bias is None else bias
        operands = [node.cast(value, dtype).expr for value in (data, scale, shift)]
        axes = list(range(axis - data.rank, 0))
        result = relax.op.nn.layer_norm(*operands, axes=axes, epsilon=node.float("epsilon", 1e-5))
        return cast(result, dtype, data.dtype)
    dtype = accumulation_dtype(data.dtype)
    moments = _moments(node, _wide(node, data), range(axis, data.rank))
    inverse = _inverse_deviation(node, moments.variance, dtype)
    result = relax.op.multiply(relax.op.multiply(moments.centered, inverse), node.cast(scale, dtype).expr)
    if bias is not None:
        result = relax.op.add(result, node.cast(bias, dtype).expr)
    stash = _stash_dtype(node)
    return [cast(result, dtype, data.dtype), cast(moments.mean, dtype, stash), cast(inverse, dtype, stash)]


def _has_shape(value: Value, shape: Shape) -> bool:
    return value.rank == len(shape) and all(provably_equal(a, b) for a, b in zip(value.shape, shape, strict=True))


def _zeros(node: Node, like: Value) -> Value:
    if all(isinstance(dimension, int) for dimension in like.shape):
        return node.constant(np.zeros(like.shape, like.dtype))
    return node.emit(relax.op.zeros_like(like.expr))


def _stash_dtype(node: Node) -> str:
    names = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
    stash = node.integer("stash_type", 1)
    if stash not in names:
        raise node.unsupported(f"stash_type {stash}")
    return names[stash]


@converter("RMSNormalization")
def rms_normalization(node: Node) -> Result:
    """Convert RMSNormalization: divide by the root mean square over the axes from `axis` on, and scale."""
    return rms_norm(node, node.input(0), node.input(1), node.axis(-1), node.float("epsilon", 1e-5))


def rms_norm(node: Node, data: Value, scale: Value, axis: int, epsilon: float) -> relax.Expr:
    """Return x / sqrt(mean(x^2) + epsilon) * scale over the axes from `axis` on, computed in at least float32."""
    dtype = accumulation_dtype(data.dtype)
    wide, wide_scale = node.cast(data, dtype).expr, node.cast(scale, dtype).expr
    if dtype == "float32" and axis > 0 and _has_shape(scale, data.shape[axis:]):
        result = relax.op.nn.rms_norm(wide, wide_scale, axes=list(range(axis - data.rank, 0)), epsilon=epsilon)
    else:
        squares = relax.op.mean(relax.op.multiply(wide, wide), list(range(axis, data.rank)), keepdims=True)
        inverse = relax.op.rsqrt(relax.op.add(squares, node.scalar(epsilon, dtype)))
        result = relax.op.multiply(relax.op.multiply(wide, inverse), wide_scale)
    return cast(node.emit(result).expr, dtype, data.dtype)


@converter("LpNormalization")
def lp_normalization(node: Node) -> Result:
    """Convert LpNormalization: divide by the L1 or L2 norm along one axis; a vector of zeros stays zero."""
    data, axis, power = node.input(0), node.axis(-1), node.integer("p", 2)
    dtype = accumulation_dtype(data.dtype)
    wide = _wide(node, data)
    if power == 1:
        norm = relax.op.sum(relax.op.abs(wide), [axis], keepdims=True)
    elif power == 2:
        norm = relax.op.sqrt(relax.op.sum(relax.op.multiply(wide, wide), [axis], keepdims=True))
    else:
        raise node.unsupported(f"p={power}; only 1 and 2 are defined")
    norm = node.emit(norm).expr
    nonzero = relax.op.where(relax.op.equal(norm, node.scalar(0, dtype)), node.scalar(1, dtype), norm)
    return cast(node.emit(relax.op.divide(wide, nonzero)).expr, dtype, data.dtype)


@converter("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node) -> Result:
    """Convert MeanVarianceNormalization: (x - mean) / (deviation + 1e-9), the constant being that of the operator."""
    data = node.input(0)
    dtype = accumulation_dtype(data.dtype)
    axes = [node.checked_axis(axis, data.rank) for axis in node.integers("axes", [0, 2, 3])]
    moments = _moments(node, _wide(node, data), axes)
    deviation = relax.op.add(relax.op.sqrt(moments.variance), node.scalar(1e-9, dtype))
    return cast(relax.op.divide(moments.centered, deviation), dtype, data.dtype)


@converter("LRN")
def local_response_normalization(node: Node) -> Result:
    """Convert LRN: divide by (bias + alpha/size * the squares summed over `size` neighbouring channels)^beta."""
    size, data = node.integer("size"), node.input(0)
    alpha, beta, bias = node.float("alpha", 1e-4), node.float("beta", 0.75), node.float("bias", 1.0)
    wide = accumulation_dtype(data.dtype)
    before = (size - 1) // 2

    def normalize(tensor: te.Tensor) -> te.Tensor:
        neighbour = te.reduce_axis((0, size), "neighbour")

        def square(batch: tirx.Expr, channel: tirx.Expr, *spatial: tirx.Expr) -> tirx.Expr:
            other = channel + neighbour - before
            value = tirx.Cast(wide, tensor(batch, other, *spatial))
            inside = tirx.all(other >= 0, other < tensor.shape[1])
            return te.sum(tirx.if_then_else(inside, value * value, tirx.const(0, wide)), axis=neighbour)

        squares = te.compute(tensor.shape, square, name="squares")

        def quotient(*at: tirx.Expr) -> tirx.Expr:
            base = tirx.const(bias, wide) + tirx.const(alpha / size, wide) * squares(*at)
            return tirx.Cast(data.dtype, tirx.Cast(wide, tensor(*at)) / tirx.power(base, tirx.const(beta, wide)))

        return te.compute(tensor.shape, quotient, name="lrn")

    return node.compute(normalize, data.expr)
