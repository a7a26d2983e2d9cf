"""Convolutions of 8-bit data with constant 8-bit weights, summed exactly in int32.

The data are of the type that the target multiplies with int8 (`passes.recognize_integer_products` sees to it). A border
of zeros is left out by the schedule; one of another value, a zero point, is written out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm.ir
from tvm import relax

from passes.base import Refusal, require
from passes.blocked_operators import INTEGER_SUM, Geometry
from passes.convolution_sites import check_layouts, geometry_of
from passes.tensor_types import dtype_of
from schedules.intrin.byte_dot import FOUR

# Tile registers multiply six times as many bytes as dot products do, but what follows computes all lanes of a block.
_FILLED = 0.75


@dataclass(frozen=True)
class Border:
    """A tensor [N, C, spatial...] with a border of `value`: what is inside, and the border's widths."""

    source: relax.Expr
    pads_begin: tuple[int, ...]
    pads_end: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class IntegerConvolution:
    """A convolution of `source` inside a border of the value `border`, whose widths `geometry` has."""

    source: relax.Expr
    weights: np.ndarray
    groups: int
    geometry: Geometry
    border: float

    @property
    def channels(self) -> int:
        """The input channels, in whole fours."""
        return -(-self.weights.shape[1] * self.groups // FOUR) * FOUR

    @property
    def depthwise(self) -> bool:
        return self.weights.shape[1] == 1 and self.groups > 1

    @property
    def sums_windows(self) -> bool:
        """Whether the only output is the sum of all that a window reads."""
        return self.weights.shape[0] == 1 and self.groups == 1 and bool((self.weights == 1).all())

    def split(self) -> tuple[Geometry, Geometry]:
        """Return the geometry of the convolution itself and the border that is to be written out before it."""
        zeros = (0,) * len(self.geometry.strides)
        inside = replace(self.geometry, pads_begin=zeros, pads_end=zeros)
        return (self.geometry, inside) if self.border == 0 else (inside, self.geometry)


def is_integer(call: tvm.ir.Call) -> bool:
    """Return whether a convolution sums integers."""
    return dtype_of(call) == INTEGER_SUM


def border_of(call: tvm.ir.Call) -> Border | None:
    """Return the border that a constant padding puts around an image, None for any other call."""
    if call.op.name != "relax.nn.pad" or call.attrs.pad_mode != "constant":
        return None
    widths = [int(width) for width in call.attrs.pad_width]
    begins, ends = tuple(widths[::2]), tuple(widths[1::2])
    if any((*begins[:2], *ends[:2])) or min(widths) < 0:
        return None
    return Border(call.args[0], begins[2:], ends[2:], float(call.attrs.pad_value))


def integer_convolution(call: tvm.ir.Call, border: Border | None, data: str) -> IntegerConvolution:
    """Return a convolution of data of a type, whose data may have a border; raises Refusal for another."""
    require(bool(data), "the target has no dot products of bytes")
    check_layouts(call)
    source, own = call.args[0], dtype_of(call.args[0])
    require(own == data, f"its data are {own}, where the target multiplies {data}")
    geometry, value = geometry_of(call), 0
    is_padded = any((*geometry.pads_begin, *geometry.pads_end))
    if border is not None and (border.value == 0 or not is_padded):
        source, value = border.source, border.value
        begins, ends = (
            zip(geometry.pads_begin, border.pads_begin, strict=True),
            zip(geometry.pads_end, border.pads_end, strict=True),
        )
        geometry = replace(geometry, pads_begin=tuple(map(sum, begins)), pads_end=tuple(map(sum, ends)))
    return IntegerConvolution(source, _weights(call), int(call.attrs.groups), geometry, value)


def fill_blocks(calls: Sequence[tvm.ir.Call], data: str, block: int) -> bool:
    """Return whether convolutions are all dense ones of data of a type that fill most of blocks of so many channels.

    Of a first layer only the channels of its result count.
    """
    given = filled = 0
    for call in calls:
        try:
            site = integer_convolution(call, None, data)
        except Refusal:
            return False
        if site.groups > 1:
            return False
        if site.sums_windows:
            continue
        outputs, inputs = site.weights.shape[:2]
        taps = math.prod(site.weights.shape[2:])
        whole = [-(-outputs // block) * block, inputs if inputs <= FOUR else -(-inputs // block) * block]
        given += outputs * inputs * taps
        filled += math.prod(whole) * taps
    return given > 0 and given >= _FILLED * filled


def _weights(call: tvm.ir.Call) -> np.ndarray:
    """Return the weights; raises Refusal where they are no constant of int8."""
    constant = call.args[1]
    if not isinstance(constant, tvm.ir.GenericConst):
        raise Refusal("the weights are not constant")
    require(dtype_of(constant) == "int8", f"its weights are {dtype_of(constant)}, not int8")
    return constant.value.numpy()
