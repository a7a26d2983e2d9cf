"""Generated ONNX models: each node is one whose preconditions hold for the tensors that there are already.

Dimensions are up to 8, 0 and 1 among them, ranks up to 5; the first dimension of some inputs is symbolic. Initializers
are shared, hold NaN, infinities and both zeros, and may be outputs. Axes are negative as often as not.

Functions with jumps (floor, comparisons, casts to integers) are only applied to tensors that no rounding has touched:
elsewhere one rounding more or less, which passes may make, would be a difference of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.printer
from hypothesis import strategies as st
from onnx import helper, numpy_helper

OPSET = 17
SYMBOL = "n"
Dimension = int | str
Draw = Callable[[st.SearchStrategy], object]

FLOATS = ("float32", "float64", "float16")
INTEGERS = ("int8", "uint8", "int32", "int64")
_SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, float("inf"), float("-inf"), float("nan"))


@dataclass(frozen=True)
class Tensor:
    """A live tensor: `exact` while nothing that rounds was applied."""

    name: str
    shape: tuple[Dimension, ...]
    dtype: str
    exact: bool = True


@dataclass
class Graph:
    """A model that grows. `extent` is what the symbolic dimension is when it runs."""

    draw: Draw
    extent: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def name(self) -> str:
        return f"t{len(self.inputs) + len(self.constants) + len(self.nodes)}_{len(self.tensors)}"

    def constant(self, array: np.ndarray) -> Tensor:
        for name, known in self.constants.items():
            if known.dtype == array.dtype and known.shape == array.shape and known.tobytes() == array.tobytes():
                return Tensor(name, array.shape, array.dtype.name)
        tensor = Tensor(self.name() + "c", array.shape, array.dtype.name)
        self.constants[tensor.name] = array
        return tensor

    def scalar(self, value: float, dtype: str) -> Tensor:
        return self.constant(np.array(value, dtype))

    def node(
        self,
        operator: str,
        inputs: list[Tensor],
        shape: tuple[Dimension, ...],
        *,
        dtype: str | None = None,
        rounds: bool = False,
        **attributes: object,
    ) -> Tensor:
        exact = all(tensor.exact for tensor in inputs) and not rounds
        result = Tensor(self.name(), shape, dtype or inputs[0].dtype, exact)
        names = [tensor.name for tensor in inputs]
        self.nodes.append(helper.make_node(operator, names, [result.name], **attributes))
        self.tensors.append(result)
        return result

    def pick(self, accepts: Callable[[Tensor], bool]) -> Tensor | None:
        candidates = [tensor for tensor in self.tensors if accepts(tensor)]
        return self.draw(st.sampled_from(candidates)) if candidates else None

    def has_elements(self, tensor: Tensor) -> bool:
        """Return whether a reduction of the tensor is defined."""
        return 0 not in tensor.shape and (self.extent > 0 or SYMBOL not in tensor.shape)

    def axis(self, tensor: Tensor) -> int:
        rank = len(tensor.shape)
        return self.draw(st.integers(-rank, rank - 1))


def broadcast(left: tuple[Dimension, ...], right: tuple[Dimension, ...]) -> tuple[Dimension, ...] | None:
    """Return the shape of an elementwise operator's result, or None where the operands do not fit."""
    rank = max(len(left), len(right))
    result: list[Dimension] = []
    for a, b in zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True):
        if a != b and 1 not in (a, b):
            return None
        result.append(b if a == 1 else a)
    return tuple(result)


def _size(shape: tuple[Dimension, ...]) -> int:
    return int(np.prod([8 if dimension == SYMBOL else dimension for dimension in shape]))


def _any(_: Tensor) -> bool:
    return True


