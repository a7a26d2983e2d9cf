"""Operators that cut a tensor into parts or join parts: Slice, Split, Concat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.converters.runtime_axes import vector
from optimizer.frontend.dimensions import Dimension, Shape, as_expression, provably_equal, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import TensorValue, Value

_TO_THE_END = 2**31 - 1  # exporters write this or more for "all the rest"
_INT64 = "int64"


@dataclass(frozen=True)
class _Range:
    """The elements `begin`, `begin + step`, ... of an axis, `length` of them."""

    begin: Dimension
    step: int
    length: Dimension


@converter("Concat", since=4)
def concat(node: Node) -> Result:
    """Convert Concat along an axis; the other dimensions are the same in all inputs."""
    values = [node.input(index) for index in range(len(node.inputs))]
    axis = node.axis()
    first = values[0]
    parts = [
        node.reshaped_type(value, [*first.shape[:axis], value.shape[axis], *first.shape[axis + 1 :]])
        for value in values
    ]
    return node.emit(relax.op.concat(parts, axis) if len(parts) > 1 else parts[0], first.narrow_type)


@converter("Split", since=2)
def split(node: Node) -> Result:
    """Convert Split into parts of given sizes, or into as many equal ones as there are outputs."""
    data = node.input(0)
    axis = node.axis(0)
    sizes = _split_sizes(node, data.shape[axis])
    if all(isinstance(size, int) for size in sizes) and isinstance(data.shape[axis], int):
        if sum(sizes) != data.shape[axis]:
            raise node.unsupported(f"parts of {sizes} do not make up the dimension {data.shape[axis]}")
        if len(sizes) == 1:
            return [data]
    if all(isinstance(size, int) and size > 0 for size in sizes) and isinstance(data.shape[axis], int):
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
        fields = node.emit_tuple(relax.op.split(data.expr, ends, axis))
        return [node.emit(field.expr, data.narrow_type) for field in fields] if data.narrow_type else fields
    total = simplified(sum(map(as_expression, sizes), as_expression(0)))
    if not provably_equal(total, data.shape[axis]):
        node.graph.require_zero([as_expression(data.shape[axis]) - as_expression(total)])
    parts: list[TensorValue] = []
    begin: Dimension = 0
    for size in sizes:
        parts.append(sliced(node, data, {axis: _Range(begin, 1, size)}))
        begin = simplified(begin + size)
    return parts


def _split_sizes(node: Node, extent: Dimension) -> list[Dimension]:
    if node.has_attribute("split"):
        return list(node.integers("split"))
    if node.has_input(1):
        return list(node.shape_argument(1))
    count = node.integer("num_outputs", node.output_count)
    if isinstance(extent, int):
        part = -(-extent // count)
        return [max(min(part, extent - index * part), 0) for index in range(count)]
    part = simplified(tirx.floordiv(as_expression(extent + (count - 1)), tirx.const(count, _INT64)))
    return [*[part] * (count - 1), simplified(extent - part * (count - 1))]


@converter("Slice")
def slice_by_attributes(node: Node) -> Result:
    """Convert Slice with its bounds as attributes."""
    starts, ends = node.integers("starts"), node.integers("ends")
    return _sliced(node, starts, ends, node.integers("axes", range(len(starts))), [1] * len(starts))


@converter("Slice", since=10)
def slice_by_inputs(node: Node) -> Result:
    """Convert Slice with its bounds as inputs; negative ones count from the end, and all are clamped."""
    starts, ends = node.input(1).integers, node.input(2).integers
    axes = node.known_integers(3) if node.has_input(3) else None
    steps = node.known_integers(4) if node.has_input(4) else None
    unknown = (node.has_input(3) and axes is None) or (node.has_input(4) and steps is None)
    if starts is None or ends is None or unknown:
        return _sliced_at_run_time(node)
    count = len(starts.ravel())
    axes = list(range(count)) if axes is None else axes
    return _sliced(node, list(starts.ravel()), list(ends.ravel()), axes, [1] * count if steps is None else steps)


def _sliced(
    node: Node, starts: Sequence[Dimension], ends: Sequence[Dimension], axes: Sequence[int], steps: Sequence[int]
) -> TensorValue:
    data = node.input(0)
    ranges: dict[int, _Range] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = node.checked_axis(axis, data.rank)
        ranges[place] = _normalized(node, start, end, step, data.shape[place])
    result = sliced(node, data, ranges)
    return TensorValue(node.reshaped_type(result, _without_empty_inputs(node, result.shape)), data.narrow_type)


def _without_empty_inputs(node: Node, shape: Shape) -> list[Dimension]:
    """Return the shape with the dimensions that are known unless an input is empty; the module checks them.

    So the last row of a convolution's result is one row, whatever the image's size. A dimension of an input itself may
    well be empty, and is left alone.
    """
    data = node.input(0)
    simple = [node.graph.symbols.simplified_if_nonempty(dimension) for dimension in shape]
    return [
        short if isinstance(short, int) and not isinstance(own, tirx.Var) else dimension
        for short, dimension, own in zip(simple, shape, data.shape, strict=True)
    ]


def _normalized(node: Node, start: Dimension, end: Dimension, step: int, extent: Dimension) -> _Range:
    if isinstance(start, int) and isinstance(end, int) and isinstance(extent, int):
        begin, stop, _ = slice(start, None if step < 0 and end < -extent else end, step).indices(extent)
        return _Range(begin, step, len(range(begin, stop, step)))
    if step < 0:
        low, high = -1, simplified(extent - 1)
    else:
        low, high = 0, extent
    begin = _clamped(node, _from_the_front(node, start, extent), 0, high)
    if isinstance(end, int) and end >= _TO_THE_END:
        stop = high
    else:
        stop = _clamped(node, _from_the_front(node, end, extent), low, high)
    distance = as_expression(simplified(stop - begin if step > 0 else begin - stop))
    size = abs(step)
    length = distance if size == 1 else tirx.floordiv(distance + (size - 1), tirx.const(size, _INT64))
    return _Range(begin, step, _clamped(node, simplified(length), 0, None))


def _from_the_front(node: Node, bound: Dimension, extent: Dimension) -> Dimension:
    if isinstance(bound, int):
        return bound if bound >= 0 else simplified(extent + bound)
    if node.graph.symbols.proves(bound >= 0):
        return bound
    if node.graph.symbols.proves(bound < 0):
        return simplified(extent + bound)
    return tirx.Select(bound < 0, as_expression(extent + bound), bound)


def _clamped(node: Node, value: Dimension, low: Dimension, high: Dimension | None) -> Dimension:
    """Return min(max(value, low), high) in the simplest form that is proved to be equal to it."""
    proves = node.graph.symbols.proves
    expression = as_expression(value)
    if not proves(expression >= as_expression(low)):
        expression = tirx.max(expression, as_expression(low))
    if high is not None and not proves(expression <= as_expression(high)):
        expression = as_expression(high) if proves(expression >= as_expression(high)) else tirx.min(expression, high)
    return simplified(expression)


def sliced(node: Node, data: Value, ranges: dict[int, _Range]) -> TensorValue:
    """Return the elements of `data` in a range on each of some axes."""
    ranges = {axis: cut for axis, cut in ranges.items() if not _is_everything(cut, data.shape[axis])}
    if not ranges:
        return node.emit(data.expr, data.narrow_type)
    shape = [ranges[axis].length if axis in ranges else extent for axis, extent in enumerate(data.shape)]
    if any(isinstance(extent, int) and extent == 0 for extent in shape):
        return node.emit(relax.op.zeros(shape, data.dtype), data.narrow_type)
    static = all(isinstance(number, int) for cut in ranges.values() for number in (cut.begin, cut.length))
    if static and all(isinstance(data.shape[axis], int) and cut.step > 0 for axis, cut in ranges.items()):
        axes, cuts = list(ranges), list(ranges.values())
        ends = [cut.begin + cut.length * cut.step for cut in cuts]
        limits = [min(end, data.shape[axis]) for axis, end in zip(axes, ends, strict=True)]
        begins, steps = [cut.begin for cut in cuts], [cut.step for cut in cuts]
        return node.emit(relax.op.strided_slice(data.expr, axes, begins, limits, steps), data.narrow_type)
    if all(isinstance(cut.begin, int) and cut.step == 1 for cut in ranges.values()):
        begins = [cut.begin for cut in ranges.values()]
        ends = [as_expression(simplified(cut.begin + cut.length)) for cut in ranges.values()]
        part = relax.op.strided_slice(data.expr, list(ranges), begins, ends, [1] * len(ends), assume_inbound=True)
        return node.emit(part, data.narrow_type)
    steps = {axis: cut.step for axis, cut in ranges.items()}

    def cut(tensor: te.Tensor, *begins: tirx.Var) -> te.Tensor:
        begin = dict(zip(ranges, begins, strict=True))

        def element(*index: tirx.Var) -> tvm.ir.Expr:
            return tensor(*(begin[a] + i * steps[a] if a in begin else i for a, i in enumerate(index)))

        return te.compute([as_expression(extent) for extent in shape], element, name="slice")

    result = node.compute(cut, data.expr, *(as_expression(cut.begin) for cut in ranges.values()))
    return node.emit(result.expr, data.narrow_type)


def _is_everything(cut: _Range, extent: Dimension) -> bool:
    same = isinstance(cut.begin, int) and cut.begin == 0 and cut.step == 1
    return (
        same
        and isinstance(simplified(as_expression(cut.length) - as_expression(extent)), int)
        and simplified(as_expression(cut.length) - as_expression(extent)) == 0
    )


def _sliced_at_run_time(node: Node) -> Result:
    """Convert a Slice of which a bound, an axis or a step is known only when the module runs."""
    data = node.input(0)
    rank = data.rank
    node.vector_length(1)
    bounds = [node.expr(1), node.expr(2)]
    optional = [node.expr(index) for index in (3, 4) if node.has_input(index)]
    has_axes, has_steps = node.has_input(3), node.has_input(4)

    def table(shape: te.Tensor, *given: te.Tensor) -> tuple[list[tvm.ir.Expr], list[tvm.ir.Expr], list[tvm.ir.Expr]]:
        """Return the begin, the step and the length for each axis of the data."""
        starts, ends = given[0], given[1]
        rest = list(given[2:])
        axes = rest.pop(0) if has_axes else None
        steps = rest.pop(0) if has_steps else None
        begin: list[tvm.ir.Expr] = [tirx.const(0, _INT64)] * rank
        step: list[tvm.ir.Expr] = [tirx.const(1, _INT64)] * rank
        length: list[tvm.ir.Expr] = [shape[axis] for axis in range(rank)]
        for k in range(int(starts.shape[0])):
            stride = steps[k].astype(_INT64) if steps is not None else tirx.const(1, _INT64)
            for axis in range(rank) if axes is not None else [k]:
                cut = _bounds(starts[k].astype(_INT64), ends[k].astype(_INT64), stride, shape[axis])
                if axes is None:
                    begin[axis], step[axis], length[axis] = cut[0], stride, cut[1]
                    continue
                chosen = tirx.any(axes[k] == axis, axes[k] == axis - rank)
                begin[axis] = tirx.Select(chosen, cut[0], begin[axis])
                step[axis] = tirx.Select(chosen, stride, step[axis])
                length[axis] = tirx.Select(chosen, cut[1], length[axis])
        return begin, step, length

    arguments = [node.dimensions(data), *bounds, *optional]
    begins = node.compute(lambda *tensors: vector(table(*tensors)[0]), *arguments)
    steps = node.compute(lambda *tensors: vector(table(*tensors)[1]), *arguments)
    lengths = node.compute_shape(lambda *tensors: vector(table(*tensors)[2]), *arguments)

    def cut(tensor: te.Tensor, begin: te.Tensor, step: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tvm.ir.Expr:
            return tensor(*(begin[axis] + i * step[axis] for axis, i in enumerate(index)))

        return te.compute(lengths, element, name="slice")

    result = node.compute(cut, data.expr, begins.expr, steps.expr)
    return node.emit(result.expr, data.narrow_type)


def _bounds(
    start: tvm.ir.Expr, end: tvm.ir.Expr, step: tvm.ir.Expr, extent: tvm.ir.Expr
) -> tuple[tvm.ir.Expr, tvm.ir.Expr]:
    """Return where a slice of an axis begins and how many elements it has, for a step of either sign."""
    backwards = step < 0
    low = tirx.Select(backwards, tirx.const(-1, _INT64), tirx.const(0, _INT64))
    high = tirx.Select(backwards, extent - 1, extent)

    def clamped(bound: tvm.ir.Expr) -> tvm.ir.Expr:
        return tirx.min(tirx.max(tirx.Select(bound < 0, bound + extent, bound), low), high)

    begin, stop = clamped(start), clamped(end)
    distance = tirx.Select(backwards, begin - stop, stop - begin)
    size = tirx.max(tirx.abs(step), tirx.const(1, _INT64))
    return begin, tirx.max(tirx.floordiv(distance + size - 1, size), tirx.const(0, _INT64))


__all__ = ["sliced"]
