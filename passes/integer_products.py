"""Products and convolutions of 8-bit codes with constant 8-bit weights, as they are found among a function's calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm.ir
from numpy.typing import NDArray
from tvm import relax

from passes.activation_products import ActivationProduct, activation_product
from passes.base import Dataflow, require
from passes.integer_operands import (
    Codes,
    ConstantWeights,
    centered,
    centered_weights,
    dequantized,
    dequantized_weights,
    in_range,
    offsets_to_int8,
)
from passes.tensor_types import constant, dtype_of

CONVOLUTIONS: Mapping[str, Callable[..., relax.Expr]] = {
    "relax.nn.conv1d": relax.op.nn.conv1d,
    "relax.nn.conv2d": relax.op.nn.conv2d,
    "relax.nn.conv3d": relax.op.nn.conv3d,
}
_PLAIN_LAYOUTS = ("NCW", "NCHW", "NCDHW")


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """A product or convolution of `codes` with constant `weights` less their `offsets` (one per column, or none)."""

    call: tvm.ir.Call
    codes: Codes
    weights: NDArray[np.int8]
    offsets: NDArray[np.int32] | None
    scales: NDArray[np.float32] | None

    @property
    def is_convolution(self) -> bool:
        return self.call.op.name in CONVOLUTIONS

    @property
    def sums(self) -> NDArray[np.int32]:
        """The sum of the weights of each output, in the numbers of int32, which wrap around."""
        axes = tuple(range(1, self.weights.ndim)) if self.is_convolution else (0,)
        return self.weights.sum(axis=axes, dtype=np.int32)

    @property
    def depth(self) -> int:
        """How many products each output is a sum of."""
        return math.prod(self.weights.shape[1:] if self.is_convolution else self.weights.shape[:1])

    def along_outputs(self, values: NDArray[np.generic]) -> relax.Expr:
        """Return one value for each output as a constant that broadcasts to the result."""
        if not self.is_convolution or values.size == 1:
            return constant(values if values.size > 1 else values.reshape(()))
        return constant(values.reshape(-1, *[1] * (self.weights.ndim - 2)))


def integer_product(
    call: tvm.ir.Call, dataflow: Dataflow, types: tuple[str, ...]
) -> IntegerProduct | ActivationProduct | None:
    """Return the integer product that a call is, None for what is no product of quantized activations.

    Raises Refusal where its weights or its form are not such that it can be one.
    """
    if call.op.name not in ("relax.matmul", *CONVOLUTIONS):
        return None
    codes = (dequantized if dtype_of(call) == "float32" else centered)(call.args[0], dataflow)
    if codes is None or dtype_of(call) not in ("float32", "int32"):
        return None
    is_convolution = call.op.name in CONVOLUTIONS
    weights = _weights(call, codes, dataflow)
    other = None if is_convolution or weights is not None or not types else activation_product(call, codes, dataflow)
    if other is not None:
        return other
    require(weights is not None, "the weights are no constant integers")
    assert weights is not None
    require(bool(types), "the target has no dot product of bytes")
    if is_convolution:
        require(call.attrs.data_layout in _PLAIN_LAYOUTS, f"the layout {call.attrs.data_layout} is not the plain one")
        known = isinstance(codes.zero, int) or not any(map(int, call.attrs.padding))
        require(known or _is_quantized_by_one(codes, dataflow), "the padding is not constant")
        outputs = len(weights.integers)
        offsets = offsets_to_int8(weights.integers.reshape(outputs, -1).T)
        one_each = int(call.attrs.groups) in (1, outputs)
        require(one_each or not offsets.any(), "weights less their zero points beyond int8, in groups of outputs")
        integers = in_range(weights.integers - offsets.reshape(-1, *[1] * (weights.integers.ndim - 1)))
    else:
        require(call.args[0].ty.ndim >= 2 and weights.integers.ndim == 2, "it is no product of rows with a matrix")
        offsets = offsets_to_int8(weights.integers)
        integers = in_range(weights.integers - offsets)
        if not offsets.any() and _is_done(call, codes, types):
            return None
    return IntegerProduct(call, codes, integers, offsets if offsets.any() else None, weights.scales)


def _is_quantized_by_one(codes: Codes, dataflow: Dataflow) -> bool:
    """Return whether codes are a quantization by one scale and the zero point that they are taken to have."""
    quantize = dataflow.call(codes.codes, "relax.quantize")
    return quantize is not None and all(parameter.ty.ndim == 0 for parameter in quantize.args[1:])


def _weights(call: tvm.ir.Call, codes: Codes, dataflow: Dataflow) -> ConstantWeights | None:
    if codes.scale is None:
        return centered_weights(call.args[1], dataflow)
    return dequantized_weights(call.args[1], dataflow, 0 if call.op.name in CONVOLUTIONS else -1)


def _is_done(call: tvm.ir.Call, codes: Codes, types: tuple[str, ...]) -> bool:
    """Return whether a product is of integers in the form that this pass makes."""
    return codes.scale is None and dtype_of(call.args[0]) in types and dtype_of(call.args[1]) == "int8"
