"""The operands of products of 8-bit integers: activations as codes, weights as constants, as models write them.

A float product of dequantized operands, DQ(x) @ DQ(w), and an integer product of operands less their zero points in
int16, (x - zx) @ (w - zw), both are the sum of (x - zx) * (w - zw), in the first form times the product of the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm.ir
from numpy.typing import NDArray
from tvm import relax

from passes.affine_weights import affine_value
from passes.base import Dataflow, Refusal, require
from passes.tensor_types import constant_of, dtype_of

BYTES = ("int8", "uint8")
# What moves elements, or takes the largest: the same for codes as for what they stand for, whose scale is positive.
MOVES = (
    *(f"relax.{name}" for name in ("permute_dims", "reshape", "flatten", "squeeze", "expand_dims", "strided_slice")),
    *(f"relax.nn.max_pool{rank}d" for rank in (1, 2, 3)),
)


@dataclass(frozen=True, eq=False)
class Codes:
    """(`codes` - `zero`) * `scale`, then `moves` in order; `scale` is None for the integers themselves.

    `zero` is a number or an integer tensor that broadcasts to the moved codes.
    """

    codes: relax.Expr
    zero: int | relax.Expr
    scale: float | None
    moves: tuple[tvm.ir.Call, ...] = ()

    @property
    def dtype(self) -> str:
        dtype = dtype_of(self.codes)
        assert dtype is not None
        return dtype


@dataclass(frozen=True, eq=False)
class ConstantWeights:
    """`integers`, less their zero points, times `scales`, one or one per output; None for the integers themselves."""

    integers: NDArray[np.int32]
    scales: NDArray[np.float32] | None


def dequantized(expr: relax.Expr, dataflow: Dataflow) -> Codes | None:
    """Return the 8-bit codes that `expr` is dequantized from with one constant scale, None for anything else."""
    moves: list[tvm.ir.Call] = []
    while (move := dataflow.call(expr, *MOVES)) is not None:
        moves.insert(0, move)
        expr = move.args[0]
    call = dataflow.call(expr, "relax.dequantize")
    if call is None or dtype_of(call.args[0]) not in BYTES or dtype_of(call) != "float32":
        return None
    scale, zero = (constant_of(dataflow.producer(argument)) for argument in call.args[1:])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or scale.item() <= 0:
        return None
    return Codes(call.args[0], int(zero.item()), float(scale.item()), tuple(moves))


def centered(expr: relax.Expr, dataflow: Dataflow) -> Codes | None:
    """Return 8-bit codes and the zero point that int16 has less of, None for anything else."""
    if dtype_of(expr) in BYTES:
        return Codes(expr, 0, None)
    difference = dataflow.call(expr, "relax.subtract")
    if difference is None or dtype_of(difference) != "int16":
        return None
    codes = dataflow.call(difference.args[0], "relax.astype")
    if codes is None or dtype_of(codes.args[0]) not in BYTES:
        return None
    zero = constant_of(dataflow.producer(difference.args[1]))
    if zero is not None and zero.size == 1:
        return Codes(codes.args[0], int(zero.item()), None)
    return Codes(codes.args[0], difference.args[1], None)


def dequantized_weights(expr: relax.Expr, dataflow: Dataflow, output: int) -> ConstantWeights | None:
    """Return constant integers with scales for each position of axis `output`, None where weights are none of that.

    Raises Refusal where there are constant integers with other scales.
    """
    value = affine_value(expr, dataflow)
    if value is None or dtype_of(expr) != "float32":
        return None
    zeros = np.rint(value.zero_points)
    require(bool((zeros == value.zero_points).all()), "the weights have zero points that are no integers")
    axis = output % value.integers.ndim
    scales = np.broadcast_to(value.scales, value.integers.shape)
    first = tuple(slice(None) if place == axis else slice(1) for place in range(scales.ndim))
    require(bool((scales == scales[first]).all()), "the scales of the weights differ along what is summed")
    integers = value.integers.astype(np.int32) - zeros.astype(np.int32)
    return ConstantWeights(integers, np.ascontiguousarray(scales[first]).reshape(-1).astype(np.float32))


def centered_weights(expr: relax.Expr, dataflow: Dataflow) -> ConstantWeights | None:
    """Return constant integers of 8 bits, or of 16 that are such less a zero point; None for anything else."""
    array = constant_of(dataflow.producer(expr))
    if array is None or array.dtype.name not in (*BYTES, "int16"):
        return None
    return ConstantWeights(array.astype(np.int32), None)


def in_range(weights: NDArray[np.int32]) -> NDArray[np.int8]:
    """Return weights as int8; raises Refusal where they do not fit."""
    low, high = int(weights.min(initial=0)), int(weights.max(initial=0))
    if low < -128 or high > 127:
        raise Refusal(f"the weights less their zero points go from {low} to {high}, beyond int8")
    return weights.astype(np.int8)


def offsets_to_int8(weights: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return for each column of weights [K, N] what is to be taken from it so that it fits into int8, 0 where it does.

    Raises Refusal where a column's weights lie too far apart.
    """
    low, high = weights.min(axis=0, initial=0), weights.max(axis=0, initial=0)
    offsets = np.maximum(high - 127, 0) + np.minimum(low + 128, 0)
    require(bool((high - low <= 255).all()), "weights of one column lie more than 255 apart")
    return offsets.astype(np.int32)
