"""Operators that move elements between axes or within them: SpaceToDepth, ReverseSequence, Col2Im, and their kin."""

from __future__ import annotations

from collections.abc import Sequence

import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.dimensions import Dimension, as_expression, below_zero, product, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter


@converter("SpaceToDepth")
def space_to_depth(node: Node) -> Result:
    """Convert SpaceToDepth: blocks of the image become channels, before or after the channels of the input."""
    batch, channels, height, width = node.input().shape
    block = node.integer("blocksize")
    rows, columns = _quotient(height, block), _quotient(width, block)
    split = [batch, channels, rows, block, columns, block]
    order = [0, 3, 5, 1, 2, 4] if node.string("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return _moved(node, split, order, [batch, simplified(channels * block * block), rows, columns])


@converter("DepthToSpace")
def depth_to_space(node: Node) -> Result:
    """Convert DepthToSpace: channels become blocks of the image, taken depth first or column first."""
    batch, channels, height, width = node.input().shape
    block = node.integer("blocksize")
    kept = _quotient(channels, block * block)
    shape = [batch, kept, simplified(height * block), simplified(width * block)]
    if node.string("mode", "DCR") == "DCR":
        return _moved(node, [batch, block, block, kept, height, width], [0, 3, 4, 1, 5, 2], shape)
    return _moved(node, [batch, kept, block, block, height, width], [0, 1, 4, 2, 5, 3], shape)


def _quotient(extent: Dimension, divisor: int) -> Dimension:
    return simplified(tirx.floordiv(as_expression(extent), tirx.const(divisor, "int64")))


def _moved(node: Node, split: Sequence[Dimension], order: Sequence[int], shape: Sequence[Dimension]) -> relax.Expr:
    blocks = node.reshape(node.input(), split)
    return relax.op.reshape(node.emit(relax.op.permute_dims(blocks.expr, list(order))).expr, list(shape))


@converter("ReverseSequence", since=10)
def reverse_sequence(node: Node) -> Result:
    """Convert ReverseSequence: the first elements along the time axis in reverse, as many as each batch row says."""
    batch_axis, time_axis = node.integer("batch_axis", 1), node.integer("time_axis", 0)

    def reversed_rows(tensor: te.Tensor, lengths: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tvm.ir.Expr:
            # More than there are would be read from behind the end.
            length = tirx.min(lengths(index[batch_axis]).astype("int64"), tensor.shape[time_axis])
            time = index[time_axis]
            source = list(index)
            source[time_axis] = tirx.Select(time < length, length - 1 - time, time)
            return tensor(*source)

        return te.compute(tensor.shape, element, name="reverse_sequence")

    return node.compute(reversed_rows, node.expr(0), node.expr(1))


@converter("Dropout", since=7)
def dropout(node: Node) -> Result:
    """Convert Dropout of inference: the input itself, and a mask that is true everywhere."""
    data = node.input(0)
    training = node.optional_input(2)
    if training is not None and (training.constant is None or training.constant.item()):
        raise node.unsupported("training mode, which draws random numbers, is not supported")
    if not node.has_output(1):
        return data
    mask = "bool" if node.version >= 10 else data.dtype
    return [data, relax.op.full(list(data.shape), node.scalar(1, mask), mask) if data.rank else node.scalar(1, mask)]


@converter("Col2Im", since=18)
def column_to_image(node: Node) -> Result:
    """Convert Col2Im: the blocks in the columns added up at their places in the image."""
    columns = node.input(0)
    image, block = node.shape_argument(1), node.shape_argument(2)
    rank = len(image)
    dilations, strides = node.integers("dilations", [1] * rank), node.integers("strides", [1] * rank)
    pads = node.integers("pads", [0] * (2 * rank))
    channels = _quotient_of(columns.shape[1], _at_least_one(product(block)))

    def windows(extent: Dimension, kernel: Dimension, axis: int) -> Dimension:
        padded = extent + pads[axis] + pads[rank + axis]
        return simplified(_quotient_of(padded - dilations[axis] * (kernel - 1) - 1, strides[axis]) + 1)

    counts = [windows(image[a], block[a], a) for a in range(rank)]
    node.graph.require_zero(
        [
            as_expression(columns.shape[1]) - as_expression(channels) * as_expression(product(block)),
            as_expression(columns.shape[2]) - as_expression(product(counts)),
            *(below_zero(as_expression(count)) for count in counts),
        ]
    )
    arguments = [as_expression(size) for size in (*image, *block)]

    def summed(tensor: te.Tensor, *sizes: tirx.Var) -> te.Tensor:
        extents, kernel = sizes[:rank], sizes[rank:]
        loops = [te.reduce_axis((0, size), f"k{axis}") for axis, size in enumerate(kernel)]
        counts = [windows(extents[a], kernel[a], a) for a in range(rank)]

        def element(n: tirx.Var, c: tirx.Var, *place: tirx.Var) -> tvm.ir.Expr:
            row, column = c, tirx.const(0, "int64")
            valid: list[tvm.ir.Expr] = []
            for a in range(rank):
                offset = place[a] + pads[a] - loops[a].var * dilations[a]
                step = tirx.floordiv(offset, strides[a])
                valid += [tirx.floormod(offset, strides[a]) == 0, step >= 0, step < counts[a]]
                row = row * kernel[a] + loops[a].var
                column = column * counts[a] + tirx.max(tirx.min(step, counts[a] - 1), 0)
            zero = tirx.const(0, str(tensor.dtype))
            return te.sum(tirx.Select(tirx.all(*valid), tensor(n, row, column), zero), axis=loops)

        shape = [columns.shape[0], channels, *image]
        return te.compute([as_expression(extent) for extent in shape], element, name="col2im")

    return node.compute(summed, columns.expr, *arguments)


def _at_least_one(size: Dimension) -> Dimension:
    return simplified(tirx.max(as_expression(size), tirx.const(1, "int64")))


def _quotient_of(total: Dimension, part: Dimension) -> Dimension:
    return simplified(tirx.floordiv(as_expression(total), as_expression(part)))
