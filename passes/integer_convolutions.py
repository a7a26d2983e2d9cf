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

# Tile registers multiply six times as many bytes as dot products do, but what follows computes all lanes of a block,
# and taps read a copy of the image. An element of these takes as long as so many multiply-adds of dot products: fitted
# to pairs of layers of 16 to 129 channels with one tap and with nine (Emerald Rapids).
_TIMES_FASTER, _FOLLOWED, _COPIED = 6, 250, 150


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


def pays_in_blocks(calls: Sequence[tvm.ir.Call], data: str, block: int, wide: int) -> bool:
    """Return whether convolutions are all dense ones of data of a type that take less time in `wide` blocks.

    Those are for tile registers, others of `block` channels for dot products.
    """
    narrow_time = wide_time = 0.0
    for call in calls:
        try:
            site = integer_convolution(call, None, data)
        except Refusal:
            return False
        if site.groups > 1:
            return False
        if not site.sums_windows:
            narrow_time += _multiplied(site, call, block) + _followed(call, block)
            wide_time += _multiplied(site, call, wide) / _TIMES_FASTER + _followed(call, wide)
            wide_time += _copied(site, wide)
    return wide_time < narrow_time


def _multiplied(site: IntegerConvolution, call: tvm.ir.Call, block: int) -> int:
    """Return the multiply-adds of whole blocks; of a first layer only the channels of its result are in such."""
    inputs = site.weights.shape[1]
    whole = inputs if inputs <= FOUR else _whole(inputs, block)
    return _elements(call, block) * whole * math.prod(site.weights.shape[2:])


def _followed(call: tvm.ir.Call, block: int) -> int:
    """Return the time of what follows the sums, in multiply-adds of dot products."""
    return _elements(call, block) * _FOLLOWED


def _copied(site: IntegerConvolution, block: int) -> int:
    """Return the time to copy what several taps read of an image, in multiply-adds of dot products."""
    return _elements(site.source, block) * _COPIED if math.prod(site.weights.shape[2:]) > 1 else 0


def _elements(image: relax.Expr, block: int) -> int:
    """Return how many elements an image [N, C, spatial...] has in whole blocks of channels."""
    channels, *sizes = map(int, image.ty.shape.values[1:])
    return _whole(channels, block) * math.prod(sizes)


def _whole(channels: int, block: int) -> int:
    return -(-channels // block) * block


def _weights(call: tvm.ir.Call) -> np.ndarray:
    """Return the weights; raises Refusal where they are no constant of int8."""
    constant = call.args[1]
    if not isinstance(constant, tvm.ir.GenericConst):
        raise Refusal("the weights are not constant")
    require(dtype_of(constant) == "int8", f"its weights are {dtype_of(constant)}, not int8")
    return constant.value.numpy()
