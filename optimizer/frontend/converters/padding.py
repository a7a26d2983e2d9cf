"""Pad, in all modes and with pads that may be known only when the module runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.converters.runtime_axes import vector
from optimizer.frontend.dimensions import simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import TensorValue, Value

_INT64 = "int64"
_MODES = ("constant", "reflect", "edge", "wrap")


@converter("Pad", since=2)
def pad_by_attributes(node: Node) -> Result:
    """Convert Pad with its pads and value as attributes."""
    data = node.input()
    value = node.scalar(node.float("value", 0.0), data.dtype)
    return _padded_by(node, data, node.integers("pads"), value)


@converter("Pad", since=11)
def pad(node: Node) -> Result:
    """Convert Pad: elements added before and after each axis; negative pads remove elements."""
    data = node.input(0)
    fill = node.expr(2) if node.has_input(2) else node.scalar(0, data.dtype)
    pads = node.known_integers(1)
    axes = node.known_integers(3) if node.has_input(3) else list(range(data.rank))
    if pads is None or axes is None:
        return _padded_at_run_time(node, data, fill)
    return _padded_by(node, data, _pads_of_all_axes(node, data.rank, pads, axes), fill)


def _pads_of_all_axes(node: Node, rank: int, pads: Sequence[int], axes: Sequence[int]) -> list[int]:
    result = [0] * (2 * rank)
    for place, axis in enumerate(axes):
        own = node.checked_axis(axis, rank)
        result[own], result[rank + own] = pads[place], pads[len(axes) + place]
    return result


def _padded_by(node: Node, data: Value, pads: Sequence[int], fill: relax.Expr) -> Result:
    mode = _mode(node)
    before, after = pads[: data.rank], pads[data.rank :]
    constant = fill.value.numpy() if isinstance(fill, tvm.ir.GenericConst) else None
    if mode == "constant" and min(pads, default=0) >= 0 and constant is not None and constant.size == 1:
        widths = [width for pair in zip(before, after, strict=True) for width in pair]
        number = constant.astype(np.float64).item()
        if number == 0 or data.dtype in ("float32", "float64"):
            return node.emit(relax.op.nn.pad(data.expr, widths, "constant", number), data.narrow_type)
    shape = [simplified(extent + low + high) for extent, low, high in zip(data.shape, before, after, strict=True)]
    return _padded(node, data, relax.const(np.array(before, np.int64)), shape, fill, before[-1] if before else None)


def _padded_at_run_time(node: Node, data: Value, fill: relax.Expr) -> Result:
    rank = data.rank
    node.vector_length(1)
    arguments = [node.dimensions(data), node.expr(1), *([node.expr(3)] if node.has_input(3) else [])]

    def pads(which: int, given: te.Tensor, axes: te.Tensor | None) -> list[tvm.ir.Expr]:
        count = int(given.shape[0]) // 2
        if axes is None:
            return [given[which * count + axis].astype(_INT64) for axis in range(rank)]
        result: list[tvm.ir.Expr] = [tirx.const(0, _INT64)] * rank
        for place in range(count):
            for axis in range(rank):
                chosen = tirx.any(axes[place] == axis, axes[place] == axis - rank)
                result[axis] = tirx.Select(chosen, given[which * count + place].astype(_INT64), result[axis])
        return result

    def before(_: te.Tensor, given: te.Tensor, axes: te.Tensor | None = None) -> te.Tensor:
        return vector(pads(0, given, axes))

    def lengths(shape: te.Tensor, given: te.Tensor, axes: te.Tensor | None = None) -> te.Tensor:
        sides = zip(pads(0, given, axes), pads(1, given, axes), strict=True)
        return vector([shape[axis] + low + high for axis, (low, high) in enumerate(sides)])

    first = node.compute(before, *arguments)
    return _padded(node, data, first.expr, node.compute_shape(lengths, *arguments), fill)


def _padded(
    node: Node,
    data: Value,
    before: relax.Expr,
    shape: Sequence[tvm.ir.Expr | int],
    fill: relax.Expr,
    last_before: int | None = None,
) -> TensorValue:
    """Return the padded tensor; `last_before` is how many elements the last axis gets before its own, if it is known.

    What the last axis has of its own are then the elements between two bounds, which a schedule copies in vectors.
    """
    mode = _mode(node)

    def padded(tensor: te.Tensor, first: te.Tensor, value: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tvm.ir.Expr:
            places = [i - first[axis] for axis, i in enumerate(index)]
            inner = [_source(place, extent, mode) for place, extent in zip(places, tensor.shape, strict=True)]
            if mode != "constant":
                if last_before is not None and isinstance(tensor.shape[-1], tirx.IntImm):
                    inner[-1] = _between(index[-1], last_before, tensor.shape[-1], inner[-1])
                return tensor(*inner)
            inside = [tirx.all(p >= 0, p < extent) for p, extent in zip(places, tensor.shape, strict=True)]
            return tirx.Select(
                tirx.all(*inside, tirx.const(True, "bool")), tensor(*inner), value(*(0 for _ in value.shape))
            )

        return te.compute(list(shape), element, name="pad")

    result = node.compute(padded, data.expr, before, fill)
    return node.emit(result.expr, data.narrow_type)


def _source(place: tvm.ir.Expr, extent: tvm.ir.Expr, mode: str) -> tvm.ir.Expr:
    """Return which element of an axis stands at a place that may be outside it."""
    last = extent - 1
    if mode == "wrap":
        return tirx.floormod(place, extent)
    if mode == "reflect":
        # The axis and its mirror image repeat without the two ends doubled.
        period = tirx.max(2 * last, tirx.const(1, _INT64))
        folded = tirx.floormod(place, period)
        return tirx.min(folded, period - folded) if not _is_one(extent) else tirx.const(0, _INT64)
    return tirx.max(tirx.min(place, last), tirx.const(0, _INT64))


def _between(place: tirx.Var, before: int, extent: tvm.ir.Expr, outside: tvm.ir.Expr) -> tvm.ir.Expr:
    """Return which element of an axis stands at a place: its own ones in order, and `outside` beyond both ends."""
    inside = tirx.if_then_else(place < before + extent, place - before, outside)
    return tirx.if_then_else(place < before, outside, inside)


def _is_one(extent: tvm.ir.Expr) -> bool:
    return isinstance(extent, tirx.IntImm) and int(extent.value) == 1


def _mode(node: Node) -> str:
    mode = node.string("mode", "constant")
    if mode not in _MODES:
        raise node.unsupported(f"mode '{mode}' is unknown")
    return mode