def _float(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS


def _number(tensor: Tensor) -> bool:
    return tensor.dtype != "bool"


def _boolean(tensor: Tensor) -> bool:
    return tensor.dtype == "bool"


def _unary(graph: Graph) -> None:
    choices = {
        "Neg": (lambda t: t.dtype in (*FLOATS, "int32", "int64", "int8"), False),
        "Abs": (_number, False),
        "Identity": (_any, False),
        "Relu": (_float, False),
        "Sigmoid": (_float, True),
        "Tanh": (_float, True),
        "Sqrt": (_float, True),
        "Exp": (lambda t: _float(t) and t.exact, True),
        "Floor": (lambda t: _float(t) and t.exact, False),
        "Ceil": (lambda t: _float(t) and t.exact, False),
        "Round": (lambda t: _float(t) and t.exact, False),
        "Not": (_boolean, False),
    }
    operator = graph.draw(st.sampled_from(sorted(choices)))
    accepts, rounds = choices[operator]
    tensor = graph.pick(accepts)
    if tensor is not None:
        graph.node(operator, [tensor], tensor.shape, rounds=rounds)


def _binary(graph: Graph) -> None:
    kinds = {
        "Add": (_number, True), "Sub": (_number, True), "Mul": (_number, True), "Div": (_float, True),
        "Min": (_number, False), "Max": (_number, False), "And": (_boolean, False), "Or": (_boolean, False),
        "Xor": (_boolean, False),
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
    if shape is not None and _size(shape) <= 4096:
        graph.node(operator, [left, right], shape, rounds=rounds and _float(left))


def _with_constant(graph: Graph) -> None:
    tensor = graph.pick(_number)
    if tensor is None:
        return
    operator = graph.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"]))
    if operator == "Div" and not _float(tensor):
        return
    if operator == "Pow":
        if tensor.dtype in ("int8", "uint8"):
            return
        value = graph.draw(st.sampled_from((1.0, 2.0, 3.0, -1.0) if _float(tensor) else (1, 2, 3)))
    else:
        value = graph.draw(st.sampled_from(_SPECIAL if _float(tensor) else (0, 1, 2, 3)))
    shape = graph.draw(st.sampled_from([(), (1,), (1, 1)]))
    other = graph.constant(np.full(shape, value, tensor.dtype))
    operands = [tensor, other] if operator in ("Div", "Pow") or graph.draw(st.booleans()) else [other, tensor]
    result = broadcast(tensor.shape, shape)
    assert result is not None
    graph.node(operator, operands, result, rounds=_float(tensor))


def _compare(graph: Graph) -> None:
    left = graph.pick(lambda t: t.exact and t.dtype in (*FLOATS, "int32", "int64"))
    if left is None:
        return
    right = graph.pick(lambda t: t.exact and t.dtype == left.dtype and broadcast(left.shape, t.shape) is not None)
    shape = broadcast(left.shape, (right or left).shape)
    operator = graph.draw(st.sampled_from(["Less", "Greater", "Equal", "LessOrEqual", "GreaterOrEqual"]))
    if shape is not None and _size(shape) <= 4096:
        graph.node(operator, [left, right or left], shape, dtype="bool")


def _where(graph: Graph) -> None:
    condition = graph.pick(_boolean)
    if condition is None:
        return
    left = graph.pick(lambda t: broadcast(condition.shape, t.shape) is not None)
    if left is None:
        return
    right = graph.pick(lambda t: t.dtype == left.dtype and t.shape == left.shape) or left
    shape = broadcast(condition.shape, left.shape)
    if shape is not None and _size(shape) <= 4096:
        result = graph.node("Where", [condition, left, right], shape, dtype=left.dtype)
        assert result.dtype == left.dtype


def _cast(graph: Graph) -> None:
    tensor = graph.pick(lambda t: t.exact)
    if tensor is None:
        return
    targets = (*FLOATS, "bool") if _float(tensor) else (*FLOATS, *INTEGERS, "bool")
    dtype = graph.draw(st.sampled_from(targets))
    graph.node("Cast", [tensor], tensor.shape, dtype=dtype, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


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
    tensor = graph.pick(lambda t: SYMBOL not in t.shape and _size(t.shape) <= 64)
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
    tensor = graph.pick(lambda t: _float(t) and graph.has_elements(t) and len(t.shape) > 0)
    if tensor is None:
        return
    axis, keep = graph.axis(tensor), graph.draw(st.booleans())
    operator = graph.draw(st.sampled_from(["ReduceMean", "ReduceMax"]))
    position = axis % len(tensor.shape)
    kept = (1,) if keep else ()
    shape = tensor.shape[:position] + kept + tensor.shape[position + 1 :]
    graph.node(operator, [tensor], shape, rounds=True, axes=[axis], keepdims=int(keep))


def _pad(graph: Graph) -> None:
    tensor = graph.pick(lambda t: _float(t) and 0 < len(t.shape) < 5 and t.shape[-1] not in (SYMBOL, 0))
    if tensor is None:
        return
    width = graph.draw(st.integers(0, 2))
    widths = [0] * len(tensor.shape)
    pads = graph.constant(np.array([*widths, *widths[:-1], width], "int64"))
    graph.node("Pad", [tensor, pads], (*tensor.shape[:-1], tensor.shape[-1] + width))


def _formula(graph: Graph) -> None:
    """A normalization, activation or softmax as exporters write it out."""
    tensor = graph.pick(lambda t: t.dtype == "float32" and len(t.shape) > 1 and t.shape[-1] not in (SYMBOL, 0))
    if tensor is None or SYMBOL in tensor.shape[1:] or not graph.has_elements(tensor):
        return
    graph.draw(st.sampled_from([_layer_norm, _rms_norm, _gelu, _silu, _softmax]))(graph, tensor)


def _layer_norm(graph: Graph, x: Tensor) -> None:
    mean = _float_node(graph, "ReduceMean", x, shape=(*x.shape[:-1], 1), axes=[-1])
    centered = _float_node(graph, "Sub", x, mean)
    _divide_by_root(graph, centered, centered)
    if graph.draw(st.booleans()):
        scale = graph.constant(np.linspace(0.5, 2, x.shape[-1], dtype="float32"))
        scaled = _float_node(graph, "Mul", graph.tensors[-1], scale)
        _float_node(graph, "Add", scaled, scale)


def _rms_norm(graph: Graph, x: Tensor) -> None:
    _divide_by_root(graph, x, x)


def _divide_by_root(graph: Graph, x: Tensor, squared: Tensor) -> None:
    if graph.draw(st.booleans()):
        square = _float_node(graph, "Mul", squared, squared)
    else:
        square = _float_node(graph, "Pow", squared, graph.scalar(2.0, "float32"))
    variance = _float_node(graph, "ReduceMean", square, shape=(*x.shape[:-1], 1), axes=[-1])
    root = _float_node(graph, "Sqrt", _float_node(graph, "Add", variance, graph.scalar(0.125, "float32")))
    _float_node(graph, "Div", x, root)


def _gelu(graph: Graph, x: Tensor) -> None:
    scaled = _float_node(graph, "Div", x, graph.scalar(float(np.sqrt(np.float32(2))), "float32"))
    bell = _float_node(graph, "Add", _float_node(graph, "Erf", scaled), graph.scalar(1.0, "float32"))
    _float_node(graph, "Mul", _float_node(graph, "Mul", x, bell), graph.scalar(0.5, "float32"))


def _silu(graph: Graph, x: Tensor) -> None:
    _float_node(graph, "Mul", x, _float_node(graph, "Sigmoid", x))


def _softmax(graph: Graph, x: Tensor) -> None:
    maximum = _float_node(graph, "ReduceMax", x, shape=(*x.shape[:-1], 1), axes=[-1])
    exponential = _float_node(graph, "Exp", _float_node(graph, "Sub", x, maximum))
    sums = graph.node(
        "ReduceSum", [exponential, graph.constant(np.array([-1], "int64"))], (*x.shape[:-1], 1), rounds=True
    )
    _float_node(graph, "Div", exponential, sums)


def _float_node(
    graph: Graph, operator: str, *inputs: Tensor, shape: tuple[Dimension, ...] | None = None, **attributes: object
) -> Tensor:
    result = shape or inputs[0].shape
    for other in inputs[1:]:
        result = broadcast(result, other.shape) or result
    return graph.node(operator, list(inputs), result, rounds=True, **attributes)


_GROWTH = (
    _unary, _binary, _binary, _with_constant, _with_constant, _compare, _where, _cast, _cast, _transpose, _transpose,
    _merge_or_split, _merge_or_split, _unsqueeze, _squeeze, _expand, _slice, _concat, _reduce, _pad, _formula, _formula,
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Generated:
    """A model and arrays for its inputs."""

    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return f"{onnx.printer.to_text(self.model)}\n{self.inputs}"


def _values(draw: Draw, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype in INTEGERS:
        return rng.integers(0 if dtype == "uint8" else -9, 9, shape).astype(dtype)
    values = np.round(rng.standard_normal(shape) * 4, 2)
    if draw(st.booleans()):
        values = np.where(rng.random(shape) < 0.2, rng.choice(_SPECIAL, shape), values)
    return values.astype(dtype)


@st.composite
def models(draw: Draw, most_nodes: int = 14) -> Generated:
    """Draw a model with arrays for its inputs."""
    graph = Graph(draw, draw(st.sampled_from([1, 2, 3, 0])))
    arrays: dict[str, np.ndarray] = {}
    for index in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(["float32"] * 4 + [*FLOATS, *INTEGERS, "bool"]))
        shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 0, 1, 2]), max_size=4)))
        if shape and draw(st.booleans()):
            shape = (SYMBOL, *shape[1:])
        tensor = Tensor(f"x{index}", shape, dtype)
        graph.inputs.append(tensor)
        graph.tensors.append(tensor)
        arrays[tensor.name] = _values(draw, tuple(graph.extent if d == SYMBOL else d for d in shape), dtype)
    if draw(st.booleans()):
        shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=3)))
        graph.tensors.append(graph.constant(_values(draw, shape, draw(st.sampled_from([*FLOATS, "int64", "bool"])))))
    for _ in range(draw(st.integers(1, most_nodes))):
        draw(st.sampled_from(_GROWTH))(graph)
    return Generated(_model(graph, draw), arrays)


def _model(graph: Graph, draw: Draw) -> onnx.ModelProto:
    read = {name for node in graph.nodes for name in node.input}
    computed = [tensor for tensor in graph.tensors if tensor.name not in arrays_of(graph)]
    outputs = [tensor for tensor in computed if tensor.name not in read]
    if graph.constants and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(graph.constants)))
        outputs.append(Tensor(name, graph.constants[name].shape, graph.constants[name].dtype.name))
    if len(computed) > len(outputs) and draw(st.booleans()):
        outputs.append(draw(st.sampled_from([tensor for tensor in computed if tensor.name in read])))
    if not outputs:
        outputs = [graph.node("Identity", [graph.inputs[0]], graph.inputs[0].shape)]
    proto = helper.make_graph(
        graph.nodes,
        "generated",
        [_info(tensor) for tensor in graph.inputs],
        [_info(tensor) for tensor in outputs],
        [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def arrays_of(graph: Graph) -> set[str]:
    """Return the names that need no computation."""
    return {tensor.name for tensor in graph.inputs} | set(graph.constants)


def _info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        tensor.name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape
    )
