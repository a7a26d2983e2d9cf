"""Operators that make a tensor from a shape or from positions: ConstantOfShape, EyeLike, OneHot, Trilu."""

from __future__ import annotations

import numpy as np
import tvm.ir
from onnx import helper
from tvm import relax, te, tirx

from optimizer.frontend.dimensions import as_expression
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import ConstantValue, Value

_INT64 = "int64"


@converter("ConstantOfShape", since=9)
def constant_of_shape(node: Node) -> Result:
    """Convert ConstantOfShape: one value everywhere, by default 0 in float32."""
    value = node.tensor("value") if node.has_attribute("value") else np.zeros(1, np.float32)
    scalar = ConstantValue(value.reshape(()))
    shape = list(node.shape_argument(0))
    if not shape:
        return scalar
    return node.emit(relax.op.broadcast_to(scalar.expr, shape), scalar.narrow_type)


@converter("EyeLike", since=9)
def eye_like(node: Node) -> Result:
    """Convert EyeLike: 1 on the diagonal `k` of a matrix of the input's shape, 0 elsewhere."""
    value, offset = node.input(), node.integer("k", 0)
    dtype = helper.tensor_dtype_to_np_dtype(node.integer("dtype")).name if node.has_attribute("dtype") else value.dtype
    rows, columns = (as_expression(extent) for extent in value.shape)

    def eye() -> te.Tensor:
        one, zero = tirx.const(1, dtype), tirx.const(0, dtype)
        return te.compute((rows, columns), lambda i, j: tirx.Select(j - i == offset, one, zero), name="eye")

    return node.compute(eye)


@converter("Trilu", since=14)
def triangle(node: Node) -> Result:
    """Convert Trilu: the elements on and above (or below) the diagonal `k`, 0 elsewhere."""
    data = node.input(0)
    upper = bool(node.integer("upper", 1))
    known = node.known_integers(1) if node.has_input(1) else [0]

    def masked(tensor: te.Tensor, *diagonals: te.Tensor) -> te.Tensor:
        diagonal = diagonals[0](*(0 for _ in diagonals[0].shape)).astype(_INT64) if known is None else known[0]

        def element(*index: tirx.Var) -> tvm.ir.Expr:
            distance = index[-1] - index[-2]
            kept = distance >= diagonal if upper else distance <= diagonal
            return tirx.Select(kept, tensor(*index), tirx.const(0, str(tensor.dtype)))

        return te.compute(tensor.shape, element, name="trilu")

    return node.compute(masked, data.expr, *([node.expr(1)] if known is None else []))


@converter("OneHot", since=9)
def one_hot(node: Node) -> Result:
    """Convert OneHot: the on-value where the position along a new axis equals the index, else the off-value."""
    indices, values = node.input(0), node.input(2)
    axis = node.axis(-1, rank=indices.rank + 1)
    (depth,) = _depth(node)
    shape = [*indices.shape[:axis], depth, *indices.shape[axis:]]
    counts_from_end = node.version >= 11  # before, a negative index is out of range

    def encoded(tensor: te.Tensor, off_on: te.Tensor, length: tvm.ir.Expr) -> te.Tensor:
        def element(*place: tirx.Var) -> tvm.ir.Expr:
            index = tensor(*place[:axis], *place[axis + 1 :]).astype(_INT64)
            if counts_from_end:
                index = tirx.Select(index < 0, index + length, index)
            return tirx.Select(place[axis] == index, off_on[1], off_on[0])

        return te.compute([as_expression(extent) for extent in shape], element, name="one_hot")

    return node.compute(encoded, indices.expr, values.expr, as_expression(depth))


def _depth(node: Node) -> tuple[int | tvm.ir.Expr, ...]:
    depth: Value = node.input(1)
    if depth.constant is not None:
        return (int(depth.constant.item()),)
    return node.shape_argument(1)
