"""TIR functions for operators of which TVM's own would be less exact or more than one kernel.

TVM computes the variance of instance and group normalization as E[x^2] - E[x]^2, which loses all digits where the mean
is large against the deviation. Here it is the mean of the squared differences, and all steps share the axes of batch
and channel (or group), so that one row stays in cache from its first read to its last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tvm.ir
from tvm import relax, te, tirx, topi
from tvm.ir import Expr

from passes.expression_patterns import uniform_value

Legalization = Callable[[relax.BlockBuilder, tvm.ir.Call], relax.Expr]


def _instance_norm(builder: relax.BlockBuilder, call: tvm.ir.Call) -> relax.Expr:
    data, scale, shift = call.args
    if int(call.attrs.channel_axis) % data.ty.ndim != 1 or not _normalizes_from_second_axis(call):
        return call
    return builder.call_te(
        _normalize_channels, data, scale, shift, call.attrs.epsilon, primfunc_name_hint="instance_norm"
    )


def _normalize_channels(data: te.Tensor, scale: te.Tensor, shift: te.Tensor, epsilon: float) -> te.Tensor:
    def scaled(normalized: Expr, _: Expr, channel: Expr, *__: Expr) -> Expr:
        return normalized * scale[channel] + shift[channel]

    return _normalize(data, epsilon, scaled, "instance_norm")


def _group_norm(builder: relax.BlockBuilder, call: tvm.ir.Call) -> relax.Expr:
    normalized = normalized_groups(builder, call)
    if normalized is None:
        return call
    return builder.call_te(topi.reshape, builder.emit(normalized), list(call.args[0].ty.shape.values))


def normalized_groups(builder: relax.BlockBuilder, call: tvm.ir.Call) -> relax.Expr | None:
    """Return a group normalization with an axis of groups before that of their channels; None for other axes."""
    data, scale, shift = call.args
    if int(call.attrs.channel_axis) % data.ty.ndim != 1 or not _normalizes_from_second_axis(call):
        return None
    groups, shape = int(call.attrs.num_groups), list(data.ty.shape.values)
    grouped = [shape[0], groups, tirx.floordiv(shape[1], groups), *shape[2:]]
    split = builder.emit(builder.call_te(topi.reshape, data, grouped))
    return builder.call_te(_normalize_groups, split, scale, shift, call.attrs.epsilon, primfunc_name_hint="group_norm")


def _normalize_groups(data: te.Tensor, scale: te.Tensor, shift: te.Tensor, epsilon: float) -> te.Tensor:
    members = data.shape[2]

    def scaled(normalized: Expr, _: Expr, group: Expr, member: Expr, *__: Expr) -> Expr:
        channel = group * members + member
        return normalized * scale[channel] + shift[channel]

    return _normalize(data, epsilon, scaled, "group_norm")


def _trailing_norm(compute: Callable[..., te.Tensor], name: str) -> Legalization:
    """Return the legalization of a normalization over trailing axes, which reads no scale of ones or shift of zeros."""

    def legalized(builder: relax.BlockBuilder, call: tvm.ir.Call) -> relax.Expr:
        data, *parameters = call.args
        neutral = [uniform_value(part) == number for part, number in zip(parameters, (1, 0), strict=False)]
        read = [part for part, left_out in zip(parameters, neutral, strict=True) if not left_out]

        def normalized(data: te.Tensor, *given: te.Tensor) -> te.Tensor:
            others = iter(given)
            operands = [
                topi.full(part.ty.shape.values, part.ty.dtype.dtype, number) if left_out else next(others)
                for part, number, left_out in zip(parameters, (1, 0), neutral, strict=False)
            ]
            return compute(data, *operands, axis=call.attrs.axes, epsilon=call.attrs.epsilon)

        return builder.call_te(normalized, data, *read, primfunc_name_hint=name)

    return legalized


def _normalize(data: te.Tensor, epsilon: float, scaled: Callable[..., Expr], name: str) -> te.Tensor:
    """Return `data` normalized over all axes but the first two, computed in at least float32, then `scaled`."""
    dtype = "float32" if data.dtype in ("float16", "bfloat16") else data.dtype
    outer, inner = data.shape[:2], data.shape[2:]
    count = tirx.const(1, dtype)
    for extent in inner:
        count = count * tirx.Cast(dtype, extent)

    def axes() -> list[tirx.IterVar]:
        return [te.reduce_axis((0, extent), "k") for extent in inner]

    def wide(*index: Expr) -> Expr:
        return tirx.Cast(dtype, data[index])

    first, second = axes(), axes()
    total = te.compute(outer, lambda n, c: te.sum(wide(n, c, *first), axis=first), name="total")
    mean = te.compute(outer, lambda n, c: total[n, c] / count, name="mean")

    def squared(n: Expr, c: Expr, *index: Expr) -> Expr:
        difference = wide(n, c, *index) - mean[n, c]
        return difference * difference

    squares = te.compute(outer, lambda n, c: te.sum(squared(n, c, *second), axis=second), name="squares")

    def value(n: Expr, c: Expr, *index: Expr) -> Expr:
        inverse = tirx.rsqrt(squares[n, c] / count + tirx.const(epsilon, dtype))
        return tirx.Cast(data.dtype, scaled((wide(n, c, *index) - mean[n, c]) * inverse, n, c, *index))

    return te.compute(data.shape, value, name=name)


def _normalizes_from_second_axis(call: tvm.ir.Call) -> bool:
    rank = call.args[0].ty.ndim
    return sorted(int(axis) % rank for axis in call.attrs.axes) == list(range(2, rank))


LEGALIZATIONS: Mapping[str, Legalization] = {
    "relax.nn.instance_norm": _instance_norm,
    "relax.nn.group_norm": _group_norm,
    "relax.nn.layer_norm": _trailing_norm(topi.nn.layer_norm, "layer_norm"),
    "relax.nn.rms_norm": _trailing_norm(topi.nn.rms_norm, "rms_norm"),
}
