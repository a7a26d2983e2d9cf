"""What the importer knows of each ONNX value: a tensor in the module, a constant, or integers that are symbolic.

Exporters compute shapes inside the graph (Shape, Gather, Concat, ...). Such values are kept as arrays of integers and
symbolic expressions (`IntegerValue`) for as long as possible, so that the shape arithmetic disappears from the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import ml_dtypes
import numpy as np
import tvm.ir
from onnx import TensorProto
from tvm import relax

from optimizer.frontend.dimensions import Dimension, Shape, as_expression, simplified_shape

# ONNX types narrower than a byte: the numpy type of one element, and the storage type, one element to a byte.
NARROW_TYPES: dict[int, tuple[np.dtype, str]] = {
    TensorProto.INT4: (np.dtype(ml_dtypes.int4), "int8"),
    TensorProto.UINT4: (np.dtype(ml_dtypes.uint4), "uint8"),
    TensorProto.INT2: (np.dtype(ml_dtypes.int2), "int8"),
    TensorProto.UINT2: (np.dtype(ml_dtypes.uint2), "uint8"),
}


class Value:
    """A value of the ONNX graph with known element type and shape (dimensions may be symbolic).

    `dtype` is the storage type in TVM's spelling. `narrow_type` is the ONNX element type where that is narrower than
    the storage (a key of NARROW_TYPES), else None.
    """

    def __init__(self, dtype: str, shape: Shape, narrow_type: int | None = None) -> None:
        self.dtype = dtype
        self.shape = shape
        self.narrow_type = narrow_type

    @property
    def rank(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    @property
    def expr(self) -> relax.Expr:
        """Return the Relax expression that computes this value."""
        raise NotImplementedError

    @property
    def constant(self) -> np.ndarray | None:
        """Return the elements if all are known at compile time."""
        return None

    @property
    def integers(self) -> np.ndarray | None:
        """Return the elements as an object array of int and symbolic expressions, if they are known integers."""
        return None


class TensorValue(Value):
    """A value that the compiled module computes at run time, or one of its inputs."""

    def __init__(self, expr: relax.Expr, narrow_type: int | None = None) -> None:
        tensor_type = expr.ty
        if not isinstance(tensor_type, relax.TensorType) or not isinstance(tensor_type.shape, relax.ShapeExpr):
            raise TypeError(f"an expression of type {tensor_type} has no symbolic shape")
        super().__init__(str(tensor_type.dtype.dtype), simplified_shape(tensor_type.shape.values), narrow_type)
        self._expr = expr

    @property
    def expr(self) -> relax.Expr:
        """Return the Relax variable that holds this value."""
        return self._expr


class ConstantValue(Value):
    """A value whose elements are known at compile time. Becomes a Relax constant only when something reads it."""

    def __init__(self, array: np.ndarray, narrow_type: int | None = None) -> None:
        narrow = {numpy_type: key for key, (numpy_type, _) in NARROW_TYPES.items()}.get(array.dtype)
        if narrow is not None:
            narrow_type, array = narrow, array.astype(NARROW_TYPES[narrow][1])
        super().__init__(array.dtype.name, tuple(array.shape), narrow_type)
        self._array = array
        self._expr: relax.Expr | None = None

    @property
    def expr(self) -> relax.Expr:
        """Return the Relax constant; the same one at every call, so that shared weights stay shared."""
        if self._expr is None:
            contiguous = np.ascontiguousarray(self._array).reshape(self._array.shape)
            self._expr = relax.const(contiguous, self.dtype)
        return self._expr

    @property
    def constant(self) -> np.ndarray:
        """Return the elements, in the storage type."""
        return self._array

    @property
    def integers(self) -> np.ndarray | None:
        """Return the elements as Python numbers, or None if the type is not an integer or boolean one."""
        return self._array.astype(object) if self._array.dtype.kind in "iub" else None


class IntegerValue(Value):
    """An integer value of which each element is an integer or a symbolic expression, at least one being symbolic."""

    def __init__(self, elements: np.ndarray, dtype: str, builder: relax.BlockBuilder) -> None:
        super().__init__(dtype, tuple(elements.shape))
        self._elements = elements
        self._builder = builder

    @property
    def integers(self) -> np.ndarray:
        """Return the elements as an object array of int and symbolic expressions."""
        return self._elements

    @property
    def expr(self) -> relax.Expr:
        """Return a tensor computed from the symbols at run time; a new one each time, visible in the current scope."""
        shape = relax.ShapeExpr([as_expression(element) for element in self._elements.ravel()])
        tensor = self._builder.emit(relax.op.shape_to_tensor(shape))
        if self._elements.ndim != 1:
            tensor = self._builder.emit(relax.op.reshape(tensor, self._elements.shape))
        if self.dtype != "int64":
            tensor = self._builder.emit(relax.op.astype(tensor, self.dtype))
        return tensor


class SequenceValue:
    """An ONNX sequence, or an optional (at most one item), whose length is known at compile time."""

    def __init__(self, items: Sequence[Value]) -> None:
        self.items = tuple(items)


def numpy_dtype(dtype: str) -> np.dtype:
    """Return the numpy type of a TVM dtype, bfloat16 and the 8-bit floats included."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


AnyValue: TypeAlias = Value | SequenceValue


def integer_value(elements: np.ndarray, dtype: str, builder: relax.BlockBuilder) -> Value:
    """Return a constant if every element is an int, else a symbolic value; `elements` is an object array."""
    simplified = np.empty(elements.shape, dtype=object)
    simplified.ravel()[:] = simplified_shape(list(elements.ravel()))
    if any(isinstance(element, tvm.ir.Expr) for element in simplified.ravel()):
        return IntegerValue(simplified, dtype, builder)
    return ConstantValue(simplified.astype(dtype))


__all__ = [
    "NARROW_TYPES",
    "AnyValue",
    "ConstantValue",
    "Dimension",
    "IntegerValue",
    "SequenceValue",
    "Shape",
    "TensorValue",
    "Value",
    "integer_value",
    "numpy_dtype",
]
