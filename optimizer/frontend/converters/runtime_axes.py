"""Axes that are only known when the module runs: tensor expressions for which they choose and the shapes that follow.

`axes` is an integer tensor of rank 1 whose elements may count from the end of `rank` axes, `shape` an int64 tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm.ir
from tvm import te, tirx

_ONE = tirx.const(1, "int64")
_ZERO = tirx.const(0, "int64")


def shape_with_ones(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return the shape with 1 on the chosen axes."""
    rank = int(shape.shape[0])
    return vector([tirx.Select(_is_chosen(axis, axes, rank), _ONE, shape[axis]) for axis in range(rank)])


def shape_of_chosen(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return the shape with 1 on all but the chosen axes."""
    rank = int(shape.shape[0])
    return vector([tirx.Select(_is_chosen(axis, axes, rank), shape[axis], _ONE) for axis in range(rank)])


def shape_without(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return the dimensions of the axes that are not chosen, in order."""
    rank = int(shape.shape[0])
    kept, places = _kept_places(axes, rank)

    def dimension(position: int) -> tvm.ir.Expr:
        result = _ONE
        for axis in range(rank):
            result = tirx.Select(tirx.all(kept[axis], places[axis] == position), shape[axis], result)
        return result

    return vector([dimension(position) for position in range(rank - int(axes.shape[0]))])


def shape_with_inserted(shape: te.Tensor, axes: te.Tensor) -> te.Tensor:
    """Return a shape with 1 on the chosen axes of the result, and the given dimensions in order elsewhere."""
    given = int(shape.shape[0])
    rank = given + int(axes.shape[0])
    kept, places = _kept_places(axes, rank)

    def dimension(axis: int) -> tvm.ir.Expr:
        result = _ONE
        for index in range(given):
            result = tirx.Select(tirx.all(kept[axis], places[axis] == index), shape[index], result)
        return result

    return vector([dimension(axis) for axis in range(rank)])


def _is_chosen(axis: int, axes: te.Tensor, rank: int) -> tvm.ir.Expr:
    return tirx.any(
        *(tirx.any(axes[i] == axis, axes[i] == axis - rank) for i in range(int(axes.shape[0]))),
        tirx.const(False, "bool"),
    )


def _kept_places(axes: te.Tensor, rank: int) -> tuple[list[tvm.ir.Expr], list[tvm.ir.Expr]]:
    """Return for each axis whether it is not chosen, and how many such axes are before it."""
    kept = [tirx.Not(_is_chosen(axis, axes, rank)) for axis in range(rank)]
    places = [_ZERO]
    for condition in kept:
        places.append(places[-1] + tirx.Select(condition, _ONE, _ZERO))
    return kept, places[:-1]


def vector(elements: Sequence[tvm.ir.Expr]) -> te.Tensor:
    """Return an int64 tensor of rank 1 whose elements are given one by one."""

    def chosen(index: tirx.Var) -> tvm.ir.Expr:
        result = elements[-1] if elements else _ZERO
        for position in reversed(range(len(elements) - 1)):
            result = tirx.Select(index == position, elements[position], result)
        return result

    return te.compute((len(elements),), chosen, name="elements")


__all__ = ["shape_of_chosen", "shape_with_inserted", "shape_with_ones", "shape_without", "vector"]
