"""One ONNX node as its converter sees it: typed attributes, inputs, and the ways to emit Relax."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import onnx
import tvm.ir
from onnx import numpy_helper
from tvm import relax

from optimizer.frontend.dimensions import Dimension, Shape, as_expression, product, provably_equal, static_shape
from optimizer.frontend.value import (
    AnyValue,
    ConstantValue,
    SequenceValue,
    TensorValue,
    Value,
    integer_value,
    numpy_dtype,
)

if TYPE_CHECKING:
    from optimizer.frontend.importer import GraphImporter

Output: TypeAlias = "AnyValue | relax.Expr | np.ndarray | None"
Result: TypeAlias = "Output | Sequence[Output]"
T = TypeVar("T")


class UnsupportedNodeError(Exception):
    """A node cannot be converted; the message is the reason, for the report of all blockers."""


class Node:
    """An ONNX node with its inputs resolved. `domain` is "" for the standard operators."""

    def __init__(
        self, proto: onnx.NodeProto, version: int, inputs: Sequence[AnyValue | None], graph: GraphImporter
    ) -> None:
        self.proto = proto
        self.operator = proto.op_type
        self.domain = normalized_domain(proto.domain)
        self.version = version
        self.inputs = tuple(inputs)
        self.graph = graph
        self._attributes = {attribute.name: attribute for attribute in proto.attribute}

    # Inputs and outputs

    def has_input(self, index: int) -> bool:
        """Return whether the optional input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int = 0) -> Value:
        """Return a tensor input that must be given."""
        value = self.optional_input(index)
        if value is None:
            raise UnsupportedNodeError(f"input {index} is missing")
        return value

    def optional_input(self, index: int) -> Value | None:
        """Return a tensor input, or None if it is not given."""
        if not self.has_input(index):
            return None
        value = self.inputs[index]
        if isinstance(value, SequenceValue):
            raise UnsupportedNodeError(f"input {index} is a sequence where a tensor is expected")
        return value

    def sequence_input(self, index: int = 0) -> SequenceValue:
        """Return a sequence (or optional) input."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if not isinstance(value, SequenceValue):
            raise UnsupportedNodeError(f"input {index} is not a sequence known at compile time")
        return value

    def expr(self, index: int = 0) -> relax.Expr:
        """Return the Relax expression of a required tensor input."""
        return self.input(index).expr

    @property
    def output_count(self) -> int:
        """Return the number of outputs up to the last one that is used by name."""
        return len(self.proto.output)

    def has_output(self, index: int) -> bool:
        """Return whether somebody may read this output."""
        return index < len(self.proto.output) and bool(self.proto.output[index])

    # Attributes

    def has_attribute(self, name: str) -> bool:
        """Return whether the attribute is given."""
        return name in self._attributes

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer attribute."""
        given = self._attributes.get(name)
        return int(given.i) if given is not None else self._required(name, default)

    def float(self, name: str, default: builtins.float | None = None) -> builtins.float:
        """Return a float attribute."""
        given = self._attributes.get(name)
        return float(given.f) if given is not None else self._required(name, default)

    def string(self, name: str, default: str | None = None) -> str:
        """Return a string attribute."""
        given = self._attributes.get(name)
        return given.s.decode() if given is not None else self._required(name, default)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Return an attribute that is a list of integers."""
        given = self._attributes.get(name)
        return [int(i) for i in (given.ints if given is not None else self._required(name, default))]

    def floats(self, name: str, default: Sequence[builtins.float] | None = None) -> list[builtins.float]:
        """Return an attribute that is a list of floats."""
        given = self._attributes.get(name)
        return [builtins.float(f) for f in (given.floats if given is not None else self._required(name, default))]

    def strings(self, name: str, default: Sequence[str] | None = None) -> list[str]:
        """Return an attribute that is a list of strings."""
        given = self._attributes.get(name)
        return [s.decode() for s in given.strings] if given is not None else list(self._required(name, default))

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor attribute as an array."""
        return numpy_helper.to_array(self._attributes[name].t, self.graph.base_directory)

    def subgraph(self, name: str) -> onnx.GraphProto:
        """Return a graph attribute."""
        return self._attributes[name].g

    def _required(self, name: str, default: T | None) -> T:
        if default is None:
            raise UnsupportedNodeError(f"attribute '{name}' is missing")
        return default

    # Known integers

    def known_integers(self, index: int) -> list[int] | None:
        """Return a rank 0 or 1 integer input as a list if it is constant, else None."""
        constant = self.input(index).constant
        return None if constant is None else [int(i) for i in np.ravel(constant)]

    def constant_input(self, index: int) -> np.ndarray:
        """Return an input that has to be constant; refuses the node otherwise."""
        constant = self.input(index).constant
        if constant is None:
            raise UnsupportedNodeError(f"input {index} ('{self.proto.input[index]}') must be constant")
        return constant

    def shape_argument(self, index: int) -> Shape:
        """Return the elements of a rank 0 or 1 integer input (a shape, axes, starts, k, ...) as dimensions.

        Elements that are only known at run time become fresh symbols that the module binds when it runs. The symbols
        are usable in shapes and in tensor expressions after this call. TVM takes symbols to be non-negative: use
        `compute_shape` for what may be negative at run time.
        """
        value = self.input(index)
        elements = value.integers
        if elements is None:
            elements = self.graph.bind_elements(value, self.proto.input[index])
        return tuple(elements.ravel())

    def vector_length(self, index: int) -> int:
        """Return the number of elements of a rank 0 or 1 input; refuses the node if it is not known."""
        shape = static_shape(self.input(index).shape)
        if shape is None or len(shape) > 1:
            raise UnsupportedNodeError(f"the length of input {index} ('{self.proto.input[index]}') is not known")
        return shape[0] if shape else 1

    def axes_argument(self, index: int = 1, attribute: str = "axes", rank: int | None = None) -> list[int] | None:
        """Return axes given by an attribute (older opsets) or a constant input, non-negative; None if not given.

        `rank` is the rank that negative axes count from: by default that of input 0.
        """
        if self.has_attribute(attribute):
            axes = self.integers(attribute)
        elif self.has_input(index):
            axes = [int(axis) for axis in self.constant_input(index).ravel()]
        else:
            return None
        limit = self.input(0).rank if rank is None else rank
        return [self.checked_axis(axis, limit) for axis in axes]

    def axis(self, default: int | None = None, rank: int | None = None, name: str = "axis") -> int:
        """Return the axis attribute, non-negative."""
        return self.checked_axis(self.integer(name, default), self.input(0).rank if rank is None else rank)

    def checked_axis(self, axis: int, rank: int) -> int:
        """Return `axis` counted from the front; refuses the node if it is out of range."""
        if not -rank <= axis < max(rank, 1):
            raise UnsupportedNodeError(f"axis {axis} is out of range for rank {rank}")
        return axis + rank if axis < 0 else axis

    # Emitting

    def emit(self, expr: relax.Expr, narrow_type: int | None = None) -> TensorValue:
        """Bind `expr` (one tensor) in the module; its unknown dimensions become fresh symbols bound at run time."""
        return self.graph.emit(expr, self.output_hint, narrow_type)

    def emit_tuple(self, expr: relax.Expr) -> list[TensorValue]:
        """Bind an expression that is a tuple of tensors, and return its fields."""
        bound = self.graph.builder.emit(expr, self.output_hint)
        return [self.emit(relax.TupleGetItem(bound, i)) for i in range(len(bound.ty.fields))]

    def compute(self, function: Callable[..., object], *arguments: object, **keywords: object) -> TensorValue:
        """Emit a tensor expression: `function` gets a te.Tensor for every Relax expression among the arguments."""
        hint = keywords.pop("primfunc_name_hint", self.operator.lower())
        call = self.graph.builder.call_te(function, *arguments, primfunc_name_hint=hint, **keywords)
        return self.emit(call)

    def dimensions(self, value: Value) -> relax.Expr:
        """Return the shape of `value` as an int64 tensor of rank 1."""
        return self.shape_tensor(value.shape)

    def shape_tensor(self, shape: Sequence[Dimension]) -> relax.Expr:
        """Return dimensions as an int64 tensor of rank 1."""
        return integer_value(_object_array(shape), "int64", self.graph.builder).expr

    def dimension(self, dimension: Dimension) -> tvm.ir.Expr:
        """Return a dimension as an int64 expression, an argument for `compute`."""
        return as_expression(dimension)

    def compute_shape(self, function: Callable[..., object], *arguments: object) -> Shape:
        """Return dimensions that a tensor expression computes when the module runs, as fresh symbols.

        `function` gives an int64 tensor of rank 1 with no negative element. Numbers that may be negative (axes,
        starts, the -1 of a reshape) have to stay in tensors, because TVM takes every symbol to be non-negative.
        """
        lengths = self.compute(function, *arguments, primfunc_name_hint=f"{self.operator.lower()}_shape")
        return tuple(self.graph.bind_elements(lengths, self.output_hint))

    def constant(self, array: np.ndarray) -> ConstantValue:
        """Return a constant value."""
        return ConstantValue(np.asarray(array))

    def integer_value(self, dimension: Dimension) -> Value:
        """Return a dimension as an int64 scalar."""
        elements = np.empty((), dtype=object)
        elements[()] = dimension
        return integer_value(elements, "int64", self.graph.builder)

    def scalar(self, number: builtins.float | int | bool, dtype: str) -> relax.Expr:
        """Return a Relax scalar constant of the dtype."""
        return relax.const(number, dtype)

    def reshape(self, value: Value, shape: Sequence[Dimension]) -> Value:
        """Return `value` with another shape of as many elements, which is checked at run time where it is not certain.

        A constant is reshaped at compile time.
        """
        static = static_shape(tuple(shape))
        if value.constant is not None and static is not None:
            return ConstantValue(value.constant.reshape(static), value.narrow_type)
        given, wanted = product(value.shape), product(shape)
        if not provably_equal(given, wanted):
            self.graph.require_zero([as_expression(given) - as_expression(wanted)])
        expr = relax.op.reshape(value.expr, [as_expression(dimension) for dimension in shape])
        return self.emit(expr, value.narrow_type)

    def cast(self, value: Value, dtype: str) -> Value:
        """Return `value` with elements of another dtype; a constant is cast at compile time."""
        if value.dtype == dtype:
            return value
        if value.constant is not None:
            return ConstantValue(value.constant.astype(numpy_dtype(dtype)))
        return self.emit(relax.op.astype(value.expr, dtype))

    def broadcast_operands(self, *values: Value) -> list[relax.Expr]:
        """Return the operands ready for a broadcasting Relax operator.

        Where two dimensions cannot be proven equal (one symbolic, neither 1), ONNX lets them be equal or 1. They are
        taken to be equal; the module checks that at run time, so that an unusual shape is an error, never a wrong
        result.
        """
        shape = broadcast_shape([value.shape for value in values])
        return [self._matched(value, shape[len(shape) - value.rank :]) for value in values]

    def _matched(self, value: Value, shape: Shape) -> relax.Expr:
        wanted = [
            own if own == 1 or provably_equal(own, other) else other
            for own, other in zip(value.shape, shape, strict=True)
        ]
        return self.reshaped_type(value, wanted)

    def reshaped_type(self, value: Value, shape: Sequence[Dimension]) -> relax.Expr:
        """Return `value` with `shape` as its static type; checked at run time where the two are not provably equal."""
        if all(provably_equal(a, b) for a, b in zip(value.shape, shape, strict=True)):
            return value.expr
        # The first cast hides the shape: TVM would conclude from `x` cast to `y` that x may stand for y everywhere,
        # and recurses without end if it meets both directions, or x is an expression of y.
        hidden = self.graph.builder.match_cast(value.expr, relax.TensorType(dtype=value.dtype, ndim=value.rank))
        wanted = relax.TensorType([as_expression(dimension) for dimension in shape], value.dtype)
        return self.graph.builder.match_cast(hidden, wanted)

    def chooses_by(self, indices: Value, size: Dimension, *, from_the_end: bool = True) -> None:
        """Say that each element of `indices` chooses one of `size`, negative ones counted `from_the_end`, or none."""
        self.graph.index_ranges.record(indices, size, self.graph.builder.node, from_the_end=from_the_end)

    @property
    def output_hint(self) -> str:
        """Return an identifier for the results, made from the name of the first output."""
        return self.graph.identifier(self.proto.output[0] if self.proto.output else self.operator)

    def unsupported(self, reason: str) -> UnsupportedNodeError:
        """Return the exception to raise for a case that cannot be converted."""
        return UnsupportedNodeError(reason)


def _object_array(elements: Sequence[Dimension]) -> np.ndarray:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    """Return the shape that `shapes` broadcast to by the rules of ONNX (which are numpy's).

    Of two dimensions that are not provably equal, the integer one wins, else the one with more symbols in it.
    """
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(_broadcast_dimension(dimensions) for dimensions in zip(*padded, strict=True))


def _broadcast_dimension(dimensions: Sequence[Dimension]) -> Dimension:
    result: Dimension = 1
    for dimension in dimensions:
        if isinstance(result, int) and result == 1:
            result = dimension
        elif isinstance(dimension, int) and dimension == 1:
            continue
        elif isinstance(result, int) and isinstance(dimension, int) and result != dimension:
            raise UnsupportedNodeError(f"dimensions {result} and {dimension} do not broadcast")
        elif isinstance(dimension, int) or (
            not isinstance(result, int) and _symbol_count(dimension) > _symbol_count(result)
        ):
            result = dimension
    return result


def _symbol_count(dimension: tvm.ir.Expr) -> int:
    return len(relax.analysis.free_symbolic_vars(relax.ShapeExpr([dimension])))


def normalized_domain(domain: str) -> str:
    """Return "" for both spellings of the standard domain."""
    return "" if domain == "ai.onnx" else domain
