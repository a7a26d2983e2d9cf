"""Shape arithmetic of exporters, evaluated on integers and symbols while the model is imported.

Works on object arrays whose elements are Python integers or symbolic expressions. A node is folded only if the result
is known for all values of the symbols; anything else is left to the converters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import tvm.ir
from onnx import TensorProto
from tvm import tirx

from optimizer.frontend.dimensions import Dimension, as_expression, product, simplified
from optimizer.frontend.node import Node
from optimizer.frontend.value import ConstantValue, IntegerValue, Value, integer_value

_INTEGER_NAMES: dict[int, str] = {TensorProto.INT64: "int64", TensorProto.INT32: "int32"}
_MOST_ELEMENTS = 1024  # longer vectors are data, not shapes

Arrays: TypeAlias = "Sequence[np.ndarray]"
Rule: TypeAlias = "Callable[[Node, Arrays], list[np.ndarray] | None]"


# What is evaluated here alone.
OPERATORS = ("Shape", "Size")


def evaluate(node: Node) -> list[Value] | None:
    """Return the outputs of a node that computes with shapes, or None if it is not one."""
    if node.domain != "":
        return None
    if node.operator in OPERATORS:
        return _shape_or_size(node)
    rule = _RULES.get(node.operator)
    if rule is None or not any(isinstance(value, IntegerValue) for value in node.inputs):
        return None
    arrays: list[np.ndarray] = []
    for value in node.inputs:
        integers = value.integers if isinstance(value, Value) else None
        if integers is None:
            return None
        arrays.append(integers)
    results = rule(node, arrays)
    if results is None or any(result.size > _MOST_ELEMENTS for result in results):
        return None
    dtype = _result_dtype(node)
    return None if dtype is None else [integer_value(result, dtype, node.graph.builder) for result in results]


def _shape_or_size(node: Node) -> list[Value] | None:
    value = node.input(0)
    if node.operator == "Size":
        return [integer_value(_array(product(value.shape)), "int64", node.graph.builder)]
    rank = value.rank
    bounds = (node.integer("start", 0), node.integer("end", rank))
    start, end = (int(np.clip(bound + rank if bound < 0 else bound, 0, rank)) for bound in bounds)
    return [integer_value(_array(*value.shape[start:end], vector=True), "int64", node.graph.builder)]


def _array(*elements: Dimension, vector: bool = False) -> np.ndarray:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array if vector else array.reshape(())


def _result_dtype(node: Node) -> str | None:
    if node.operator == "Cast":
        return _INTEGER_NAMES.get(node.integer("to"))
    if node.operator in _COMPARISONS:
        return "bool"
    return node.input(1 if node.operator == "Where" else 0).dtype


def _elementwise(function: Callable[..., Dimension | bool | None]) -> Rule:
    def rule(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
        broadcast = np.broadcast_arrays(*arrays)
        result = np.empty(broadcast[0].shape, dtype=object)
        for index in np.ndindex(result.shape):
            element = function(node, *(array[index] for array in broadcast))
            if element is None:
                return None
            result[index] = element
        return [result]

    return rule


def _divide(node: Node, left: Dimension, right: Dimension) -> Dimension | None:
    """Integer division truncates towards zero in ONNX; it equals the floor where both sides are non-negative."""
    if isinstance(right, int) and right == 0:
        return None
    if isinstance(left, int) and isinstance(right, int):
        quotient = abs(left) // abs(right)
        return quotient if (left < 0) == (right < 0) else -quotient
    if _holds(node, as_expression(left) >= 0) and _holds(node, as_expression(right) >= 0):
        return tirx.floordiv(as_expression(left), as_expression(right))
    return tirx.truncdiv(as_expression(left), as_expression(right))


def _modulo(node: Node, left: Dimension, right: Dimension) -> Dimension | None:
    if (isinstance(right, int) and right <= 0) or node.integer("fmod", 0):
        return None
    return tirx.floormod(as_expression(left), as_expression(right))


def _holds(node: Node, condition: tvm.ir.Expr) -> bool:
    return node.graph.symbols.proves(condition)


def _extremum(choose: Callable[..., Dimension]) -> Callable[..., Dimension]:
    def function(_: Node, *elements: Dimension) -> Dimension:
        result = elements[0]
        for element in elements[1:]:
            result = choose(as_expression(result), as_expression(element))
        return simplified(result)

    return function


def _compare(
    holds: Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr], fails: Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr]
) -> Callable[[Node, Dimension, Dimension], bool | None]:
    def function(node: Node, left: Dimension, right: Dimension) -> bool | None:
        a, b = as_expression(left), as_expression(right)
        if _holds(node, holds(a, b)):
            return True
        return False if _holds(node, fails(a, b)) else None

    return function


def _where(_: Node, condition: object, yes: Dimension, no: Dimension) -> Dimension:
    return yes if bool(condition) else no


_COMPARISONS = {
    "Equal": _compare(tirx.EQ, lambda a, b: tirx.any(a < b, a > b)),
    "Less": _compare(lambda a, b: a < b, lambda a, b: a >= b),
    "LessOrEqual": _compare(lambda a, b: a <= b, lambda a, b: a > b),
    "Greater": _compare(lambda a, b: a > b, lambda a, b: a <= b),
    "GreaterOrEqual": _compare(lambda a, b: a >= b, lambda a, b: a < b),
}


def _constant_vector(node: Node, index: int) -> list[int] | None:
    if not node.has_input(index):
        return None
    value = node.input(index)
    return [int(i) for i in value.constant.ravel()] if isinstance(value, ConstantValue) else None


def _gather(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
    if node.input(1).constant is None:
        return None
    return [np.asarray(np.take(arrays[0], arrays[1].astype(np.int64), axis=node.integer("axis", 0)), dtype=object)]


def _slice(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
    data = arrays[0]
    if node.has_attribute("starts"):
        starts, ends = node.integers("starts"), node.integers("ends")
        axes, steps = node.integers("axes", range(len(starts))), [1] * len(starts)
    else:
        known = [_constant_vector(node, index) for index in range(1, len(node.inputs))]
        if any(vector is None for index, vector in enumerate(known) if node.has_input(index + 1)):
            return None
        starts, ends = known[0] or [], known[1] or []
        axes = (known[2] if len(known) > 2 else None) or list(range(len(starts)))
        steps = (known[3] if len(known) > 3 else None) or [1] * len(starts)
    index: list[slice] = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        stop = None if step < 0 and end < -data.shape[axis] else end
        index[axis] = slice(start, stop, step)
    return [data[tuple(index)]]


def _concat(node: Node, arrays: Arrays) -> list[np.ndarray]:
    return [np.concatenate(arrays, axis=node.integer("axis"))]


def _squeeze(node: Node, arrays: Arrays) -> list[np.ndarray]:
    axes = node.axes_argument()
    return [np.squeeze(arrays[0], None if axes is None else tuple(axes))]


def _unsqueeze(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
    axes = node.integers("axes") if node.has_attribute("axes") else _constant_vector(node, 1)
    return None if axes is None else [np.expand_dims(arrays[0], tuple(axes))]


def _reshape(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
    shape = _constant_vector(node, 1)
    return None if shape is None or 0 in shape else [arrays[0].reshape(shape)]


def _expand(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
    shape = _constant_vector(node, 1)
    if shape is None:
        return None
    return [np.broadcast_to(arrays[0], np.broadcast_shapes(arrays[0].shape, tuple(shape)))]


def _identity(_: Node, arrays: Arrays) -> list[np.ndarray]:
    return [arrays[0]]


def _reduce(combine: Callable[[Dimension, Dimension], Dimension]) -> Rule:
    def rule(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
        data = arrays[0]
        axes = node.axes_argument()
        if data.ndim != 1 or data.size == 0 or (axes is not None and axes != [0]):
            return None
        result = data[0]
        for element in data[1:]:
            result = combine(result, element)
        return [_array(result, vector=bool(node.integer("keepdims", 1)))]

    return rule


def _split(node: Node, arrays: Arrays) -> list[np.ndarray] | None:
    sizes = node.integers("split") if node.has_attribute("split") else _constant_vector(node, 1)
    axis = node.integer("axis", 0)
    length = arrays[0].shape[axis]
    if sizes is None:
        part = -(-length // node.output_count)
        sizes = [min(part, length - i * part) for i in range(node.output_count)]
    return np.split(arrays[0], np.cumsum(sizes)[:-1], axis=axis) if sum(sizes) == length else None


def _range(_: Node, arrays: Arrays) -> list[np.ndarray] | None:
    start, limit, step = (array.item() for array in arrays)
    length = simplified(limit - start)
    if not isinstance(length, int) or not isinstance(step, int) or step == 0:
        return None
    return [_array(*(start + offset for offset in range(0, length, step)), vector=True)]


_RULES: dict[str, Rule] = {
    "Abs": _elementwise(lambda node, a: a if _holds(node, as_expression(a) >= 0) else None),
    "Add": _elementwise(lambda _, a, b: a + b),
    "Cast": _identity,
    "Concat": _concat,
    "Div": _elementwise(_divide),
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _identity,
    "Max": _elementwise(_extremum(tirx.max)),
    "Min": _elementwise(_extremum(tirx.min)),
    "Mod": _elementwise(_modulo),
    "Mul": _elementwise(lambda _, a, b: a * b),
    "Neg": _elementwise(lambda _, a: -a),
    "Range": _range,
    "ReduceProd": _reduce(lambda a, b: a * b),
    "ReduceSum": _reduce(lambda a, b: a + b),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _elementwise(lambda _, a, b: a - b),
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(_where),
    **{operator: _elementwise(rule) for operator, rule in _COMPARISONS.items()},
}
