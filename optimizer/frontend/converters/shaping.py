"""Operators that give the same elements another shape, or repeat them along axes."""

from __future__ import annotations

from collections.abc import Sequence

import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.converters.runtime_axes import shape_with_inserted, shape_without, vector
from optimizer.frontend.dimensions import Dimension, Shape, as_expression, product, provably_equal, quotient, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value


@converter("Reshape", since=5)
def reshape(node: Node) -> Result:
    """Convert Reshape: 0 copies the input's dimension (unless allowzero), -1 takes what is left."""
    data, wanted = node.input(0), node.input(1)
    if wanted.integers is None:
        return reshaped(node, data, _computed_shape(node, data, wanted))
    copy_zero = not node.integer("allowzero", 0)
    shape: list[Dimension] = [
        data.shape[axis] if copy_zero and isinstance(size, int) and size == 0 else size
        for axis, size in enumerate(wanted.integers.ravel())
    ]
    if -1 in [size for size in shape if isinstance(size, int)]:
        free = next(axis for axis, size in enumerate(shape) if isinstance(size, int) and size == -1)
        shape[free] = quotient(data.shape, [size for axis, size in enumerate(shape) if axis != free])
    return reshaped(node, data, shape)


def _computed_shape(node: Node, data: Value, wanted: Value) -> Shape:
    """Return the dimensions that a shape known at run time alone asks for."""
    copy_zero = not node.integer("allowzero", 0)

    def resolved(given: te.Tensor, own: te.Tensor) -> te.Tensor:
        own_length = int(own.shape[0])
        one = tirx.const(1, "int64")
        sizes = [given[i].astype("int64") for i in range(int(given.shape[0]))]
        if copy_zero:
            sizes = [tirx.Select(size == 0, own[i], size) if i < own_length else size for i, size in enumerate(sizes)]
        total: tvm.ir.Expr = one
        for i in range(own_length):
            total = total * own[i]
        rest: tvm.ir.Expr = one
        for size in sizes:
            rest = rest * tirx.Select(size == -1, one, size)
        left = tirx.floordiv(total, tirx.max(rest, one))
        return vector([tirx.Select(size == -1, left, size) for size in sizes])

    return node.compute_shape(resolved, wanted.expr, node.dimensions(data)) if node.vector_length(1) else ()


def reshaped(node: Node, data: Value, shape: Sequence[Dimension]) -> Value:
    """Return `data` in another shape of as many elements."""
    if any(isinstance(extent, int) and extent == 0 for extent in shape):
        # Relax takes a 0 for the dimension of the input, and there is nothing to copy.
        return node.emit(relax.op.zeros(list(shape), data.dtype), data.narrow_type)
    given, wanted = product(data.shape), product(shape)
    if isinstance(given, int) and isinstance(wanted, int) and given != wanted:
        raise node.unsupported(f"{given} elements cannot take the shape {list(shape)}{_cause(data, given, wanted)}")
    return node.reshape(data, shape)


def _cause(data: Value, given: int, wanted: int) -> str:
    """Return what is known of models with such a mistake, and the fix.

    onnxruntime-genai's builder reshapes the head's weights for a GatherBlockQuantized by the names that they would have
    when quantized; with zero points its default method gives floats that name. onnxruntime refuses such models, too.
    """
    if data.constant is None or not data.dtype.startswith(("float", "bfloat")) or given != 2 * wanted:
        return ""
    return (
        f"; its {data.dtype} stand where codes of 4 bits are meant, as onnxruntime-genai's builder writes it for "
        "is_symmetric=false; build with shared_embeddings=false, or with algo_config=rtn"
    )


@converter("Flatten")
def flatten(node: Node) -> Result:
    """Convert Flatten: the dimensions before the axis become one, those from it on another."""
    data = node.input()
    axis = node.integer("axis", 1)
    axis = axis + data.rank if axis < 0 else axis
    return reshaped(node, data, (product(data.shape[:axis]), product(data.shape[axis:])))


