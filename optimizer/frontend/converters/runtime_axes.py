"""Axes that are only known when the module runs: tensor expressions for which they choose and the shapes that follow.

`axes` is an integer tensor of rank 1 whose elements, all different, may count from the end of `rank` axes; `shape` is
an int64 tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm.ir
from tvm import te, tirx

_ONE = tirx.const(1, "int64")
_ZERO = tirx.const(0, "int64")


def shape_with_ones(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return the shape with 1 on the chosen axes."""
    chosen = _from_the_start(axes, int(shape.shape[0]))
    return _compute(int(shape.shape[0]), lambda axis: tirx.Select(_is_among(axis, chosen), _ONE, shape[axis]))


def shape_of_chosen(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return the shape with 1 on all but the chosen axes."""
    chosen = _from_the_start(axes, int(shape.shape[0]))
    return _compute(int(shape.shape[0]), lambda axis: tirx.Select(_is_among(axis, chosen), shape[axis], _ONE))


def shape_without(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return the dimensions of the axes that are not chosen, in order.

    The one at a position stands behind every chosen axis that has no more than `position` axes left before it.
    """
    rank = int(shape.shape[0])
    chosen = _from_the_start(axes, rank)
    left_before = [axis - _count([other < axis for other in chosen]) for axis in chosen]

    def dimension(position: tirx.Var) -> tvm.ir.Expr:
        return shape[_within(position + _count([left <= position for left in left_before]), rank)]

    return _compute(rank - len(chosen), dimension)


def shape_with_inserted(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return a shape with 1 on the chosen axes of the result, and the given dimensions in order elsewhere."""
    given = int(shape.shape[0])
    rank = given + int(axes.shape[0])
    chosen = _from_the_start(axes, rank)

    def dimension(axis: tirx.Var) -> tvm.ir.Expr:
        if not given:
            return _ONE
        place = axis - _count([other < axis for other in chosen])
        return tirx.Select(_is_among(axis, chosen), _ONE, shape[_within(place, given)])

    return _compute(rank, dimension)


def _compute(length: int, element: Callable[[tirx.Var], tvm.ir.Expr]) -> te.Tensor:
    return te.compute((tirx.IntImm("int64", length),), element, name="elements")


def _from_the_start(axes: te.Tensor, rank: int) -> list[tvm.ir.Expr]:
    """Return the chosen axes, none of them negative."""
    given = [axes[index].astype("int64") for index in range(int(axes.shape[0]))]
    return [tirx.Select(axis < _ZERO, axis + rank, axis) for axis in given]


def _is_among(axis: tvm.ir.Expr, chosen: Sequence[tvm.ir.Expr]) -> tvm.ir.Expr:
    return tirx.any(*(axis == other for other in chosen), tirx.const(False, "bool"))


def _count(conditions: Sequence[tvm.ir.Expr]) -> tvm.ir.Expr:
    """Return how many conditions hold."""
    total = _ZERO
    for condition in conditions:
        total = total + tirx.Select(condition, _ONE, _ZERO)
    return total


def _within(index: tvm.ir.Expr, length: int) -> tvm.ir.Expr:
    """Return an index that stays inside of `length` elements, also for axes that the operator does not allow."""
    return tirx.max(tirx.min(index, tirx.const(length - 1, "int64")), _ZERO)


def vector(elements: Sequence[tvm.ir.Expr]) -> te.Tensor:
    """Return an int64 tensor of rank 1 whose elements are given one by one."""

    def chosen(index: tirx.Var) -> tvm.ir.Expr:
        result = elements[-1] if elements else _ZERO
        for position in reversed(range(len(elements) - 1)):
            result = tirx.Select(index == position, elements[position], result)
        return result

    return te.compute((len(elements),), chosen, name="elements")


__all__ = ["shape_of_chosen", "shape_with_inserted", "shape_with_ones", "shape_without", "vector"]
