"""Poolings: one value per sliding window (MaxPool, AveragePool, LpPool), per channel (Global*), and MaxUnpool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from tvm import relax, te, tirx

from optimizer.frontend.accumulation import accumulation_dtype, cast
from optimizer.frontend.converters.gathering import clipped_index
from optimizer.frontend.dimensions import Shape, as_expression, product, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.windows import Windows, sliding_windows

_MAX_POOL: dict[int, Callable[..., relax.Expr]] = {
    1: relax.op.nn.max_pool1d,
    2: relax.op.nn.max_pool2d,
    3: relax.op.nn.max_pool3d,
}
_AVERAGE_POOL: dict[int, Callable[..., relax.Expr]] = {
    1: relax.op.nn.avg_pool1d,
    2: relax.op.nn.avg_pool2d,
    3: relax.op.nn.avg_pool3d,
}
_NO_INDEX = np.iinfo(np.int64).max


@converter("MaxPool")
def max_pool(node: Node) -> Result:
    """Convert MaxPool: the largest element of each window, and optionally its index in the flattened input."""
    windows = _windows(node)
    if node.has_output(1):
        return _max_pool_with_indices(node, windows)
    pads = windows.covering_pads if node.integer("ceil_mode", 0) else windows.static_pads
    operator = _MAX_POOL.get(windows.rank)
    if pads is not None and operator is not None:
        return operator(
            node.expr(),
            pool_size=list(windows.kernel),
            strides=list(windows.strides),
            padding=pads,
            dilation=list(windows.dilations),
        )
    lowest = _lowest(node.input(0).dtype)
    return node.compute(lambda data: _reduced(data, windows, te.max, lowest, lambda element: element), node.expr())


def _windows(node: Node) -> Windows:
    return _without_unreached(
        sliding_windows(node, node.integers("kernel_shape"), ceil_mode=bool(node.integer("ceil_mode", 0)))
    )


def _without_unreached(windows: Windows) -> Windows:
    """Shorten a lone window that is longer than the padded input: what it reaches beyond that never counts."""
    kernel = list(windows.kernel)
    for axis, (size, begin, end) in enumerate(zip(windows.spatial, windows.pads_begin, windows.pads_end, strict=True)):
        padded = simplified(begin + size + end)
        if windows.output[axis] == 1 and windows.dilations[axis] == 1 and isinstance(padded, int):
            kernel[axis] = min(kernel[axis], padded)
    return replace(windows, kernel=tuple(kernel))


def _reduced(
    data: te.Tensor,
    windows: Windows,
    reduction: Callable[..., tirx.Expr],
    padding: tirx.Expr,
    transform: Callable[[tirx.Expr], tirx.Expr],
) -> te.Tensor:
    """Return the reduction of `transform(element)` over each window; elements in the padding count as `padding`."""
    reached = [
        (output - 1) * stride + extent
        for output, stride, extent in zip(windows.output, windows.strides, windows.extents, strict=True)
    ]

    def padded_element(batch: tirx.Expr, channel: tirx.Expr, *places: tirx.Expr) -> tirx.Expr:
        positions = [place - begin for place, begin in zip(places, windows.pads_begin, strict=True)]
        value = transform(data(batch, channel, *positions))
        return tirx.if_then_else(windows.inside(positions), value, padding)

    # Padding is a stage of its own, so that the reduction has the form of every other pooling.
    padded = te.compute((*data.shape[:2], *[as_expression(size) for size in reached]), padded_element, name="padded")
    offsets = windows.reduce_axes()

    def element(batch: tirx.Expr, channel: tirx.Expr, *outputs: tirx.Expr) -> tirx.Expr:
        steps = zip(outputs, windows.strides, offsets, windows.dilations, strict=True)
        places = [output * stride + offset * dilation for output, stride, offset, dilation in steps]
        return reduction(padded(batch, channel, *places), axis=offsets)

    return te.compute((*data.shape[:2], *windows.output), element, name="pool")


def _lowest(dtype: str) -> tirx.Expr:
    if dtype in ("float16", "float32", "float64", "bfloat16"):
        return tirx.const(float("-inf"), dtype)
    return tirx.min_value(dtype)


def _max_pool_with_indices(node: Node, windows: Windows) -> Result:
    """Return the maxima and their flat indices; of equal elements the one that comes first in the window counts."""
    column_major = bool(node.integer("storage_order", 0))
    dtype = node.input(0).dtype

    def better(left: Sequence[tirx.Expr], right: Sequence[tirx.Expr]) -> list[tirx.Expr]:
        takes_right = tirx.any(right[1] > left[1], tirx.all(right[1] == left[1], right[0] < left[0]))
        return [tirx.Select(takes_right, right[i], left[i]) for i in range(2)]

    reducer = te.comm_reducer(better, lambda index, value: [tirx.const(_NO_INDEX, index), _lowest(value)])

    def pool(data: te.Tensor) -> list[te.Tensor]:
        offsets = windows.reduce_axes()

        def element(batch: tirx.Expr, channel: tirx.Expr, *outputs: tirx.Expr) -> Sequence[tirx.Expr]:
            positions = windows.positions(outputs, [offset.var for offset in offsets])
            inside = windows.inside(positions)
            order = [batch, channel, *positions]
            value = tirx.if_then_else(inside, data(*order), _lowest(dtype))
            index = tirx.if_then_else(inside, _row_major(order, data.shape), tirx.const(_NO_INDEX, "int64"))
            return reducer((index, value), axis=offsets)

        index, value = te.compute((*data.shape[:2], *windows.output), element, name="max_pool")
        if column_major:
            index = te.compute(index.shape, lambda *at: _column_major(index(*at), data.shape), name="column_major")
        return [value, index]

    call = node.graph.builder.call_te(pool, node.expr(), primfunc_name_hint="max_pool_with_indices")
    return node.emit_tuple(call)


def _row_major(position: Sequence[tirx.Expr], shape: Sequence[tirx.Expr]) -> tirx.Expr:
    index: tirx.Expr = tirx.const(0, "int64")
    for coordinate, size in zip(position, shape, strict=True):
        index = index * size + coordinate
    return index


def _column_major(index: tirx.Expr, shape: Sequence[tirx.Expr]) -> tirx.Expr:
    """Return the index with the spatial axes in reversed order; batch and channel stay the outermost axes."""
    coordinates: list[tirx.Expr] = []
    for size in reversed(shape[2:]):
        coordinates.append(index % size)
        index = index // size
    for coordinate, size in zip(coordinates, reversed(shape[2:]), strict=True):
        index = index * size + coordinate
    return index


@converter("AveragePool", since=7)
def average_pool(node: Node) -> Result:
    """Convert AveragePool: the mean of each window, with or without the padding (count_include_pad).

    Positions that a window only reaches because the output size was rounded up never count.
    """
    windows = _windows(node)
    data, include = node.input(0), bool(node.integer("count_include_pad", 0))
    pads = windows.static_pads
    if node.integer("ceil_mode", 0):
        pads = None if include else windows.covering_pads
    operator = _AVERAGE_POOL.get(windows.rank)
    wide = accumulation_dtype(data.dtype)
    expr = node.cast(data, wide).expr
    if pads is not None and operator is not None and set(windows.dilations) == {1}:
        kernel, strides = list(windows.kernel), list(windows.strides)
        result = node.emit(operator(expr, pool_size=kernel, strides=strides, padding=pads, count_include_pad=include))
    else:
        result = node.compute(lambda tensor: _averages(tensor, windows, include_padding=include), expr)
    return cast(result.expr, wide, data.dtype)


def _averages(data: te.Tensor, windows: Windows, *, include_padding: bool) -> te.Tensor:
    zero = tirx.const(0, data.dtype)
    sums = _reduced(data, windows, te.sum, zero, lambda element: element)

    def average(*position: tirx.Expr) -> tirx.Expr:
        count = _counted_elements(windows, position[2:], include_padding=include_padding)
        return sums(*position) / tirx.Cast(data.dtype, count)

    return te.compute(sums.shape, average, name="average")


def _counted_elements(windows: Windows, outputs: Sequence[tirx.Expr], *, include_padding: bool) -> tirx.Expr:
    """Return how many elements of a window lie in [0, size), or in the padded range with `include_padding`."""
    count: tirx.Expr = tirx.const(1, "int64")
    for axis, output in enumerate(outputs):
        begin, dilation = windows.pads_begin[axis], windows.dilations[axis]
        low = -begin if include_padding else 0
        high = windows.spatial[axis] + (windows.pads_end[axis] if include_padding else 0)
        start = output * windows.strides[axis] - begin
        first = tirx.max(tirx.floordiv(low - start + dilation - 1, dilation), tirx.const(0, "int64"))
        last = tirx.min(tirx.floordiv(high - 1 - start, dilation), tirx.const(windows.kernel[axis] - 1, "int64"))
        count = count * (last - first + 1)
    return count


@converter("LpPool")
def lp_pool(node: Node) -> Result:
    """Convert LpPool: (sum of |x|^p)^(1/p) over each window."""
    windows, data, power = _windows(node), node.input(0), node.integer("p", 2)
    wide = accumulation_dtype(data.dtype)

    def norms(tensor: te.Tensor) -> te.Tensor:
        def raised(element: tirx.Expr) -> tirx.Expr:
            return _power(tirx.abs(tirx.Cast(wide, element)), power)

        sums = _reduced(tensor, windows, te.sum, tirx.const(0, wide), raised)
        return te.compute(sums.shape, lambda *at: tirx.Cast(data.dtype, _root(sums(*at), power)), name="norm")

    return node.compute(norms, data.expr)


def _power(base: tirx.Expr, power: int) -> tirx.Expr:
    if power in (1, 2):
        return base if power == 1 else base * base
    return tirx.power(base, tirx.const(power, base.ty.dtype))


def _root(value: tirx.Expr, power: int) -> tirx.Expr:
    if power in (1, 2):
        return value if power == 1 else tirx.sqrt(value)
    return tirx.power(value, tirx.const(1.0 / power, value.ty.dtype))


def _register_global(operator: str, reduce: Callable[[Node, relax.Expr, list[int]], relax.Expr]) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        data = node.input(0)
        if data.rank < 3:
            raise node.unsupported(f"an input of rank {data.rank} has no spatial axes")
        wide = accumulation_dtype(data.dtype)
        result = reduce(node, node.cast(data, wide).expr, list(range(2, data.rank)))
        return cast(result, wide, data.dtype)


def _global_norm(node: Node, data: relax.Expr, axes: list[int]) -> relax.Expr:
    """Return (sum of |x|^p)^(1/p) over all spatial positions of a channel."""
    power = node.integer("p", 2)
    dtype = accumulation_dtype(node.input(0).dtype)
    magnitude = relax.op.abs(data)
    raised = relax.op.power(magnitude, node.scalar(power, dtype)) if power > 1 else magnitude
    total = relax.op.sum(raised, axes, keepdims=True)
    return relax.op.power(total, node.scalar(1.0 / power, dtype)) if power > 1 else total


_register_global("GlobalAveragePool", lambda _, data, axes: relax.op.mean(data, axes, keepdims=True))
_register_global("GlobalMaxPool", lambda _, data, axes: relax.op.max(data, axes, keepdims=True))
_register_global("GlobalLpPool", _global_norm)


@converter("MaxUnpool")
def max_unpool(node: Node) -> Result:
    """Convert MaxUnpool: zeros, with each input element at its flat index (an output of MaxPool)."""
    data, rank = node.input(0), node.input(0).rank - 2
    kernel = node.integers("kernel_shape")
    strides, pads = node.integers("strides", [1] * rank), node.integers("pads", [0] * (2 * rank))
    rows = zip(data.shape[2:], kernel, strides, pads[:rank], pads[rank:], strict=True)
    inferred = (*data.shape[:2], *[simplified((size - 1) * s + k - begin - end) for size, k, s, begin, end in rows])
    output = node.shape_argument(2) if node.has_input(2) else inferred
    zeros = relax.op.zeros([as_expression(product(inferred))], data.dtype)
    flat = [as_expression(product(data.shape))]
    scattered = relax.op.scatter_elements(
        node.emit(zeros).expr,
        node.compute(_clipped, node.emit(relax.op.reshape(node.expr(1), flat)).expr, product(inferred)).expr,
        node.emit(relax.op.reshape(data.expr, flat)).expr,
    )
    unpooled = node.emit(relax.op.reshape(scattered, [as_expression(size) for size in inferred]))
    return unpooled if not node.has_input(2) else node.compute(lambda tensor: _extended(tensor, output), unpooled.expr)


def _clipped(indices: te.Tensor, size: tirx.Expr | int) -> te.Tensor:
    return te.compute(indices.shape, lambda i: clipped_index(indices[i], size), name="clipped")


def _extended(tensor: te.Tensor, shape: Shape) -> te.Tensor:
    """Return `tensor` in the leading corner of zeros of a larger shape."""

    def element(*position: tirx.Expr) -> tirx.Expr:
        inside = tirx.all(*[p < size for p, size in zip(position, tensor.shape, strict=True)])
        return tirx.if_then_else(inside, tensor(*position), tirx.const(0, tensor.dtype))

    return te.compute([as_expression(size) for size in shape], element, name="extended")


@converter("MaxRoiPool")
def max_roi_pool(node: Node) -> Result:
    """Convert MaxRoiPool: each region [batch, x1, y1, x2, y2] is cut into a grid, with the maximum of each cell.

    The corners are scaled and rounded, both ends inclusive; a cell without a position gives 0 (Fast R-CNN, arXiv
    1504.08083).
    """
    grid = node.integers("pooled_shape")
    scale = np.float32(node.float("spatial_scale", 1.0))
    dtype = node.input(0).dtype
    if dtype not in ("float32", "float64"):
        raise node.unsupported(f"elements of type {dtype}")

    def pool(data: te.Tensor, regions: te.Tensor) -> te.Tensor:
        def bounds(region: tirx.Expr, cell: Sequence[tirx.Expr]) -> list[tuple[tirx.Expr, tirx.Expr]]:
            """Return the rows and the columns [first, beyond) of a cell."""
            result: list[tuple[tirx.Expr, tirx.Expr]] = []
            for axis, column in ((0, 2), (1, 1)):
                corners = [regions(region, index) * tirx.const(scale, dtype) for index in (column, column + 2)]
                start, end = (tirx.Cast("int64", _rounded_away(corner)) for corner in corners)
                length, cells, size = tirx.max(end - start + 1, _int64(1)), grid[axis], data.shape[2 + axis]
                low = start + tirx.floordiv(cell[axis] * length, cells)
                high = start + tirx.floordiv((cell[axis] + 1) * length + cells - 1, cells)
                result.append((tirx.min(tirx.max(low, _int64(0)), size), tirx.min(tirx.max(high, _int64(0)), size)))
            return result

        position = [te.reduce_axis((0, size), name) for size, name in zip(data.shape[2:], "yx", strict=True)]

        def largest(region: tirx.Expr, channel: tirx.Expr, *cell: tirx.Expr) -> tirx.Expr:
            limits = zip(position, bounds(region, cell), strict=True)
            inside = tirx.all(*[tirx.all(at >= low, at < high) for at, (low, high) in limits])
            value = data(tirx.Cast("int64", regions(region, 0)), channel, *position)
            return te.max(tirx.if_then_else(inside, value, _lowest(dtype)), axis=position)

        maxima = te.compute((regions.shape[0], data.shape[1], *grid), largest, name="maxima")

        def or_zero(region: tirx.Expr, channel: tirx.Expr, *cell: tirx.Expr) -> tirx.Expr:
            empty = tirx.any(*[high <= low for low, high in bounds(region, cell)])
            return tirx.if_then_else(empty, tirx.const(0, dtype), maxima(region, channel, *cell))

        return te.compute(maxima.shape, or_zero, name="max_roi_pool")

    return node.compute(pool, node.expr(0), node.expr(1), primfunc_name_hint="max_roi_pool")


def _rounded_away(value: tirx.Expr) -> tirx.Expr:
    """Return `value` rounded to the nearest integer, half away from zero."""
    half = tirx.const(0.5, value.ty.dtype)
    return tirx.Select(value < 0, te.ceil(value - half), te.floor(value + half))


def _int64(number: int) -> tirx.Expr:
    return tirx.const(number, "int64")
