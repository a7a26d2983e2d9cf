"""Resize and its forerunner Upsample: every axis is resampled on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.converters.precision import HALF_TYPES, is_float
from optimizer.frontend.converters.resampling import (
    NUMPY,
    TIR,
    Axis,
    Line,
    Number,
    Sampling,
    computed_taps,
    known_taps,
    line_through,
    nearest_index,
    source_position,
    stretch,
    tap_count,
)
from optimizer.frontend.converters.runtime_axes import vector
from optimizer.frontend.dimensions import Dimension, as_expression, provably_equal, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value

_FLOAT64 = "float64"
_UNROLLED_TAPS = 4


@dataclass(frozen=True)
class _Request:
    """What a node asks for on each of `axes`: either `scales` or `sizes`, and the region of interest."""

    axes: tuple[int, ...]
    scales: Value | None
    sizes: Value | None
    region: Value | None


@dataclass(frozen=True)
class _Plan:
    """The output length and, where it is known, the scale of each axis.

    `computed` is a float64 tensor of all scales, given if one of them is only known at run time. `exact` says that the
    lengths were asked for, and not rounded from scales.
    """

    lengths: tuple[Dimension, ...]
    scales: tuple[float | None, ...]
    computed: relax.Expr | None
    exact: bool


@converter("Upsample", since=7)
def upsample_by_attribute(node: Node) -> Result:
    """Convert Upsample with scales as an attribute."""
    scales = node.constant(np.array(node.floats("scales"), np.float32))
    return _resized(node, _Request(tuple(range(node.input().rank)), scales, None, None), _old_sampling(node))


@converter("Upsample", since=9)
@converter("Resize", since=10)
def upsample(node: Node) -> Result:
    """Convert Upsample and the Resize of opset 10, which share their rules."""
    return _resized(node, _Request(tuple(range(node.input().rank)), node.input(1), None, None), _old_sampling(node))


def _old_sampling(node: Node) -> Sampling:
    return Sampling(_filter(node), "asymmetric", "ceil_to_shrink", -0.75, False, False)


@converter("Resize", since=11)
def resize(node: Node) -> Result:
    """Convert Resize by scales or to sizes, with all filters and coordinate transformations."""
    rank = node.input().rank
    axes = tuple(node.checked_axis(axis, rank) for axis in node.integers("axes", range(rank)))
    region, scales, sizes = (_given(node, index) for index in (1, 2, 3))
    if (scales is None) == (sizes is None):
        raise node.unsupported("exactly one of scales and sizes has to be given")
    sampling = Sampling(
        _filter(node),
        node.string("coordinate_transformation_mode", "half_pixel"),
        node.string("nearest_mode", "round_prefer_floor"),
        node.float("cubic_coeff_a", -0.75),
        bool(node.integer("antialias", 0)),
        bool(node.integer("exclude_outside", 0)),
    )
    if sampling.coordinates != "tf_crop_and_resize":
        region = None
    elif region is None:
        raise node.unsupported("tf_crop_and_resize needs a region of interest")
    return _resized(node, _Request(axes, scales, sizes, region), sampling)


def _given(node: Node, index: int) -> Value | None:
    """Return an optional input; before opset 13 one that is not given is an empty tensor."""
    value = node.optional_input(index)
    return None if value is None or value.shape == (0,) else value


def _filter(node: Node) -> str:
    mode = node.string("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise node.unsupported(f"mode '{mode}' is unknown")
    return mode


def _resized(node: Node, request: _Request, sampling: Sampling) -> Result:
    data = node.input()
    if sampling.filter != "nearest" and not is_float(data.dtype):
        raise node.unsupported(f"mode '{sampling.filter}' is not supported for {data.dtype}")
    plan = _known_plan(node, request, data) or _computed_plan(node, request, data)
    result: Value = data
    for place, axis in enumerate(request.axes):
        if not _is_unchanged(request, plan, place, data.shape[axis]):
            result = _resampled(node, result, axis, place, request, plan, sampling)
    return node.emit(result.expr, data.narrow_type)


def _is_unchanged(request: _Request, plan: _Plan, place: int, extent: Dimension) -> bool:
    if plan.scales[place] != 1.0 or not provably_equal(plan.lengths[place], extent):
        return False
    return request.region is None or _known_region(request, place) == (0.0, 1.0)


def _known_region(request: _Request, place: int) -> tuple[float, float] | None:
    """Return the region of interest on one of the axes if it is known; all of the axis if none is asked for."""
    if request.region is None:
        return 0.0, 1.0
    region = request.region.constant
    return None if region is None else (float(region[place]), float(region[len(request.axes) + place]))


def _known_plan(node: Node, request: _Request, data: Value) -> _Plan | None:
    """Return the plan if its lengths are known as dimensions."""
    extents = [data.shape[axis] for axis in request.axes]
    if request.scales is not None:
        if request.scales.constant is None:
            return None
        scales = tuple(float(scale) for scale in request.scales.constant)
        lengths = tuple(_scaled_length(extent, scale) for extent, scale in zip(extents, scales, strict=True))
        return _Plan(lengths, scales, None, exact=False)
    sizes = request.sizes.integers if request.sizes is not None else None
    if sizes is None:
        return None
    pairs = list(zip(sizes, extents, strict=True))
    scales = tuple(_quotient(size, extent) for size, extent in pairs)
    policy = node.string("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        computed = _computed_scales(node, request, data).expr if None in scales else None
        return _Plan(tuple(sizes), scales, computed, exact=True)
    known = [scale for scale in scales if scale is not None]
    if len(known) < len(scales) or not all(isinstance(extent, int) for extent in extents):
        return None
    scale = min(known) if policy == "not_larger" else max(known)
    return _Plan(tuple(int(scale * extent + 0.5) for extent in extents), (scale,) * len(known), None, exact=False)


def _scaled_length(extent: Dimension, scale: float) -> Dimension:
    """Return the length floor(extent * scale), which a fraction of integers gives exactly."""
    numerator, denominator = scale.as_integer_ratio()
    if isinstance(extent, int):
        return extent * numerator // denominator
    return simplified(tirx.floordiv(as_expression(extent) * numerator, tirx.const(denominator, "int64")))


def _quotient(size: Dimension, extent: Dimension) -> float | None:
    if isinstance(size, int) and isinstance(extent, int):
        return size / extent
    return 1.0 if provably_equal(size, extent) else None


def _factors(node: Node, request: _Request, given: te.Tensor, extents: te.Tensor) -> list[tvm.ir.Expr]:
    """Return the scales of all axes as expressions of the scales or sizes asked for, and of the dimensions."""
    numbers = [given[place].astype(_FLOAT64) for place in range(len(request.axes))]
    if request.scales is not None:
        return numbers
    quotients = [number / extents[place].astype(_FLOAT64) for place, number in enumerate(numbers)]
    policy = node.string("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return quotients
    extreme = quotients[0]
    for quotient in quotients[1:]:
        extreme = tirx.min(extreme, quotient) if policy == "not_larger" else tirx.max(extreme, quotient)
    return [extreme] * len(quotients)


def _asked(node: Node, request: _Request, data: Value) -> tuple[relax.Expr, relax.Expr]:
    """Return the scales or sizes that are asked for, and the dimensions they apply to, as tensors."""
    asked = request.scales if request.scales is not None else request.sizes
    if asked is None:
        raise node.unsupported("exactly one of scales and sizes has to be given")
    return asked.expr, node.shape_tensor([data.shape[axis] for axis in request.axes])


def _computed_scales(node: Node, request: _Request, data: Value) -> Value:
    def scales(given: te.Tensor, extents: te.Tensor) -> te.Tensor:
        return vector(_factors(node, request, given, extents))

    return node.compute(scales, *_asked(node, request, data))


def _computed_plan(node: Node, request: _Request, data: Value) -> _Plan:
    exact = request.scales is None and node.string("keep_aspect_ratio_policy", "stretch") == "stretch"
    half = 0.5 if request.scales is None else 0.0  # sizes that keep the aspect ratio are rounded, scaled ones cut off

    def lengths(given: te.Tensor, extents: te.Tensor) -> te.Tensor:
        places = range(len(request.axes))
        if exact:
            return vector([given[place].astype("int64") for place in places])
        factors = _factors(node, request, given, extents)
        products = [factors[place] * extents[place].astype(_FLOAT64) for place in places]
        return vector([tirx.floor(number + half).astype("int64") for number in products])

    computed = _computed_scales(node, request, data).expr
    unknown = (None,) * len(request.axes)
    return _Plan(node.compute_shape(lengths, *_asked(node, request, data)), unknown, computed, exact)


def _resampled(
    node: Node, data: Value, axis: int, place: int, request: _Request, plan: _Plan, sampling: Sampling
) -> Value:
    """Return `data` with one axis resampled."""
    length, extent, scale = plan.lengths[place], data.shape[axis], plan.scales[place]
    region = _known_region(request, place)
    if isinstance(extent, int) and isinstance(length, int) and scale is not None and region is not None:
        width = float(length) if plan.exact else scale * extent
        numbers = Axis(float(extent), float(length), scale, width, *region)
        return _resampled_by_table(node, data, axis, numbers, sampling)
    return _resampled_at_run_time(node, data, axis, place, request, plan, sampling)


def _resampled_by_table(node: Node, data: Value, axis: int, numbers: Axis, sampling: Sampling) -> Value:
    places = np.arange(int(numbers.output_length), dtype=np.float64)
    position = source_position(sampling, numbers, places, NUMPY)
    outside = None
    if sampling.coordinates == "tf_crop_and_resize":
        outside = relax.const((position < 0) | (position > numbers.length - 1))
    positions, extent = np.asarray(position), int(numbers.length)
    if sampling.filter == "nearest":
        indices = np.asarray(nearest_index(sampling, numbers, position, NUMPY)).astype(np.int64)
        line = line_through(indices, positions, extent)
        if line is None:
            taken = node.emit(relax.op.take(data.expr, relax.const(indices), axis, mode="clip"))
        else:
            taken = node.compute(lambda tensor: _along(tensor, axis, line, len(indices)), data.expr)
        return taken if outside is None else _extrapolated(node, taken, axis, outside)
    indices, weights = known_taps(sampling, numbers)
    wide = relax.const(weights.astype(_FLOAT64 if data.dtype == _FLOAT64 else "float32").T)
    lines = [line_through(column, positions, extent) for column in indices.T]
    known = [line for line in lines if line is not None]
    if len(known) == len(lines) <= _UNROLLED_TAPS:
        result = _weighted(node, data, axis, wide, known)
    else:
        result = _weighted(node, data, axis, wide, relax.const(indices.T))
    return result if outside is None else _extrapolated(node, result, axis, outside)


def _along(tensor: te.Tensor, axis: int, line: Line, length: int) -> te.Tensor:
    """Return the elements that a line picks from an axis."""

    def element(*place: tirx.Var) -> tvm.ir.Expr:
        return tensor(*place[:axis], line.at(place[axis]), *place[axis + 1 :])

    return te.compute([*tensor.shape[:axis], length, *tensor.shape[axis + 1 :]], element, name="nearest")


def _resampled_at_run_time(
    node: Node, data: Value, axis: int, place: int, request: _Request, plan: _Plan, sampling: Sampling
) -> Value:
    length, extent = as_expression(plan.lengths[place]), as_expression(data.shape[axis])
    scale, region = plan.scales[place], _known_region(request, place)
    arguments = [plan.computed] if scale is None and plan.computed is not None else []
    if region is None and request.region is not None:
        arguments.append(request.region.expr)

    def numbers(inner: tvm.ir.Expr, outer: tvm.ir.Expr, given: Sequence[te.Tensor]) -> Axis:
        own_length, output_length = inner.astype(_FLOAT64), outer.astype(_FLOAT64)
        factor = given[0][place] if scale is None else tirx.const(scale, _FLOAT64)
        width = output_length if plan.exact else factor * own_length
        if region is not None:
            return Axis(own_length, output_length, factor, width, *region)
        start, end = (given[-1][i].astype(_FLOAT64) for i in (place, len(request.axes) + place))
        return Axis(own_length, output_length, factor, width, start, end)

    def along(function: Callable[[Axis, Number], tvm.ir.Expr], dtype: str, name: str) -> Value:
        """Emit a vector with one element for each output place, a function of its source position."""

        def computed(inner: tvm.ir.Expr, outer: tvm.ir.Expr, *given: te.Tensor) -> te.Tensor:
            own = numbers(inner, outer, given)
            return te.compute(
                (outer,),
                lambda i: function(own, source_position(sampling, own, i.astype(_FLOAT64), TIR)).astype(dtype),
                name=name,
            )

        return node.compute(computed, extent, length, *arguments)

    outside = None
    if sampling.coordinates == "tf_crop_and_resize":
        outside = along(lambda own, at: tirx.any(at < 0.0, at > own.length - 1.0), "bool", "outside").expr
    if sampling.filter == "nearest":
        indices = along(lambda own, at: nearest_index(sampling, own, at, TIR), "int64", "nearest")
        result = node.emit(relax.op.take(data.expr, indices.expr, axis, mode="clip"))
    else:
        indices, weights = _tables(node, sampling, numbers, extent, length, arguments)
        result = _weighted(node, data, axis, weights.expr, indices.expr)
    return result if outside is None else _extrapolated(node, result, axis, outside)


def _tables(
    node: Node,
    sampling: Sampling,
    numbers: Callable[[tvm.ir.Expr, tvm.ir.Expr, Sequence[te.Tensor]], Axis],
    extent: tvm.ir.Expr,
    length: tvm.ir.Expr,
    arguments: Sequence[relax.Expr],
) -> tuple[Value, Value]:
    if sampling.antialias:

        def counted(inner: tvm.ir.Expr, outer: tvm.ir.Expr, *given: te.Tensor) -> te.Tensor:
            narrowing = stretch(sampling, numbers(inner, outer, given), TIR)
            return vector([tirx.Cast("int64", tap_count(sampling, narrowing, TIR))])

        (taps,) = node.compute_shape(counted, extent, length, *arguments)
    else:
        taps = tirx.const(2 if sampling.filter == "linear" else 4, "int64")

    def table(which: int, *given: object) -> te.Tensor:
        inner, outer, width, *tensors = given
        return computed_taps(sampling, numbers(inner, outer, tensors), outer, width)[which]

    indices = node.compute(lambda *given: table(0, *given), extent, length, taps, *arguments)
    weights = node.compute(lambda *given: table(1, *given), extent, length, taps, *arguments)
    return indices, weights


def _weighted(node: Node, data: Value, axis: int, weights: relax.Expr, indices: relax.Expr | Sequence[Line]) -> Value:
    """Return the sums of samples along an axis by a table of weights (taps, output elements), and one of indices.

    Where lines give the indices, one for each tap, the compiler knows which elements are read.
    """
    wide = "float32" if data.dtype in HALF_TYPES else data.dtype

    def summed(tensor: te.Tensor, weight: te.Tensor, *table: te.Tensor) -> te.Tensor:
        taps, length = weight.shape

        def sample(place: tuple[tirx.Var, ...], t: tvm.ir.Expr | int) -> tvm.ir.Expr:
            i = place[axis]
            at = indices[t].at(i) if isinstance(indices, Sequence) and isinstance(t, int) else table[0][t, i]
            value = tensor(*place[:axis], at, *place[axis + 1 :])
            return value.astype(wide) * weight[t, i].astype(wide)

        shape = [*list(tensor.shape)[:axis], length, *list(tensor.shape)[axis + 1 :]]
        if isinstance(taps, tirx.IntImm) and int(taps) <= _UNROLLED_TAPS:

            def unrolled(*place: tirx.Var) -> tvm.ir.Expr:
                total = sample(place, 0)
                for t in range(1, int(taps)):
                    total = total + sample(place, t)
                return total

            return te.compute(shape, unrolled, name="resize")
        step = te.reduce_axis((0, taps), "t")
        return te.compute(shape, lambda *place: te.sum(sample(place, step.var), axis=step), name="resize")

    tables = [] if isinstance(indices, Sequence) else [indices]
    return node.cast(node.compute(summed, data.expr, weights, *tables), data.dtype)


def _extrapolated(node: Node, data: Value, axis: int, outside: relax.Expr) -> Value:
    value = node.float("extrapolation_value", 0.0)

    def chosen(tensor: te.Tensor, mask: te.Tensor) -> te.Tensor:
        constant = tirx.const(value, str(tensor.dtype))
        return te.compute(
            tensor.shape, lambda *place: tirx.Select(mask[place[axis]], constant, tensor(*place)), name="extrapolated"
        )

    return node.compute(chosen, data.expr, outside)
