"""Where the samples of a resized axis are read and how they are weighted: the formulas of ONNX's Resize.

Each formula serves twice: on numpy arrays where all numbers are known when the model is compiled, and on TIR
expressions where they are not. `Arithmetic` holds what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import tvm.ir
from tvm import te, tirx

Number: TypeAlias = "float | np.ndarray | tvm.ir.Expr"


@dataclass(frozen=True)
class Arithmetic:
    """The functions that numpy and TIR spell differently."""

    floor: Callable[..., Number]
    ceil: Callable[..., Number]
    minimum: Callable[..., Number]
    maximum: Callable[..., Number]
    absolute: Callable[..., Number]
    where: Callable[..., Number]
    both: Callable[..., Number]


NUMPY = Arithmetic(np.floor, np.ceil, np.minimum, np.maximum, np.abs, np.where, np.logical_and)
TIR = Arithmetic(tirx.floor, tirx.ceil, tirx.min, tirx.max, tirx.abs, tirx.Select, tirx.all)


@dataclass(frozen=True)
class Sampling:
    """The attributes of a Resize node that say how samples are taken.

    `filter` is nearest, linear or cubic. `nearest` is a nearest_mode, or ceil_to_shrink: the rule before opset 11.
    """

    filter: str
    coordinates: str
    nearest: str
    cubic_coefficient: float
    antialias: bool
    exclude_outside: bool


@dataclass(frozen=True)
class Axis:
    """The numbers of one axis, all floats: elements in and out, the scale, and the region of interest.

    `width` is the output length before it was rounded to a whole number of elements.
    """

    length: Number
    output_length: Number
    scale: Number
    width: Number
    region_start: Number
    region_end: Number


def source_position(sampling: Sampling, axis: Axis, place: Number, a: Arithmetic) -> Number:
    """Return the position in the input, as a float, of the output element at `place`."""
    width, last = axis.width, axis.length - 1.0
    match sampling.coordinates:
        case "align_corners":
            # A single output element would divide by zero.
            return a.where(width == 1.0, place * 0.0, place * last / a.where(width == 1.0, width, width - 1.0))
        case "asymmetric":
            return place / axis.scale
        case "half_pixel":
            return (place + 0.5) / axis.scale - 0.5
        case "pytorch_half_pixel":
            return a.where(axis.output_length > 1.0, (place + 0.5) / axis.scale - 0.5, place * 0.0)
        case "half_pixel_symmetric":
            offset = axis.length / 2.0 * (1.0 - axis.output_length / width)
            return offset + (place + 0.5) / axis.scale - 0.5
        case "tf_half_pixel_for_nn":
            return (place + 0.5) / axis.scale
        case "tf_crop_and_resize":
            extent = (axis.region_end - axis.region_start) * last
            spread = a.where(
                width == 1.0, place * 0.0 + extent / 2.0, place * extent / a.where(width == 1.0, width, width - 1.0)
            )
            return spread + axis.region_start * last
    raise ValueError(f"coordinate_transformation_mode '{sampling.coordinates}' is unknown")


def nearest_index(sampling: Sampling, axis: Axis, position: Number, a: Arithmetic) -> Number:
    """Return the index of the sample that stands for a position, as a float within the axis."""
    before = a.ceil(position) - 1.0
    fraction = position - before  # in (0, 1]: a position on a sample counts from the one before
    match sampling.nearest:
        case "floor":
            up = fraction >= 1.0
        case "ceil":
            up = fraction > 0.0
        case "round_prefer_floor":
            up = fraction > 0.5
        case "round_prefer_ceil":
            up = fraction >= 0.5
        case "ceil_to_shrink":
            up = a.where(axis.scale < 1.0, fraction > 0.0, fraction >= 1.0)
        case _:
            raise ValueError(f"nearest_mode '{sampling.nearest}' is unknown")
    return a.maximum(a.minimum(before + a.where(up, fraction * 0.0 + 1.0, fraction * 0.0), axis.length - 1.0), 0.0)


def stretch(sampling: Sampling, axis: Axis, a: Arithmetic) -> Number:
    """Return by how much the filter is compressed in samples: less than 1 where antialiasing widens it."""
    return a.minimum(axis.scale, 1.0) if sampling.antialias else axis.scale * 0.0 + 1.0


def tap_count(sampling: Sampling, narrowing: Number, a: Arithmetic) -> Number:
    """Return how many samples the filter covers, as a float."""
    radius = 1.0 if sampling.filter == "linear" else 2.0
    return -2.0 * a.floor(-radius / narrowing)


def tap(
    sampling: Sampling, axis: Axis, position: Number, place: Number, taps: Number, a: Arithmetic
) -> tuple[Number, Number]:
    """Return the index (as a float, within the axis) and the weight, not yet normalized, of one sample."""
    before = a.ceil(position) - 1.0
    index = before + 1.0 - taps / 2.0 + place
    distance = a.absolute(index - position) * stretch(sampling, axis, a)
    weight = a.maximum(1.0 - distance, 0.0) if sampling.filter == "linear" else _cubic(sampling, distance, a)
    inside = a.maximum(a.minimum(index, axis.length - 1.0), 0.0)
    if sampling.exclude_outside:
        weight = a.where(inside == index, weight, weight * 0.0)
    return inside, weight


def _cubic(sampling: Sampling, distance: Number, a: Arithmetic) -> Number:
    """Return Keys' cubic convolution kernel (IEEE Transactions on ASSP 29, 1981)."""
    c = sampling.cubic_coefficient
    near = ((c + 2.0) * distance - (c + 3.0)) * distance * distance + 1.0
    far = ((c * distance - 5.0 * c) * distance + 8.0 * c) * distance - 4.0 * c
    return a.where(distance <= 1.0, near, a.where(distance < 2.0, far, distance * 0.0))


