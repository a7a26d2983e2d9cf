"""Operators that select elements by value, as many as there are: NonZero, Compress, Unique."""

from __future__ import annotations

import tvm.ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as ir

from optimizer.frontend.converters.kernel_loops import kernel
from optimizer.frontend.dimensions import Dimension, product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import TensorValue, Value

_INT64 = "int64"


@converter("NonZero")
def non_zero(node: Node) -> Result:
    """Convert NonZero: the coordinates of the elements that are not 0, one row for each axis, in row-major order."""
    value = node.input()
    if value.rank == 0:
        raise node.unsupported("a scalar input is not supported")
    flat = node.emit(relax.op.reshape(value.expr, (product(value.shape),)))
    flags = flat if value.dtype == "bool" else node.emit(relax.op.not_equal(flat.expr, node.scalar(0, value.dtype)))
    positions = _true_positions(node, flags)

    def unravelled(tensor: te.Tensor, *extents: tvm.ir.Expr) -> te.Tensor:
        def element(axis: tirx.Var, place: tirx.Var) -> tvm.ir.Expr:
            remainder, result = tensor[place], tirx.const(0, _INT64)
            for own in reversed(range(len(extents))):
                result = tirx.Select(axis == own, tirx.floormod(remainder, extents[own]), result)
                remainder = tirx.floordiv(remainder, extents[own])
            return result

        return te.compute((len(extents), tensor.shape[0]), element, name="non_zero")

    return node.compute(unravelled, positions.expr, *(node.dimension(extent) for extent in value.shape))


@converter("Compress", since=9)
def compress(node: Node) -> Result:
    """Convert Compress: the slices of an axis (of the flattened input, if none is given) whose condition is true."""
    value, condition = node.input(0), node.input(1)
    axis = node.axis() if node.has_attribute("axis") else 0
    if not node.has_attribute("axis"):
        value = node.emit(relax.op.reshape(value.expr, (product(value.shape),)))
    positions = _true_positions(node, condition)
    return relax.op.take(value.expr, positions.expr, axis, mode="clip")


def _true_positions(node: Node, flags: Value) -> TensorValue:
    """Return where a boolean vector is true, as int64."""
    (count,) = node.compute_shape(_count_of_true, flags.expr)

    def positions(tensor: te.Tensor, number: tvm.ir.Expr) -> te.Tensor:
        def body(source: tirx.Buffer, target: tirx.Buffer) -> None:
            filled = ir.alloc_buffer((1,), _INT64, scope="local")
            ir.buffer_store(filled, tirx.const(0, _INT64), [0])
            with ir.serial(0, source.shape[0]) as i, ir.If(source[i]), ir.Then():
                ir.buffer_store(target, i, [filled[0]])
                ir.buffer_store(filled, filled[0] + 1, [0])

        return kernel([tensor], [(number,)], [_INT64], body, "true_positions")

    return node.compute(positions, flags.expr, count)


def _count_of_true(flags: te.Tensor) -> te.Tensor:
    axis = te.reduce_axis((0, flags.shape[0]), "i")
    return te.compute((1,), lambda _: te.sum(flags[axis].astype(_INT64), axis=axis), name="count")


@converter("Unique", since=11)
def unique(node: Node) -> Result:
    """Convert Unique: the distinct slices of an axis (or elements), where each is first, the inverse, and the counts.

    Every pair of slices is compared: the time grows with the square of their number.
    """
    value = node.input()
    by_axis = node.has_attribute("axis")
    axis = node.axis() if by_axis else 0
    data = value if by_axis else node.emit(relax.op.reshape(value.expr, (product(value.shape),)))
    rows = _rows(node, data, axis)
    ordered = bool(node.integer("sorted", 1))
    first = node.compute(_first_equal, rows.expr)
    ranks = node.compute(_ranks, rows.expr, first.expr, ordered)
    (count,) = node.compute_shape(_count_of_first, first.expr)

    def indices_of(rank: te.Tensor, own: te.Tensor, number: tvm.ir.Expr) -> te.Tensor:
        i = te.reduce_axis((0, rank.shape[0]), "i")
        chosen = lambda g: tirx.Select(tirx.all(rank[i] == g, own[i] == i), i.var, tirx.const(0, _INT64))  # noqa: E731
        return te.compute((number,), lambda g: te.max(chosen(g), axis=i), name="indices")

    def counts_of(rank: te.Tensor, number: tvm.ir.Expr) -> te.Tensor:
        i = te.reduce_axis((0, rank.shape[0]), "i")
        return te.compute((number,), lambda g: te.sum((rank[i] == g).astype(_INT64), axis=i), name="counts")

    indices = node.compute(indices_of, ranks.expr, first.expr, count)
    counts = node.compute(counts_of, ranks.expr, count)
    return [relax.op.take(data.expr, indices.expr, axis, mode="clip"), indices, ranks, counts]


def _rows(node: Node, data: Value, axis: int) -> TensorValue:
    """Return the slices of an axis as the rows of a matrix."""
    order = [axis, *(other for other in range(data.rank) if other != axis)]
    turned = node.emit(relax.op.permute_dims(data.expr, order))
    width: Dimension = product(extent for place, extent in enumerate(data.shape) if place != axis)
    return node.emit(relax.op.reshape(turned.expr, (data.shape[axis], width)))


def _first_difference(rows: te.Tensor) -> te.Tensor:
    """Return for each pair of rows the first column in which they differ, or the number of columns."""
    count, width = rows.shape
    column = te.reduce_axis((0, width), "c")

    def element(i: tirx.Var, j: tirx.Var) -> tvm.ir.Expr:
        return te.min(tirx.Select(rows[i, column] != rows[j, column], column.var, width), axis=column)

    return te.compute((count, count), element, name="first_difference")


def _first_equal(rows: te.Tensor) -> te.Tensor:
    """Return for each row the first row that is equal to it."""
    count, width = rows.shape
    difference = _first_difference(rows)
    j = te.reduce_axis((0, count), "j")
    return te.compute(
        (count,), lambda i: te.min(tirx.Select(difference[i, j] == width, j.var, count), axis=j), name="first_equal"
    )


def _ranks(rows: te.Tensor, first: te.Tensor, ordered: bool) -> te.Tensor:
    """Return for each row the place of its value among the distinct ones, by value or by first occurrence."""
    count, width = rows.shape
    difference = _first_difference(rows)
    j = te.reduce_axis((0, count), "j")

    def element(i: tirx.Var) -> tvm.ir.Expr:
        if ordered:
            column = difference[i, j]
            at = tirx.min(column, width - 1)
            before = tirx.all(column < width, rows[j, at] < rows[i, at])
        else:
            before = j < first[i]
        return te.sum(tirx.all(first[j] == j, before).astype(_INT64), axis=j)

    return te.compute((count,), element, name="ranks")


def _count_of_first(first: te.Tensor) -> te.Tensor:
    i = te.reduce_axis((0, first.shape[0]), "i")
    return te.compute((1,), lambda _: te.sum((first[i] == i).astype(_INT64), axis=i), name="count")
