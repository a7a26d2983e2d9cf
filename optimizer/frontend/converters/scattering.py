"""Operators that write elements at computed positions of a copy: ScatterElements, ScatterND, TensorScatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm.ir
from tvm import te, tirx
from tvm.script.ir_builder import tirx as ir

from optimizer.frontend.converters.gathering import clipped_index
from optimizer.frontend.converters.kernel_loops import LANES, copy, kernel, loops
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import TensorValue
from passes.cache_append import CIRCULAR, SCATTERS
from schedules.loops import prefetch

_COMBINE: dict[str, Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": tirx.max,
    "min": tirx.min,
}


# Into how many strips rows are divided where each has a whole number of vectors.
_STRIPS = (4, 2, 1)
# Neighbouring lines that a task of ScatterElements takes through the axis together: several lines of a cache of each
# array, where one alone would read all of these lines for an element of each.
_LINES_TOGETHER = 64


@converter("Scatter", since=9)
@converter("ScatterElements", since=11)
def scatter_elements(node: Node) -> Result:
    """Convert ScatterElements: out[indices[i][j]][j] = updates[i][j] for axis 0, combined by `reduction`."""
    combine = _combine(node)
    axis = node.axis(0)

    def body(data: tirx.Buffer, indices: tirx.Buffer, updates: tirx.Buffer, out: tirx.Buffer) -> None:
        copy(data, out)
        extents = list(indices.shape)
        lines = [extent for place, extent in enumerate(extents) if place != axis]

        def place(line: Sequence[tvm.ir.Expr], along: tvm.ir.Expr) -> tuple[tvm.ir.Expr, ...]:
            return (*line[:axis], along, *line[axis:])

        def position(line: Sequence[tvm.ir.Expr], along: tvm.ir.Expr) -> tvm.ir.Expr:
            return clipped_index(indices[place(line, along)], data.shape[axis])

        def write(line: Sequence[tvm.ir.Expr], along: tvm.ir.Expr, target: tvm.ir.Expr) -> None:
            written = place(line, target)
            ir.buffer_store(out, combine(out[written], updates[place(line, along)]), list(written))

        width = lines[-1].value if axis < len(lines) and isinstance(lines[-1], tirx.IntImm) else 0
        if width < 2 * _LINES_TOGETHER:
            with loops(lines, parallel=True) as line, ir.serial(0, extents[axis]) as along:
                write(line, along, position(line, along))
            return
        strips = tirx.const(-(-width // _LINES_TOGETHER), "int64")
        with loops([*lines[:-1], strips], parallel=True) as (*outer, strip), ir.serial(0, extents[axis]) as along:
            start = strip * _LINES_TOGETHER
            count = tirx.min(lines[-1] - start, _LINES_TOGETHER)
            targets = ir.alloc_buffer((_LINES_TOGETHER,), str(indices.dtype), scope="local")
            # A store waits for its line, and the next ones for it: all lines are asked for before the first store.
            with ir.serial(0, count) as own:
                line = [*outer, start + own]
                ir.buffer_store(targets, position(line, along), [own])
                ir.evaluate(prefetch(out[place(line, targets[own])]).value)
            with ir.serial(0, count) as own:
                write([*outer, start + own], along, targets[own])

    return _scattered(node, body)


@converter("ScatterND", since=11)
def scatter_nd(node: Node) -> Result:
    """Convert ScatterND: the last dimension of the indices addresses the first axes of the output."""
    combine = _combine(node)
    depth = node.input(1).shape[-1]
    if not isinstance(depth, int):
        raise node.unsupported("the last dimension of the indices has to be known at compile time")

    def body(data: tirx.Buffer, indices: tirx.Buffer, updates: tirx.Buffer, out: tirx.Buffer) -> None:
        copy(data, out)
        outer, rest = list(indices.shape)[:-1], list(data.shape)[depth:]
        width = rest[-1].value if rest and isinstance(rest[-1], tirx.IntImm) else 1
        strips = next(count for count in _STRIPS if width % (count * LANES) == 0 or count == 1)
        lanes = LANES if width % LANES == 0 else 1
        middle = rest[:-1] if lanes > 1 else rest

        # Two of the positions may be the same, so each thread takes them in order, for a strip of the last axis.
        with loops([tirx.const(strips, "int64")], parallel=strips > 1) as (strip,), loops(outer) as place:
            address = [clipped_index(indices[(*place, k)], data.shape[k]) for k in range(depth)]
            with loops(middle) as between:
                if lanes == 1:
                    target = (*address, *between)
                    ir.buffer_store(out, combine(out[target], updates[(*place, *between)]), list(target))
                    return
                with ir.serial(0, width // strips // lanes) as vector, ir.vectorized(0, lanes) as lane:
                    column = strip * (width // strips) + vector * lanes + lane
                    target = (*address, *between, column)
                    ir.buffer_store(out, combine(out[target], updates[(*place, *between, column)]), list(target))

    return _scattered(node, body)


def _combine(node: Node) -> Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr]:
    reduction = node.string("reduction", "none")
    if reduction not in _COMBINE:
        raise node.unsupported(f"reduction '{reduction}' is unknown")
    if reduction != "none" and node.input().dtype == "bool":
        raise node.unsupported(f"reduction '{reduction}' of booleans is not supported")
    return _COMBINE[reduction]


def _scattered(node: Node, body: Callable[..., None]) -> TensorValue:
    """Emit a kernel that copies input 0 and writes input 2 at the positions of input 1."""

    def scattered(*tensors: te.Tensor) -> te.Tensor:
        data = tensors[0]
        return kernel(tensors, [data.shape], [str(data.dtype)], body, node.operator.lower())

    result = node.compute(scattered, *(node.expr(index) for index in range(3)))
    return node.emit(result.expr, node.input().narrow_type)


@converter("TensorScatter", since=24)
def tensor_scatter(node: Node) -> Result:
    """Convert TensorScatter: updates written along an axis of a cache, from a position given for each batch row."""
    axis = node.axis(-2)
    mode = node.string("mode", "linear")
    if mode not in ("linear", "circular"):
        raise node.unsupported(f"mode '{mode}' is unknown")
    if axis == 0:
        raise node.unsupported("the batch axis cannot be written along")

    def scattered(cache: te.Tensor, update: te.Tensor, *starts: te.Tensor) -> te.Tensor:
        capacity, count = cache.shape[axis], update.shape[axis]

        def element(*index: tirx.Var) -> tvm.ir.Expr:
            start = starts[0](index[0]).astype("int64") if starts else tirx.const(0, "int64")
            offset = index[axis] - start
            if mode == "circular":
                offset = tirx.floormod(offset, capacity)
            new = update(*index[:axis], tirx.max(tirx.min(offset, count - 1), 0), *index[axis + 1 :])
            return tirx.Select(tirx.all(offset >= 0, offset < count), new, cache(*index))

        return te.compute(cache.shape, element, name="tensor_scatter")

    if not node.has_input(2):
        return node.compute(scattered, node.expr(0), node.expr(1))
    marks = {SCATTERS: axis, CIRCULAR: mode == "circular"}
    return node.compute(scattered, *(node.expr(index) for index in range(3)), primfunc_attrs=marks)
