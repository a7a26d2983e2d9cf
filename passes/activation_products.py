"""Products of two quantized activations, whose right one is packed as it comes for dot products of bytes.

    (x - zx) @ (w - zw) = x @ w' - zx * (sum(w) - K * zw) - (zw - s) * sum(x)        with w' = w - s

w' is signed: s is 128 for unsigned w, else 0. The sums go over the depth K: of each column of w and each row of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm.ir
import tvm_ffi
from tvm import relax, te, tirx

from passes.base import Dataflow, Refusal, require
from passes.convolution_sites import static
from passes.integer_operands import Codes, centered, dequantized
from passes.tensor_types import dtype_of
from schedules.intrin.byte_dot import FOUR

# Fewer rows do not pay for packing the other operand.
FEWEST_ROWS = 8
SIGN = 128


@dataclass(frozen=True, eq=False)
class ActivationProduct:
    """A product of the matrices in the last two axes of `left` and `right`, static but for the rows."""

    call: tvm.ir.Call
    left: Codes
    right: Codes

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        depth, columns = (static(size) for size in self.call.args[1].ty.shape.values[-2:])
        assert depth is not None
        assert columns is not None
        return depth, columns


def activation_product(call: tvm.ir.Call, left: Codes, dataflow: Dataflow) -> ActivationProduct | None:
    """Return a product with another quantized activation, None where the right operand is none.

    Raises Refusal where its sizes or zero points are such that it stays as it is.
    """
    right = (dequantized if dtype_of(call) == "float32" else centered)(call.args[1], dataflow)
    if right is None:
        return None
    sizes = [argument.ty.shape for argument in call.args]
    if any(shape is None or len(shape.values) < 2 for shape in sizes):
        raise Refusal("it is no product of matrices of known ranks")
    (*batch, rows, _), (*other, depth, columns) = (list(shape.values) for shape in sizes)
    same = len(batch) == len(other) and all(map(tvm_ffi.structural_equal, batch, other))
    require(same, "its operands are not as many matrices")
    require(static(depth) is not None and static(columns) is not None, "the depth or the columns are not static")
    fewest = static(rows)
    require(fewest is None or fewest >= FEWEST_ROWS, f"fewer than {FEWEST_ROWS} rows do not pay for packing")
    for codes in (left, right):
        single = isinstance(codes.zero, int) or codes.zero.ty.ndim == 0
        require(single, "a zero point is not one number")
    return ActivationProduct(call, left, right)


def packed_fours(data: te.Tensor, block: int) -> te.Tensor:
    """Return bytes [..., K, N] as int8 [..., ceil(N/block), ceil(K/4), block, 4]; zeros past K, and anything past N."""
    *batch, depth, columns = data.shape
    shape = [*batch, -(-int(columns) // block), -(-int(depth) // FOUR), block, FOUR]

    def element(*position: tirx.Expr) -> tirx.Expr:
        *image, part, group, lane, term = position
        row, column = group * FOUR + term, part * block + lane
        if int(columns) % block:
            column = tirx.min(column, int(columns) - 1)
        inside = row < depth
        if int(depth) % FOUR:
            row = tirx.min(row, int(depth) - 1)
        value = data(*image, row, column)
        if str(data.dtype) == "uint8":
            value = (value.astype("int16") - tirx.const(SIGN, "int16")).astype("int8")
        return value if int(depth) % FOUR == 0 else tirx.Select(inside, value, tirx.const(0, "int8"))

    return te.compute(shape, element, name="packed")


def product_of_fours(left: te.Tensor, packed: te.Tensor, columns: int) -> te.Tensor:
    """Return the product in int32 of bytes [..., M, K] and N columns that `packed_fours` packed: [..., M, N]."""
    block = int(packed.shape[-2])
    *batch, rows, depth = left.shape
    k = te.reduce_axis((0, depth), "k")

    def element(*position: tirx.Expr) -> tirx.Expr:
        *image, row, column = position
        part, lane = tirx.floordiv(column, block), tirx.floormod(column, block)
        weight = packed(*image, part, tirx.floordiv(k.var, FOUR), lane, tirx.floormod(k.var, FOUR))
        return te.sum(left(*image, row, k.var).astype("int32") * weight.astype("int32"), axis=k)

    return te.compute((*batch, rows, columns), element, name="product")


def correction(
    product: ActivationProduct, zeros: tuple[int | relax.Expr, int | relax.Expr], codes: tuple[relax.Expr, relax.Expr]
) -> relax.Expr | None:
    """Return what the product of `codes` (left, and right less its sign) is more than that of their numbers."""
    left_zero, right_zero = zeros
    depth, _ = product.shape
    sign = SIGN if product.right.dtype == "uint8" else 0
    parts = []
    if left_zero != 0 or not isinstance(left_zero, int):
        sums = relax.op.sum(relax.op.astype(codes[1], "int32"), axis=[-2], keepdims=True)
        less = relax.op.multiply(_wide(right_zero), relax.const(depth, "int32"))
        parts.append(relax.op.multiply(relax.op.subtract(sums, less), _wide(left_zero)))
    if not isinstance(right_zero, int) or right_zero != sign:
        sums = relax.op.sum(relax.op.astype(codes[0], "int32"), axis=[-1], keepdims=True)
        parts.append(relax.op.multiply(sums, relax.op.subtract(_wide(right_zero), relax.const(sign, "int32"))))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else relax.op.add(*parts)


def _wide(zero: int | relax.Expr) -> relax.Expr:
    return relax.const(zero, "int32") if isinstance(zero, int) else relax.op.astype(zero, "int32")
