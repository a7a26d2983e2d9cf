"""Weights that are an affine function of constant integers, read off the operators that dequantize them.

(integers - zero point) * scale, with either factor spread over groups, then reshaped, sliced and transposed: the
integers and what belongs to each of them take the same way, so that a matrix comes out whose scales and zero points
can be compared along K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm.ir
from numpy.typing import NDArray
from tvm import relax

from passes.base import Dataflow, Refusal
from passes.quantization.scheme import SCALE_DTYPES, QuantizedMatrix
from passes.quantized_weights import ACTIVATION_GROUP, SMALLEST_GROUP, constant_array

Array = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class AffineValue:
    """(integers - zero_points) * scales element by element; both are float32 that broadcast to the integers' shape."""

    integers: Array
    zero_points: Array
    scales: Array

    def moved(self, move: Callable[[Array], Array]) -> AffineValue:
        """Return the value after a rearrangement of its elements."""
        shape = self.integers.shape
        parts = [part if part.size == 1 else move(np.broadcast_to(part, shape)) for part in self._parameters()]
        result = move(self.integers)
        return AffineValue(result, *[part.reshape((1,) * result.ndim) if part.size == 1 else part for part in parts])

    def _parameters(self) -> tuple[Array, Array]:
        return self.zero_points, self.scales


def affine_value(expr: relax.Expr, dataflow: Dataflow) -> AffineValue | None:
    """Return the affine function of constant integers that `expr` computes, None where it computes anything else."""
    call = dataflow.producer(expr)
    array = constant_array(call)
    if array is not None:
        one = np.ones((1,) * array.ndim, np.float32)
        return AffineValue(array, 0 * one, one) if array.dtype.name in ("int8", "uint8") and array.ndim else None
    if not isinstance(call, tvm.ir.Call) or not isinstance(call.op, tvm.ir.Op):
        return None
    inner = affine_value(call.args[0], dataflow) if call.op.name in _STEPS else None
    return _STEPS[call.op.name](inner, call, dataflow) if inner is not None else None


def _cast(value: AffineValue, call: tvm.ir.Call, _dataflow: Dataflow) -> AffineValue | None:
    return value if str(call.ty.dtype.dtype).startswith(("float", "bfloat")) else None


def _subtract(value: AffineValue, call: tvm.ir.Call, dataflow: Dataflow) -> AffineValue | None:
    zeros = _known(call.args[1], dataflow)
    if zeros is None or value.zero_points.any() or (value.scales != 1).any() or not _spreads(zeros, value):
        return None
    return AffineValue(value.integers, _of_rank(zeros, value), value.scales)


def _multiply(value: AffineValue, call: tvm.ir.Call, dataflow: Dataflow) -> AffineValue | None:
    factor = _known(call.args[1], dataflow)
    if factor is None or (value.scales != 1).any() or not _spreads(factor, value):
        return None
    return AffineValue(value.integers, value.zero_points, _of_rank(factor, value))


def _reshape(value: AffineValue, call: tvm.ir.Call, _dataflow: Dataflow) -> AffineValue | None:
    shape = tuple(int(extent) for extent in call.ty.shape)
    return value.moved(lambda part: part.reshape(shape))


def _permute(value: AffineValue, call: tvm.ir.Call, _dataflow: Dataflow) -> AffineValue | None:
    axes = None if call.attrs.axes is None else tuple(int(axis) for axis in call.attrs.axes)
    return value.moved(lambda part: part.transpose(axes))


def _slice(value: AffineValue, call: tvm.ir.Call, _dataflow: Dataflow) -> AffineValue | None:
    """Keep the first elements of each axis: what dequantization does with a last group that K does not fill."""
    shape = tuple(int(extent) for extent in call.ty.shape)
    axes, begins, _, *strides = [[int(field.value) for field in part.fields] for part in call.args[1:]]
    if any(begins) or (strides and any(stride != 1 for stride in strides[0])) or len(axes) > len(shape):
        return None
    return value.moved(lambda part: part[tuple(slice(extent) for extent in shape)])


_STEPS = {
    "relax.astype": _cast,
    "relax.subtract": _subtract,
    "relax.multiply": _multiply,
    "relax.reshape": _reshape,
    "relax.permute_dims": _permute,
    "relax.strided_slice": _slice,
}


def _known(expr: relax.Expr, dataflow: Dataflow) -> Array | None:
    """Return a constant's value, through casts, as float32."""
    cast = dataflow.call(expr, "relax.astype")
    array = constant_array(dataflow.producer(expr if cast is None else cast.args[0]))
    return None if array is None else array.astype(np.float32)


def _spreads(part: Array, value: AffineValue) -> bool:
    """Return whether a factor or zero point broadcasts to the integers without enlarging them."""
    shape = value.integers.shape
    if part.ndim > len(shape):
        return False
    return all(own in (1, extent) for own, extent in zip(part.shape[::-1], shape[::-1], strict=False))


def _of_rank(part: Array, value: AffineValue) -> Array:
    return part.reshape((1,) * (value.integers.ndim - part.ndim) + part.shape)


def as_matrix(value: AffineValue) -> QuantizedMatrix:
    """Return a value [K, N] as a quantized matrix of N rows: its integers bit for bit, its scales to the last bit.

    Raises Refusal where scales or zero points do not belong to runs of K, or the runs are no multiples of 16.
    """
    integers = np.ascontiguousarray(value.integers.T)
    inputs = integers.shape[1]
    scales, zeros = (np.broadcast_to(part, value.integers.shape).T for part in (value.scales, value.zero_points))
    changes = [np.flatnonzero((part[:, 1:] != part[:, :-1]).any(0)) + 1 for part in (scales, zeros)]
    group = int(np.gcd.reduce(np.concatenate([*changes, [0]]))) or -(-inputs // ACTIVATION_GROUP) * ACTIVATION_GROUP
    if group % SMALLEST_GROUP:
        raise Refusal(f"its scales change every {group} elements of K, no multiple of {SMALLEST_GROUP}")
    codes, zeros, bits = _unsigned(integers, zeros[:, ::group])
    padded = np.pad(codes, [(0, 0), (0, -inputs % group)])
    middle = bool((zeros == 1 << (bits - 1)).all())
    return QuantizedMatrix(bits, group, inputs, padded, _narrowest(scales[:, ::group]), None if middle else zeros)


def _unsigned(integers: Array, zeros: Array) -> tuple[NDArray[np.uint8], Array, int]:
    """Return integers and zero points shifted to start from 0, and the fewest bits (4 or 8) that hold them."""
    low, high = int(integers.min()), int(integers.max())
    signed = integers.dtype.name == "int8"
    bits = 4 if (low >= -8 and high < 8 if signed else high < 16) else 8
    shift = 1 << (bits - 1) if signed else 0
    codes = (integers.astype(np.int16) + shift).astype(np.uint8)
    shifted = zeros.astype(np.float32) + np.float32(shift)
    whole = np.array_equal(shifted, np.clip(np.rint(shifted), 0, 255))
    return codes, shifted.astype(np.uint8) if whole else _narrowest(shifted), bits


def _narrowest(values: Array) -> Array:
    """Return floats in the first of fp16, bf16 and fp32 that holds them exactly."""
    for dtype in SCALE_DTYPES.values():
        with np.errstate(over="ignore"):
            narrow = values.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), values):
            return np.ascontiguousarray(narrow)
    return np.ascontiguousarray(values)