@converter("Squeeze")
def squeeze(node: Node) -> Result:
    """Convert Squeeze: without the given dimensions of 1, or without all of them."""
    data, given = node.input(), node.optional_input(1)
    if given is not None and given.constant is None:
        node.vector_length(1)
        return reshaped(node, data, node.compute_shape(shape_without, node.dimensions(data), given.expr))
    axes = node.axes_argument()
    if axes is None:
        if any(not isinstance(extent, int) for extent in data.shape):
            raise node.unsupported("without axes, which dimensions are 1 has to be known at compile time")
        axes = [axis for axis, extent in enumerate(data.shape) if extent == 1]
    for axis in axes:
        if isinstance(data.shape[axis], int) and data.shape[axis] != 1:
            raise node.unsupported(f"dimension {axis} is {data.shape[axis]}, not 1")
    return reshaped(node, data, [extent for axis, extent in enumerate(data.shape) if axis not in axes])


@converter("Unsqueeze")
def unsqueeze(node: Node) -> Result:
    """Convert Unsqueeze: new dimensions of 1 at the given axes of the result."""
    data, given = node.input(), node.optional_input(1)
    if given is not None and given.constant is None:
        node.vector_length(1)
        return reshaped(node, data, node.compute_shape(shape_with_inserted, node.dimensions(data), given.expr))
    count = len(node.integers("axes")) if node.has_attribute("axes") else node.constant_input(1).size
    axes = node.axes_argument(rank=data.rank + count)
    return node.emit(relax.op.expand_dims(data.expr, axes), data.narrow_type)


@converter("Transpose")
def transpose(node: Node) -> Result:
    """Convert Transpose: axes in the order of `perm`, by default reversed."""
    data = node.input()
    order = node.integers("perm", range(data.rank)[::-1])
    return node.emit(relax.op.permute_dims(data.expr, order), data.narrow_type)


@converter("Expand", since=8)
def expand(node: Node) -> Result:
    """Convert Expand: broadcast to a shape, of which a dimension of 1 leaves the input's own."""
    data = node.input(0)
    wanted = node.shape_argument(1)
    rank = max(data.rank, len(wanted))
    own = (1,) * (rank - data.rank) + tuple(data.shape)
    asked = (1,) * (rank - len(wanted)) + tuple(wanted)
    shape = [_expanded(mine, other) for mine, other in zip(own, asked, strict=True)]
    if all(provably_equal(mine, other) or _is_one(mine) for mine, other in zip(own, shape, strict=True)):
        return node.emit(relax.op.broadcast_to(data.expr, shape), data.narrow_type)
    bound = node.compute_shape(_same_shape, node.shape_tensor(shape))

    def broadcast(tensor: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tvm.ir.Expr:
            inner = index[rank - len(tensor.shape) :]
            zero = tirx.const(0, "int64")
            return tensor(*(tirx.Select(d == 1, zero, i) for i, d in zip(inner, tensor.shape, strict=True)))

        return te.compute(bound, element, name="expand")

    return node.compute(broadcast, data.expr)


def _same_shape(shape: te.Tensor) -> te.Tensor:
    return te.compute(shape.shape, lambda i: shape[i], name="shape")


def _expanded(own: Dimension, asked: Dimension) -> Dimension:
    if _is_one(own):
        return asked
    if _is_one(asked) or provably_equal(own, asked) or isinstance(own, int):
        return own
    return tirx.Select(as_expression(own) == 1, as_expression(asked), as_expression(own))


def _is_one(extent: Dimension) -> bool:
    return isinstance(extent, int) and extent == 1


@converter("Tile", since=6)
def tile(node: Node) -> Result:
    """Convert Tile: the tensor repeated along each axis."""
    data = node.input(0)
    repeats = node.shape_argument(1)
    if all(isinstance(count, int) for count in repeats):
        return node.emit(relax.op.tile(data.expr, list(repeats)), data.narrow_type)
    shape = [simplified(extent * count) for extent, count in zip(data.shape, repeats, strict=True)]
    if all(_is_one(extent) or _is_one(count) for extent, count in zip(data.shape, repeats, strict=True)):
        return node.emit(relax.op.broadcast_to(data.expr, shape), data.narrow_type)

    def tiled(tensor: te.Tensor, *sizes: tirx.Var) -> te.Tensor:
        return te.compute(
            sizes,
            lambda *index: tensor(*(tirx.floormod(i, extent) for i, extent in zip(index, tensor.shape, strict=True))),
            name="tile",
        )

    return node.compute(tiled, data.expr, *(as_expression(size) for size in shape))
