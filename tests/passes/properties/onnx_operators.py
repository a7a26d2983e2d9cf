"""Growth of a graph by single operators."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from onnx import helper

from passes.tensor_types import numpy_dtype
from tests.passes.properties.onnx_graphs import (
    FLOATS,
    INTEGERS,
    SPECIAL,
    SYMBOL,
    Graph,
    Tensor,
    broadcast,
    is_any,
    is_boolean,
    is_float,
    is_number,
    size,
)


def _unary(graph: Graph) -> None:
    choices = {
        "Neg": (lambda t: is_number(t) and not t.dtype.startswith("u"), False),
        "Abs": (is_number, False),
        "Identity": (is_any, False),
        "Relu": (is_float, False),
        "Sigmoid": (is_float, True),
        "Tanh": (is_float, True),
        "Sqrt": (is_float, True),
        "Exp": (lambda t: is_float(t) and t.exact, True),
        "Floor": (lambda t: is_float(t) and t.exact, False),
        "Ceil": (lambda t: is_float(t) and t.exact, False),
        "Round": (lambda t: is_float(t) and t.exact, False),
        "Not": (is_boolean, False),
    }
    operator = graph.draw(st.sampled_from(sorted(choices)))
    accepts, rounds = choices[operator]
    tensor = graph.pick(accepts)
    if tensor is not None:
        graph.node(operator, [tensor], tensor.shape, rounds=rounds)


def _binary(graph: Graph) -> None:
    kinds = {
        "Add": (is_number, True), "Sub": (is_number, True), "Mul": (is_number, True), "Div": (is_float, True),
        "Min": (is_number, False), "Max": (is_number, False), "And": (is_boolean, False), "Or": (is_boolean, False),
        "Xor": (is_boolean, False),
    }  # fmt: skip
    operator = graph.draw(st.sampled_from(sorted(kinds)))
    accepts, rounds = kinds[operator]
    left = graph.pick(accepts)
    if left is None:
        return
    right = graph.pick(lambda t: t.dtype == left.dtype and broadcast(left.shape, t.shape) is not None) or left
    if graph.draw(st.booleans()):
        left, right = right, left
    shape = broadcast(left.shape, right.shape)
    if shape is not None and size(shape) <= 4096:
        graph.node(operator, [left, right], shape, rounds=rounds and is_float(left))


def _with_constant(graph: Graph) -> None:
    tensor = graph.pick(is_number)
    if tensor is None:
        return
    operator = graph.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"]))
    if operator == "Div" and not is_float(tensor):
        return
    if operator == "Pow":
        if not is_float(tensor) and tensor.dtype not in ("int32", "int64"):
            return
        value = graph.draw(st.sampled_from((1.0, 2.0, 3.0, -1.0) if is_float(tensor) else (1, 2, 3)))
    else:
        value = graph.draw(st.sampled_from(SPECIAL if is_float(tensor) else (0, 1, 2, 3)))
    shape = graph.draw(st.sampled_from([(), (1,), (1, 1)]))
    other = graph.constant(np.full(shape, value).astype(numpy_dtype(tensor.dtype)))
    operands = [tensor, other] if operator in ("Div", "Pow") or graph.draw(st.booleans()) else [other, tensor]
    result = broadcast(tensor.shape, shape)
    assert result is not None
    graph.node(operator, operands, result, rounds=is_float(tensor))


def _compare(graph: Graph) -> None:
    left = graph.pick(lambda t: t.exact and t.dtype in (*FLOATS, "int32", "int64"))
    if left is None:
        return
    right = graph.pick(lambda t: t.exact and t.dtype == left.dtype and broadcast(left.shape, t.shape) is not None)
    shape = broadcast(left.shape, (right or left).shape)
    operator = graph.draw(st.sampled_from(["Less", "Greater", "Equal", "LessOrEqual", "GreaterOrEqual"]))
    if shape is not None and size(shape) <= 4096:
        graph.node(operator, [left, right or left], shape, dtype="bool")


def _where(graph: Graph) -> None:
    condition = graph.pick(is_boolean)
    if condition is None:
        return
    left = graph.pick(lambda t: broadcast(condition.shape, t.shape) is not None)
    if left is None:
        return
    right = graph.pick(lambda t: t.dtype == left.dtype and t.shape == left.shape) or left
    shape = broadcast(condition.shape, left.shape)
    if shape is not None and size(shape) <= 4096:
        result = graph.node("Where", [condition, left, right], shape, dtype=left.dtype)
        assert result.dtype == left.dtype


def _cast(graph: Graph) -> None:
    tensor = graph.pick(lambda t: t.exact)
    if tensor is None:
        return
    targets = (*FLOATS, "bool") if is_float(tensor) else (*FLOATS, *INTEGERS, "bool")
    dtype = graph.draw(st.sampled_from(targets))
    graph.node("Cast", [tensor], tensor.shape, dtype=dtype, to=helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype)))


def _transpose(graph: Graph) -> None:
    tensor = graph.pick(lambda t: len(t.shape) > 0)
    if tensor is None:
        return
    axes = graph.draw(st.permutations(range(len(tensor.shape))))
    graph.node("Transpose", [tensor], tuple(tensor.shape[axis] for axis in axes), perm=axes)


def _merge_or_split(graph: Graph) -> None:
    """Reshape by merging neighbouring axes, or splitting one; a symbolic axis stays one."""
    tensor = graph.pick(lambda t: len(t.shape) > 0)
    if tensor is None:
        return
    shape = list(tensor.shape)
    axis = graph.draw(st.integers(0, len(shape) - 1))
    if len(shape) > 1 and axis and SYMBOL not in shape[axis - 1 : axis + 1] and graph.draw(st.booleans()):
        shape[axis - 1 : axis + 1] = [shape[axis - 1] * shape[axis]]
    elif shape[axis] != SYMBOL and len(shape) < 5 and shape[axis]:
        divisor = graph.draw(st.sampled_from([d for d in range(1, 9) if shape[axis] % d == 0]))
        shape[axis : axis + 1] = [divisor, shape[axis] // divisor]
    if shape.count(SYMBOL) > 1 or (SYMBOL in shape and 0 in shape):
        return  # -1 is not defined beside 0
    target = graph.constant(np.array([-1 if dimension == SYMBOL else dimension for dimension in shape], "int64"))
    graph.node("Reshape", [tensor, target], tuple(shape), allowzero=int(0 in shape))


def _unsqueeze(graph: Graph) -> None:
    tensor = graph.pick(lambda t: len(t.shape) < 5)
    if tensor is None:
        return
    rank = len(tensor.shape) + 1
    axis = graph.draw(st.integers(-rank, rank - 1))
    shape = list(tensor.shape)
    shape.insert(axis % rank, 1)
    graph.node("Unsqueeze", [tensor, graph.constant(np.array([axis], "int64"))], tuple(shape))


def _squeeze(graph: Graph) -> None:
    tensor = graph.pick(lambda t: 1 in t.shape)
    if tensor is None:
        return
    axis = graph.draw(st.sampled_from([axis for axis, extent in enumerate(tensor.shape) if extent == 1]))
    shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
    given = axis - len(tensor.shape) if graph.draw(st.booleans()) else axis
    graph.node("Squeeze", [tensor, graph.constant(np.array([given], "int64"))], shape)


def _expand(graph: Graph) -> None:
    tensor = graph.pick(lambda t: SYMBOL not in t.shape and size(t.shape) <= 64)
    if tensor is None:
        return
    target = tuple(
        graph.draw(st.sampled_from([2, 3])) if d == 1 and graph.draw(st.booleans()) else d for d in tensor.shape
    )
    if len(target) < 5 and graph.draw(st.booleans()):
        target = (2, *target)
    graph.node("Expand", [tensor, graph.constant(np.array(target, "int64"))], target)


def _slice(graph: Graph) -> None:
    tensor = graph.pick(lambda t: any(d not in (SYMBOL, 0) for d in t.shape))
    if tensor is None:
        return
    axis = graph.draw(st.sampled_from([a for a, d in enumerate(tensor.shape) if d not in (SYMBOL, 0)]))
    extent = tensor.shape[axis]
    step = graph.draw(st.sampled_from([1, 1, 2, -1]))
    begin = graph.draw(st.integers(0, extent - 1))
    end = graph.draw(st.integers(begin, extent + 2)) if step > 0 else -100
    taken = len(range(extent)[begin:end:step]) if step > 0 else len(range(begin, -1, step))
    begin = begin - extent if graph.draw(st.booleans()) and step > 0 else begin
    parts = [graph.constant(np.array([value], "int64")) for value in (begin, end, axis, step)]
    shape = tuple(taken if position == axis else d for position, d in enumerate(tensor.shape))
    graph.node("Slice", [tensor, *parts], shape)


def _concat(graph: Graph) -> None:
    first = graph.pick(lambda t: any(d != SYMBOL for d in t.shape))
    if first is None:
        return
    axis = graph.draw(st.sampled_from([a for a, d in enumerate(first.shape) if d != SYMBOL]))

    def fits(other: Tensor) -> bool:
        same = len(other.shape) == len(first.shape) and other.dtype == first.dtype
        return (
            same
            and other.shape[axis] != SYMBOL
            and all(
                a == b for position, (a, b) in enumerate(zip(first.shape, other.shape, strict=True)) if position != axis
            )
        )

    second = graph.pick(fits)
    if second is None or first.shape[axis] + second.shape[axis] > 16:
        return
    shape = tuple(d + second.shape[axis] if p == axis else d for p, d in enumerate(first.shape))
    graph.node("Concat", [first, second], shape, axis=axis - len(shape) if graph.draw(st.booleans()) else axis)


def _reduce(graph: Graph) -> None:
    tensor = graph.pick(lambda t: is_float(t) and graph.has_elements(t) and len(t.shape) > 0)
    if tensor is None:
        return
    axis, keep = graph.axis(tensor), graph.draw(st.booleans())
    operator = graph.draw(st.sampled_from(["ReduceMean", "ReduceMax"]))
    position = axis % len(tensor.shape)
    kept = (1,) if keep else ()
    shape = tensor.shape[:position] + kept + tensor.shape[position + 1 :]
    graph.node(operator, [tensor], shape, rounds=True, axes=[axis], keepdims=int(keep))


def _pad(graph: Graph) -> None:
    tensor = graph.pick(lambda t: is_float(t) and 0 < len(t.shape) < 5 and t.shape[-1] not in (SYMBOL, 0))
    if tensor is None:
        return
    width = graph.draw(st.integers(0, 2))
    widths = [0] * len(tensor.shape)
    pads = graph.constant(np.array([*widths, *widths[:-1], width], "int64"))
    graph.node("Pad", [tensor, pads], (*tensor.shape[:-1], tensor.shape[-1] + width))


OPERATORS = (
    _unary, _binary, _binary, _with_constant, _with_constant, _compare, _where, _cast, _cast, _transpose, _transpose,
    _merge_or_split, _merge_or_split, _unsqueeze, _squeeze, _expand, _slice, _concat, _reduce, _pad,
)  # fmt: skip