def known_taps(sampling: Sampling, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices and the weights, each (output elements, taps), of an axis whose numbers are known."""
    taps = float(tap_count(sampling, stretch(sampling, axis, NUMPY), NUMPY))
    place = np.arange(int(axis.output_length), dtype=np.float64)[:, None]
    position = source_position(sampling, axis, place, NUMPY)
    index, weight = tap(sampling, axis, position, np.arange(int(taps), dtype=np.float64)[None, :], taps, NUMPY)
    index, weight = np.asarray(index), np.asarray(weight)
    total = weight.sum(axis=1, keepdims=True)
    return index.astype(np.int64), weight / np.where(total == 0, 1.0, total)


@dataclass(frozen=True)
class Line:
    """Indices that grow evenly: floor((numerator * place + offset) / denominator), kept within [0, last]."""

    numerator: int
    offset: int
    denominator: int
    last: int

    def at(self, place: tvm.ir.Expr) -> tvm.ir.Expr:
        """Return the index at a place as an expression."""
        quotient = tirx.floordiv(place * self.numerator + self.offset, tirx.const(self.denominator, "int64"))
        return tirx.max(tirx.min(quotient, tirx.const(self.last, "int64")), tirx.const(0, "int64"))


def line_through(indices: np.ndarray, positions: np.ndarray, length: int) -> Line | None:
    """Return the line that gives exactly `indices`, one for each of `positions` on an axis of `length`, if any does.

    The slope is that of the positions as a fraction; of the offset each index says between which bounds it is.
    """
    if len(indices) < 2:
        return None
    mean = (float(positions[-1]) - float(positions[0])) / (len(positions) - 1)
    slope = Fraction(mean).limit_denominator(4 * max(len(positions), length))
    grown = slope.numerator * np.arange(len(indices))
    least, most = slope.denominator * indices - grown, slope.denominator * (indices + 1) - 1 - grown
    lower, upper = least[indices > 0], most[indices < length - 1]
    low, high = lower.max(initial=np.iinfo(np.int64).min), upper.min(initial=np.iinfo(np.int64).max)
    if low > high or not (len(lower) or len(upper)):
        return None
    return Line(slope.numerator, int(low if len(lower) else high), slope.denominator, length - 1)


def computed_taps(
    sampling: Sampling, axis: Axis, output_length: tvm.ir.Expr, taps: tvm.ir.Expr
) -> tuple[te.Tensor, te.Tensor]:
    """Return the same as tensor expressions, each (taps, output elements)."""
    shape = (taps, output_length)
    count = taps.astype("float64")

    def entry(place: tirx.Var, t: tirx.Var) -> tuple[Number, Number]:
        position = source_position(sampling, axis, place.astype("float64"), TIR)
        return tap(sampling, axis, position, t.astype("float64"), count, TIR)

    indices = te.compute(shape, lambda t, i: tirx.Cast("int64", entry(i, t)[0]), name="indices")
    weights = te.compute(shape, lambda t, i: entry(i, t)[1], name="weights")
    step = te.reduce_axis((0, taps), "t")
    totals = te.compute((output_length,), lambda i: te.sum(weights[step, i], axis=step), name="totals")
    zero, one = tirx.const(0, "float64"), tirx.const(1, "float64")
    normalized = te.compute(
        shape, lambda t, i: weights[t, i] / tirx.Select(totals[i] == zero, one, totals[i]), name="normalized"
    )
    return indices, normalized
