"""What multiplies and what is added to a normalization, as the scale and shift that the operator has.

    norm(x, scale=1, shift=0) * s = norm(x, scale=s, shift=0)
    norm(x, scale=g, shift=0) + b = norm(x, scale=g, shift=b)
    reshape(instance_norm(reshape(x, [N, G, ...]), 1, 0), shape of x) = group_norm(x, 1, 0) with G groups

where s and b have the shape of the operator's own scale, but for axes of length 1, on the axes that it lies on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm.ir
from tvm import relax, tirx

from passes.base import Dataflow, Refusal, require
from passes.expression_patterns import is_uniform
from passes.rule_pass import RepeatedPass
from passes.simplify_shapes import VIEWS, view
from passes.tensor_types import Dimension, constant, dtype_of, equal, equal_shapes, is_one, known_shape, shape_of

_SHIFTED = ("relax.nn.layer_norm", "relax.nn.instance_norm", "relax.nn.group_norm")
_NORMALIZATIONS = (*_SHIFTED, "relax.nn.rms_norm")


@dataclass(frozen=True)
class ScaledNormalization:
    """A normalization `call`, bound to `result`, and the operand that is to become its scale (1) or shift (2)."""

    result: relax.Expr
    call: tvm.ir.Call
    operand: relax.Expr
    position: int


@dataclass(frozen=True)
class GroupedNormalization:
    """An instance normalization of reshaped data, reshaped back."""

    expr: relax.Expr
    data: relax.Expr
    call: tvm.ir.Call


@dataclass(frozen=True)
class AbsorbScales(RepeatedPass[ScaledNormalization | GroupedNormalization]):
    """Make products and sums with a normalization its scale and shift."""

    name: ClassVar[str] = "absorb-scales"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> ScaledNormalization | GroupedNormalization | None:
        """Match normalization * s, normalization + b, and instance normalizations between reshapes."""
        call = dataflow.call(expr, "relax.multiply", "relax.add", *VIEWS) if isinstance(expr, tvm.ir.Call) else None
        if call is None:
            return None
        if call.op.name in VIEWS:
            return _grouped(call, dataflow)
        position = 1 if call.op.name == "relax.multiply" else 2
        for result, operand in (call.args, call.args[::-1]):
            normalization = dataflow.call(result, *_NORMALIZATIONS)
            if normalization is not None and _is_free(normalization, position):
                return ScaledNormalization(result, normalization, operand, position)
        return None

    def check(self, match: ScaledNormalization | GroupedNormalization, dataflow: Dataflow) -> None:
        """Refuse operands of other shapes, and normalizations that others read too."""
        if isinstance(match, GroupedNormalization):
            _check_groups(match)
            return
        require(dataflow.read_once(match.result), "the normalization has another reader")
        _as_scale(match.call, match.operand)

    def rewrite(self, match: ScaledNormalization | GroupedNormalization) -> relax.Expr:
        """Return the normalization with another scale, shift, or number of groups."""
        if isinstance(match, GroupedNormalization):
            return _group_norm(match)
        operands = list(match.call.args)
        operands[match.position] = _as_scale(match.call, match.operand)
        return tvm.ir.Call(match.call.op, operands, match.call.attrs)


def _is_free(call: tvm.ir.Call, position: int) -> bool:
    """Whether the scale is 1 and the shift 0, or for a shift only the latter."""
    shifted = call.op.name in _SHIFTED
    if position == 2:
        return shifted and is_uniform(call.args[2], 0.0)
    return is_uniform(call.args[1], 1.0) and (not shifted or is_uniform(call.args[2], 0.0))


def _as_scale(call: tvm.ir.Call, operand: relax.Expr) -> relax.Expr:
    """Return `operand` in the shape of the scale of `call`; raises Refusal where it has others."""
    shape, full = shape_of(operand), shape_of(call)
    own = shape_of(call.args[1])
    if shape is None or full is None or own is None or dtype_of(operand) != dtype_of(call):
        raise Refusal("the operand's shape is not known, or its dtype another")
    axes = _scale_axes(call)
    aligned = [*_ones(len(full) - len(shape)), *shape]
    require(len(shape) <= len(full), "the operand has more axes than the normalization")
    for axis, dimension in enumerate(aligned):
        if axis in axes:
            require(equal(dimension, full[axis]), f"the operand is not one number per element of axis {axis}")
        else:
            require(is_one(dimension), f"the operand differs along axis {axis}")
    return view(operand, own)


def _ones(count: int) -> list[Dimension]:
    return [tirx.IntImm("int64", 1)] * count


def _scale_axes(call: tvm.ir.Call) -> tuple[int, ...]:
    rank = call.ty.ndim
    if call.op.name in ("relax.nn.layer_norm", "relax.nn.rms_norm"):
        return tuple(int(axis) % rank for axis in call.attrs.axes)
    return (int(call.attrs.channel_axis) % rank,)


def _grouped(call: tvm.ir.Call, dataflow: Dataflow) -> GroupedNormalization | None:
    normalization = dataflow.call(call.args[0], "relax.nn.instance_norm", "relax.nn.layer_norm")
    if normalization is None or not _is_free(normalization, 1):
        return None
    reshape = dataflow.call(normalization.args[0], *VIEWS)
    if reshape is None or not equal_shapes(shape_of(reshape.args[0]), shape_of(call)):
        return None
    return GroupedNormalization(call, reshape.args[0], normalization)


def _check_groups(match: GroupedNormalization) -> None:
    shape, grouped = known_shape(match.data), known_shape(match.call)
    require(len(shape) >= 3 and len(grouped) >= 3, "no axes of batch, groups and positions")
    require(equal(shape[0], grouped[0]), "the reshape changes the batch")
    require(_normalized_axes(match.call) == tuple(range(2, len(grouped))), "not normalized over all but two axes")
    channels, groups = shape[1], grouped[1]
    require(isinstance(channels, tirx.IntImm) and isinstance(groups, tirx.IntImm), "the channels are not known")
    require(int(channels) % int(groups) == 0, "the groups do not divide the channels")


def _normalized_axes(call: tvm.ir.Call) -> tuple[int, ...]:
    return tuple(sorted(int(axis) % call.ty.ndim for axis in call.attrs.axes))


def _group_norm(match: GroupedNormalization) -> relax.Expr:
    channels, groups = int(known_shape(match.data)[1]), int(known_shape(match.call)[1])
    ones, zeros = constant(np.ones(channels, "float32")), constant(np.zeros(channels, "float32"))
    axes = list(range(2, match.data.ty.ndim))
    return relax.op.nn.group_norm(match.data, ones, zeros, groups, 1, axes, match.call.attrs.epsilon)
