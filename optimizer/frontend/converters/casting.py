"""Cast and CastLike between all number types that have a whole byte or more, and integers of 4 and 2 bits."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper
from tvm import relax

from optimizer.frontend.converters.float8 import FLOAT8_TYPES, from_float8, to_float8
from optimizer.frontend.converters.precision import is_float
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import NARROW_TYPES, ConstantValue, TensorValue, Value, numpy_dtype

_NARROW_BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2}
_NO_TARGET = (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128, TensorProto.UNDEFINED)


@converter("Cast", since=6)
def cast(node: Node) -> Result:
    """Convert Cast to the type in the attribute `to`."""
    return cast_value(node, node.input(), node.integer("to"))


@converter("CastLike", since=15)
def cast_like(node: Node) -> Result:
    """Convert CastLike: a cast to the type of the second input."""
    like = node.input(1)
    target = like.narrow_type or helper.np_dtype_to_tensor_dtype(numpy_dtype(like.dtype))
    return cast_value(node, node.input(), target)


def cast_value(node: Node, value: Value, target: int) -> Value:
    """Return `value` in the ONNX element type `target`, by the rules of Cast.

    The attributes `saturate` and `round_mode` of the node count for 8-bit floats.
    """
    if target in _NO_TARGET or TensorProto.FLOAT4E2M1 in (target, _element_type(value)):
        raise node.unsupported(f"{TensorProto.DataType.Name(target)} is not supported")
    if _element_type(value) == target:
        return value
    if value.dtype in FLOAT8_TYPES:
        value = from_float8(node, value)
    if target in NARROW_TYPES:
        return _to_narrow(node, value, target)
    dtype = helper.tensor_dtype_to_np_dtype(target).name
    if dtype in FLOAT8_TYPES:
        return to_float8(node, value, dtype)
    return _to_whole_bytes(node, value, dtype)


def _element_type(value: Value) -> int:
    return value.narrow_type or helper.np_dtype_to_tensor_dtype(numpy_dtype(value.dtype))


def _to_whole_bytes(node: Node, value: Value, dtype: str) -> Value:
    if value.dtype == dtype:
        return TensorValue(value.expr) if value.constant is None else ConstantValue(value.constant)
    if dtype == "bool":
        # A conversion to one bit would look at the lowest bit alone.
        return node.emit(relax.op.not_equal(value.expr, node.scalar(0, value.dtype)))
    if is_float(value.dtype) and dtype in ("int8", "uint8", "int16", "uint16"):
        # Processors convert a float to no less than 32 bits; the rest of the way is the loss of high bits.
        value = node.emit(relax.op.astype(value.expr, "int32"))
    return node.emit(relax.op.astype(value.expr, dtype))


def _to_narrow(node: Node, value: Value, target: int) -> Value:
    """Keep the low bits of an integer, and with them its sign if the type has one."""
    bits, storage = _NARROW_BITS[target], NARROW_TYPES[target][1]
    wide = _to_whole_bytes(node, value, "int32").expr
    size = 2**bits
    kept = node.emit(relax.op.bitwise_and(wide, node.scalar(size - 1, "int32"))).expr
    if np.dtype(storage).kind == "i":
        half = node.scalar(size // 2, "int32")
        kept = relax.op.subtract(node.emit(relax.op.bitwise_xor(kept, half)).expr, half)
        kept = node.emit(kept).expr
    return node.emit(relax.op.astype(kept, storage), target)


__all__ = ["cast_value"]
