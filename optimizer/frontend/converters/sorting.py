"""Operators that order elements by value: TopK, ArgMax, ArgMin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import tvm.ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as ir

from optimizer.frontend.converters.kernel_loops import kernel, loops
from optimizer.frontend.converters.sort_keys import pays_to_select, selected_by_keys, sorted_by_digits
from optimizer.frontend.dimensions import below_zero, product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter

_INT64 = "int64"
# Up to so many elements are kept in order while the others pass by; to sort all of them takes longer beyond.
_FEW = 64
# So many elements are compared at once with the last of the first ones: most often none of them enters.
_BLOCK = 16
# Shorter lines are sorted before the digits of longer ones are counted.
_SHORT = 128
_NARROW_TYPES = ("float32", "float16", "bfloat16", "int32", "int16", "int8", "uint16", "uint8")
_MOST_PASSES = 62  # of a merge sort whose runs double from 1 to the largest int64


@converter("ArgMax")
def argmax(node: Node) -> Result:
    """Convert ArgMax: where along the axis the greatest element is, the first or the last of equal ones."""
    return _extremum(node, largest=True)


@converter("ArgMin")
def argmin(node: Node) -> Result:
    """Convert ArgMin: where along the axis the least element is, the first or the last of equal ones."""
    return _extremum(node, largest=False)


def _extremum(node: Node, largest: bool) -> Result:
    """Return the positions: the extremum, and then where the first or the last element equal to it is, both in vectors.

    Where nothing is equal to it, as NaN is not, any position in range.
    """
    value, axis = node.input(), node.axis(0)
    keep, last = bool(node.integer("keepdims", 1)), bool(node.integer("select_last_index", 0))
    length = value.shape[axis]
    narrow = isinstance(length, int) and length <= np.iinfo(np.int32).max
    dtype = "int32" if narrow else _INT64

    def positions(tensor: te.Tensor) -> te.Tensor:
        shape = list(tensor.shape)
        extent = shape.pop(axis)
        beyond = tirx.const(-1, dtype) if last else tirx.Cast(dtype, extent)

        def reduced(combine: Callable[..., tvm.ir.Expr], element: Callable[..., tvm.ir.Expr], name: str) -> te.Tensor:
            along = te.reduce_axis((0, extent), name="along")
            return te.compute(
                shape, lambda *at: combine(element(at, [*at[:axis], along.var, *at[axis:]]), axis=along), name=name
            )

        extremum = reduced(te.max if largest else te.min, lambda _, place: tensor(*place), "extremum")

        def place_if_equal(at: Sequence[tvm.ir.Expr], place: Sequence[tvm.ir.Expr]) -> tvm.ir.Expr:
            return tirx.Select(tensor(*place).equal(extremum(*at)), tirx.Cast(dtype, place[axis]), beyond)

        found = reduced(te.max if last else te.min, place_if_equal, "place")
        within = tirx.const(0, dtype)

        def result(*at: tvm.ir.Expr) -> tvm.ir.Expr:
            return tirx.Cast(_INT64, tirx.Select(found(*at).equal(beyond), within, found(*at)))

        return te.compute(shape, result, name="position")

    found = node.compute(positions, value.expr)
    return relax.op.expand_dims(found.expr, axis) if keep else found


@converter("TopK")
def top_k(node: Node) -> Result:
    """Convert TopK: the k first elements along an axis in descending (or ascending) order, and their positions.

    Of equal elements the one with the lower index comes first.
    """
    value = node.input(0)
    axis = node.axis(-1)
    (count,) = [node.integer("k")] if node.has_attribute("k") else node.shape_argument(1)
    extent = value.shape[axis]
    if isinstance(count, int) and isinstance(extent, int) and count > extent:
        raise node.unsupported(f"k is {count}, but the axis has {extent} elements")
    if not isinstance(count, int) or not isinstance(extent, int):
        node.graph.require_zero([below_zero(extent - count)])
    lines = [product(value.shape[:axis]), extent, product(value.shape[axis + 1 :])]
    data = node.emit(relax.op.reshape(value.expr, lines))
    largest = bool(node.integer("largest", 1))

    def first(tensor: te.Tensor, *_: tvm.ir.Expr) -> te.Tensor:
        return te.compute((lines[0], count, lines[2]), tensor, name="first")

    def picked(tensor: te.Tensor, positions: te.Tensor) -> te.Tensor:
        return te.compute(positions.shape, lambda i, j, k: tensor(i, positions(i, j, k), k), name="picked")

    if isinstance(count, int) and 0 < count <= _FEW:
        indices = node.compute(_first_positions, data.expr, count, largest)
    elif isinstance(count, int) and data.dtype in _NARROW_TYPES and pays_to_select(count, extent):
        select = partial(selected_by_keys, count=count, descending=largest)
        call = node.graph.builder.call_te(select, data.expr, primfunc_name_hint="topk")
        indices = node.emit_tuple(call)[0]
    else:
        is_short = isinstance(extent, int) and extent < _SHORT
        ordered = _merged_positions if is_short or data.dtype not in _NARROW_TYPES else sorted_by_digits
        # With the memory that the sort needs besides: a kernel of a GPU allocates none.
        call = node.graph.builder.call_te(ordered, data.expr, largest, primfunc_name_hint="topk")
        positions, _ = node.emit_tuple(call)
        indices = node.compute(first, positions.expr)
    values = node.compute(picked, data.expr, indices.expr)
    shape = [*value.shape[:axis], count, *value.shape[axis + 1 :]]
    return [relax.op.reshape(values.expr, shape), relax.op.reshape(indices.expr, shape)]


def _first_positions(data: te.Tensor, count: int, descending: bool) -> te.Tensor:
    """Return the positions along axis 1 of the `count` elements that come first in a stable sort.

    An element goes to its place among the first ones so far, most often nowhere: one comparison tells, and for most
    blocks of elements one loop that compilers vectorize.
    """

    def body(source: tirx.Buffer, order: tirx.Buffer) -> None:
        before, length, after = source.shape
        with loops([before, after], parallel=True) as (i, k):
            values = ir.alloc_buffer((count,), source.dtype, scope="local")
            state = ir.alloc_buffer((2,), _INT64, scope="local")  # how many there are, and where the next one goes
            entering = ir.alloc_buffer((1,), "int32", scope="local")
            ir.buffer_store(state, tirx.const(0, _INT64), [0])

            def consider(j: tvm.ir.Expr) -> None:
                value = source[i, j, k]
                enters = tirx.any(state[0] < count, _precedes(value, values[count - 1], descending))
                with ir.If(enters), ir.Then():
                    ir.buffer_store(state, tirx.min(state[0], tirx.const(count - 1, _INT64)), [1])
                    place = state[1]
                    above = tirx.max(place - 1, tirx.const(0, _INT64))
                    with ir.While(tirx.all(place > 0, _precedes(value, values[above], descending))):
                        ir.buffer_store(values, values[above], [place])
                        ir.buffer_store(order, order[i, above, k], [i, place, k])
                        ir.buffer_store(state, place - 1, [1])
                    ir.buffer_store(values, value, [state[1]])
                    ir.buffer_store(order, j, [i, state[1], k])
                    ir.buffer_store(state, tirx.min(state[0] + 1, tirx.const(count, _INT64)), [0])

            first = tirx.min(length, tirx.const(count, _INT64))
            blocks = tirx.floordiv(length - first, _BLOCK)
            with ir.serial(0, first) as j:
                consider(j)
            with ir.serial(0, blocks) as block:
                start = first + block * _BLOCK
                last = values[count - 1]
                ir.buffer_store(entering, tirx.const(0, "int32"), [0])
                with ir.serial(0, _BLOCK) as j:
                    value = source[i, start + j, k]
                    # Not the comparison itself: NaN, for which all are false, is to be looked at.
                    stays = value <= last if descending else value >= last
                    ir.buffer_store(entering, entering[0] | tirx.Select(stays, 0, 1), [0])
                with ir.If(entering[0] != 0), ir.Then(), ir.serial(0, _BLOCK) as j:
                    consider(start + j)
            with ir.serial(0, length - first - blocks * _BLOCK) as j:
                consider(first + blocks * _BLOCK + j)

    before, _, after = data.shape
    return kernel([data], [(before, count, after)], [_INT64], body, "first_positions")


def _merged_positions(data: te.Tensor, descending: bool) -> list[te.Tensor]:
    """Return the positions along axis 1 of a tensor of rank 3 in the order of their elements, and spare memory.

    The merge sort is stable. NaN counts as greater than any number.
    """

    def body(source: tirx.Buffer, order: tirx.Buffer, spare: tirx.Buffer) -> None:
        before, length, after = source.shape
        with loops([before, after], parallel=True) as (i, k):
            left, right = (ir.alloc_buffer((1,), _INT64, scope="local") for _ in range(2))
            with ir.serial(0, length) as j:
                ir.buffer_store(order, j, [i, j, k])
            with ir.serial(0, _MOST_PASSES) as step:
                width = tirx.const(1, _INT64) << step.astype(_INT64)
                with ir.If(width < length), ir.Then():
                    with ir.serial(0, tirx.floordiv(length + 2 * width - 1, 2 * width)) as run:
                        begin = run * 2 * width
                        middle = tirx.min(begin + width, length)
                        end = tirx.min(begin + 2 * width, length)
                        ir.buffer_store(left, begin, [0])
                        ir.buffer_store(right, middle, [0])
                        with ir.serial(0, end - begin) as place:
                            a = order[i, tirx.min(left[0], length - 1), k]
                            b = order[i, tirx.min(right[0], length - 1), k]
                            precedes = _precedes(source[i, b, k], source[i, a, k], descending)
                            from_right = tirx.any(left[0] >= middle, tirx.all(right[0] < end, precedes))
                            with ir.If(from_right):
                                with ir.Then():
                                    ir.buffer_store(spare, b, [i, begin + place, k])
                                    ir.buffer_store(right, right[0] + 1, [0])
                                with ir.Else():
                                    ir.buffer_store(spare, a, [i, begin + place, k])
                                    ir.buffer_store(left, left[0] + 1, [0])
                    with ir.serial(0, length) as j:
                        ir.buffer_store(order, spare[i, j, k], [i, j, k])

    shape = data.shape
    return kernel([data], [shape, shape], [_INT64, _INT64], body, "merged_positions")


def _precedes(x: tvm.ir.Expr, y: tvm.ir.Expr, descending: bool) -> tvm.ir.Expr:
    """Return whether x comes strictly before y."""
    before = x > y if descending else x < y
    if "float" not in str(x.ty.dtype if hasattr(x, "ty") else x.dtype):
        return before
    x_is_nan, y_is_nan = tirx.isnan(x), tirx.isnan(y)
    nan_first = tirx.all(x_is_nan, tirx.Not(y_is_nan)) if descending else tirx.all(y_is_nan, tirx.Not(x_is_nan))
    return tirx.any(before, nan_first)
