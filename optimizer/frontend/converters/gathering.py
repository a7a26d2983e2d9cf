"""Gather, GatherElements, GatherND: elements chosen by index; negative indices count from the end.

ONNX calls indices out of range an error. They are clipped here, so that no memory outside the tensor is read; a call
whose inputs are such indices themselves is refused (`index_ranges.py`).
"""

from __future__ import annotations

import numpy as np
import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.dimensions import Dimension, as_expression
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value


@converter("Gather")
def gather(node: Node) -> Result:
    """Convert Gather: slices of the input along one axis."""
    data, indices, axis = node.input(0), node.input(1), node.axis(0)
    node.chooses_by(indices, data.shape[axis])
    taken = relax.op.take(data.expr, _non_negative(node, indices, data.shape[axis]), axis, mode="clip")
    return node.emit(taken, data.narrow_type)


def _non_negative(node: Node, indices: Value, size: Dimension) -> relax.Expr:
    """Return indices counted from the front."""
    constant = indices.constant
    if constant is not None and (isinstance(size, int) or not (constant < 0).any()):
        return node.constant(np.where(constant < 0, constant + size, constant).astype(constant.dtype)).expr
    if indices.dtype.startswith("uint"):
        return indices.expr

    def wrapped(chosen: te.Tensor, bound: tvm.ir.Expr) -> te.Tensor:
        return te.compute(
            chosen.shape,
            lambda *at: tirx.Select(chosen(*at) < 0, chosen(*at) + bound.astype(indices.dtype), chosen(*at)),
            name="wrapped",
        )

    return node.compute(wrapped, indices.expr, as_expression(size), primfunc_name_hint="wrap_indices").expr


@converter("GatherElements", since=11)
def gather_elements(node: Node) -> Result:
    """Convert GatherElements: output[i][j]... = data[...index along the axis...]."""
    data, indices, axis = node.input(0), node.input(1), node.axis(0)
    node.chooses_by(indices, data.shape[axis])

    def compute(source: te.Tensor, chosen: te.Tensor) -> te.Tensor:
        def element(*at: tirx.Var) -> tvm.ir.Expr:
            position = clipped_index(chosen(*at), source.shape[axis])
            return source(*at[:axis], position, *at[axis + 1 :])

        return te.compute(chosen.shape, element, name="gather_elements")

    return node.compute(compute, data.expr, indices.expr)


@converter("GatherND", since=11)
def gather_nd(node: Node) -> Result:
    """Convert GatherND: each vector along the last axis of the indices names a slice of the input."""
    data, indices, batch = node.input(0), node.input(1), node.integer("batch_dims", 0)
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise node.unsupported("how many axes the indices address depends on a dynamic dimension")

    def compute(source: te.Tensor, chosen: te.Tensor) -> te.Tensor:
        outer = chosen.shape[:-1]

        def element(*at: tirx.Var) -> tvm.ir.Expr:
            prefix, rest = at[: len(outer)], at[len(outer) :]
            positions = [clipped_index(chosen(*prefix, i), source.shape[batch + i]) for i in range(depth)]
            return source(*at[:batch], *positions, *rest)

        shape = [*outer, *source.shape[batch + depth :]]
        return te.compute(shape, element, name="gather_nd")

    return node.compute(compute, data.expr, indices.expr)


def clipped_index(index: tvm.ir.Expr, size: tvm.ir.Expr) -> tvm.ir.Expr:
    """Return an index into an axis of `size` elements, counted from the front and within the axis."""
    wide = index.astype("int64")
    wrapped = tirx.Select(wide < 0, wide + size, wide)
    return tirx.max(tirx.min(wrapped, size - 1), tirx.const(0, "int64"))


__all__ = ["clipped_index"]
