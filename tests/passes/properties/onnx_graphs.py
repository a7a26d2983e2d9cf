"""ONNX graphs that grow node by node, each of which has its preconditions met by the tensors that there are already.

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
from hypothesis.vendor.pretty import RepresentationPrinter
from onnx import helper, numpy_helper

from passes.tensor_types import numpy_dtype

OPSET = 17
SYMBOL = "n"
Dimension = int | str
Draw = Callable[[st.SearchStrategy], object]

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, float("inf"), float("-inf"), float("nan"))


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
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def name(self) -> str:
        return f"t{len(self.inputs) + len(self.constants) + len(self.nodes)}_{len(self.tensors)}"

    def input(self, shape: tuple[Dimension, ...], dtype: str) -> Tensor:
        """Add an input, and an array for it."""
        tensor = Tensor(f"x{len(self.inputs)}", shape, dtype)
        self.inputs.append(tensor)
        self.tensors.append(tensor)
        extents = tuple(self.extent if dimension == SYMBOL else dimension for dimension in shape)
        self.arrays[tensor.name] = values(self.draw, extents, dtype)
        return tensor

    def constant(self, array: np.ndarray) -> Tensor:
        for name, known in self.constants.items():
            if known.dtype == array.dtype and known.shape == array.shape and known.tobytes() == array.tobytes():
                return Tensor(name, array.shape, array.dtype.name)
        tensor = Tensor(self.name() + "c", array.shape, array.dtype.name)
        self.constants[tensor.name] = array
        return tensor

    def scalar(self, value: float, dtype: str) -> Tensor:
        return self.constant(np.array(value).astype(numpy_dtype(dtype)))

    def weights(self, shape: tuple[int, ...], dtype: str, *, positive: bool = False) -> Tensor:
        """Add an initializer of numbers between -1 and 1, or between 1/2 and 1."""
        rng = np.random.default_rng(self.draw(st.integers(0, 2**16)))
        array = rng.uniform(0.5 if positive else -1, 1, shape)
        return self.constant(array.astype(numpy_dtype(dtype)))

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


def size(shape: tuple[Dimension, ...]) -> int:
    return int(np.prod([8 if dimension == SYMBOL else dimension for dimension in shape]))


def is_any(_: Tensor) -> bool:
    return True


def is_float(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS


def is_number(tensor: Tensor) -> bool:
    return tensor.dtype != "bool"


def is_boolean(tensor: Tensor) -> bool:
    return tensor.dtype == "bool"


@dataclass(frozen=True, repr=False)
class Generated:
    """A model and arrays for its inputs."""

    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]

    def _repr_pretty_(self, printer: RepresentationPrinter, cycle: bool) -> None:
        printer.text(f"{onnx.printer.to_text(self.model)}\n{self.inputs}")


def values(draw: Draw, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype in INTEGERS:
        return rng.integers(0 if dtype.startswith("u") else -9, 9, shape).astype(dtype)
    numbers = np.round(rng.standard_normal(shape) * 4, 2)
    if draw(st.booleans()):
        numbers = np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), numbers)
    return numbers.astype(numpy_dtype(dtype))


def generated(graph: Graph) -> Generated:
    """Return the model: its outputs are what nobody reads, and at random an initializer or what others read too."""
    draw = graph.draw
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
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return Generated(model, graph.arrays)


def arrays_of(graph: Graph) -> set[str]:
    """Return the names that need no computation."""
    return {tensor.name for tensor in graph.inputs} | set(graph.constants)


def _info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        tensor.name, helper.np_dtype_to_tensor_dtype(numpy_dtype(tensor.dtype)), tensor.shape
    )
