"""Sequences and optionals whose length is known at compile time; they leave no trace in the module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from optimizer.frontend.dimensions import provably_equal
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import AnyValue, SequenceValue, TensorValue, Value


class EmptyOptional(SequenceValue):
    """An optional without an element. An optional with one is represented by that element."""

    def __init__(self) -> None:
        super().__init__([])


@converter("SequenceConstruct")
def sequence_construct(node: Node) -> Result:
    """Convert SequenceConstruct: the inputs as a sequence."""
    return SequenceValue([node.input(index) for index in range(len(node.inputs))])


@converter("SequenceEmpty")
def sequence_empty(_: Node) -> Result:
    """Convert SequenceEmpty."""
    return SequenceValue([])


@converter("SequenceLength")
def sequence_length(node: Node) -> Result:
    """Convert SequenceLength: a constant."""
    return np.array(len(node.sequence_input().items), np.int64)


@converter("SequenceAt")
def sequence_at(node: Node) -> Result:
    """Convert SequenceAt: one item; items of one shape can be chosen at run time."""
    items = node.sequence_input().items
    position = node.input(1)
    if position.constant is not None:
        return items[_checked(node, int(position.constant.item()), len(items) - 1)]
    if not items or any(not _alike(items[0], item) for item in items):
        raise node.unsupported("the index is not constant, and the items differ in type or shape")
    stacked = node.emit(relax.op.concat([relax.op.expand_dims(item.expr, 0) for item in items], axis=0))
    index = node.reshape(position, ()).expr
    wrapped = relax.op.add(index, node.scalar(len(items), position.dtype))
    from_front = relax.op.where(relax.op.less(index, node.scalar(0, position.dtype)), wrapped, index)
    return node.emit(relax.op.take(stacked.expr, node.emit(from_front).expr, axis=0, mode="clip"), items[0].narrow_type)


def _alike(left: Value, right: Value) -> bool:
    same_type = (left.dtype, left.narrow_type, left.rank) == (right.dtype, right.narrow_type, right.rank)
    return same_type and all(provably_equal(a, b) for a, b in zip(left.shape, right.shape, strict=True))


def _checked(node: Node, position: int, last: int) -> int:
    if not -last - 1 <= position <= last:
        raise node.unsupported(f"position {position} in a sequence with positions up to {last}")
    return position + last + 1 if position < 0 else position


@converter("SequenceInsert")
def sequence_insert(node: Node) -> Result:
    """Convert SequenceInsert: a tensor put in front of a position, at the end by default."""
    items = list(node.sequence_input().items)
    position = len(items)
    if node.has_input(2):
        given = int(node.constant_input(2).item())
        position = given + len(items) if given < 0 else given
        if not 0 <= position <= len(items):
            raise node.unsupported(f"position {given} in a sequence of {len(items)} items")
    items.insert(position, node.input(1))
    return SequenceValue(items)


@converter("SequenceErase")
def sequence_erase(node: Node) -> Result:
    """Convert SequenceErase: the item at a position removed, the last one by default."""
    items = list(node.sequence_input().items)
    given = int(node.constant_input(1).item()) if node.has_input(1) else -1
    del items[_checked(node, given, len(items) - 1)]
    return SequenceValue(items)


@converter("SplitToSequence")
def split_to_sequence(node: Node) -> Result:
    """Convert SplitToSequence: parts of given lengths, of one length (the last may be shorter), or single slices."""
    data, axis = node.input(0), node.axis(0)
    length = data.shape[axis]
    if node.has_input(1) and node.input(1).rank == 1:
        sizes = [int(size) for size in node.constant_input(1)]
    elif isinstance(length, int):
        size = int(node.constant_input(1).item()) if node.has_input(1) else 1
        sizes = [min(size, length - start) for start in range(0, length, size)]
    else:
        raise node.unsupported("the number of parts is not known at compile time")
    if isinstance(length, int) and sum(sizes) != length:
        raise node.unsupported(f"parts of {sizes} do not make up an axis of {length}")
    parts = _split(node, data, sizes, axis)
    if not node.has_input(1) and not node.integer("keepdims", 1):
        parts = [node.emit(relax.op.squeeze(part.expr, [axis]), data.narrow_type) for part in parts]
    return SequenceValue(parts)


def _split(node: Node, data: Value, sizes: Sequence[int], axis: int) -> list[TensorValue]:
    starts = [int(start) for start in np.cumsum([0, *sizes])]
    return [
        node.emit(relax.op.strided_slice(data.expr, [axis], [start], [start + size]), data.narrow_type)
        for start, size in zip(starts, sizes, strict=False)
    ]


@converter("ConcatFromSequence")
def concat_from_sequence(node: Node) -> Result:
    """Convert ConcatFromSequence: the items joined along an axis, which may be a new one."""
    items = node.sequence_input().items
    if not items:
        raise node.unsupported("an empty sequence")
    new_axis = node.integer("new_axis", 0)
    axis = node.axis(rank=items[0].rank + new_axis)
    parts = [node.emit(relax.op.expand_dims(item.expr, axis)).expr if new_axis else item.expr for item in items]
    return node.emit(relax.op.concat(parts, axis=axis), items[0].narrow_type)


@converter("SequenceMap", since=17)
def sequence_map(node: Node) -> Result:
    """Convert SequenceMap: the body on each item, with the items of further sequences beside it."""
    items = node.sequence_input().items
    if not items:
        raise node.unsupported("an empty sequence")
    body = node.subgraph("body")
    columns: list[list[Value]] = [[] for _ in body.output]
    for position, item in enumerate(items):
        others = [_beside(other, position) for other in node.inputs[1:] if other is not None]
        for column, value in zip(columns, node.graph.import_subgraph(body, [item, *others]), strict=True):
            if not isinstance(value, Value):
                raise node.unsupported("a sequence of sequences")
            column.append(value)
    return [SequenceValue(column) for column in columns]


def _beside(value: AnyValue, position: int) -> AnyValue:
    return value.items[position] if isinstance(value, SequenceValue) else value


@converter("Optional", since=15)
def optional(node: Node) -> Result:
    """Convert Optional: an optional with the input as its element, or without one."""
    value = node.inputs[0] if node.inputs else None
    return EmptyOptional() if value is None else value


@converter("OptionalHasElement", since=15)
def optional_has_element(node: Node) -> Result:
    """Convert OptionalHasElement: a constant."""
    value = node.inputs[0] if node.inputs else None
    return np.array(value is not None and not isinstance(value, EmptyOptional))


@converter("OptionalGetElement", since=15)
def optional_get_element(node: Node) -> Result:
    """Convert OptionalGetElement: the element."""
    value = node.inputs[0]
    if value is None or isinstance(value, EmptyOptional):
        raise node.unsupported("the optional has no element")
    return value
