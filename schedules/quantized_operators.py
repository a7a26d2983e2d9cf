"""What operators on quantized weights compute, as tensor expressions that passes emit and schedules recognize.

Rows of activations are quantized in groups of K: x ~ code * scale with codes in [-127, 127]. A product of them with a
weight w = (q - z) * s, both constant over a group of K, is a sum of exact integer products:
    y[m, n] = sum over groups g of  (sum_k q[n, k] * code[m, k]  -  z[n, g] * sum_k code[m, k]) * s[n, g] * scale[m, g]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import te, tirx
from tvm.ir import Expr

from schedules.loops import index
from schedules.weight_layout import WeightLayout

ACTIVATION_GROUP = 32
ACTIVATION_LEVELS = 127
# The largest |x| of a group below which 127 / |x| is no number of 32 bits.
SMALLEST_QUANTIZED = 1e-36
# Reads one element of a tensor or buffer.
Read = Callable[..., Expr]


@dataclass(frozen=True)
class QuantizedProduct:
    """The constants of a product with quantized weights.

    `group` elements of K share a scale of the weights, `activation_group` (which divides it) one of the activations.
    Zero points are a buffer of their own, or the middle of the codes where `zero_points` is False.
    """

    layout: WeightLayout
    group: int
    activation_group: int
    zero_points: bool

    def code(self, packed: Read, column: Expr, k: Expr) -> Expr:
        """Return the code of the weight of output `column` and input `k` as int32."""
        layout = self.layout
        lane = tirx.floormod(column, index(layout.columns)) * layout.reduction
        byte = packed(
            tirx.floordiv(column, index(layout.columns)),
            tirx.floordiv(k, index(layout.step)),
            lane + tirx.floormod(k, index(layout.reduction)),
        )
        value = tirx.Cast("int32", byte)
        if layout.turned_bits:
            value = tirx.bitwise_xor(value, tirx.const(layout.turned_bits, "int32"))
        if layout.bits == 8:
            return value
        low = tirx.floormod(k, index(layout.step)) < index(layout.reduction)
        return tirx.Select(low, tirx.bitwise_and(value, tirx.const(15, "int32")), value >> tirx.const(4, "int32"))

    def parameter(self, values: Read, column: Expr, k: Expr) -> Expr:
        """Return the scale or zero point of a weight as float32."""
        columns = index(self.layout.columns)
        place = (tirx.floordiv(column, columns), tirx.floordiv(k, index(self.group)), tirx.floormod(column, columns))
        return tirx.Cast("float32", values(*place))

    def zero_point(self, zeros: Read | None, column: Expr, k: Expr) -> Expr:
        """Return the zero point of a weight as float32."""
        if zeros is None:
            return tirx.const(float(1 << (self.layout.bits - 1)), "float32")
        return self.parameter(zeros, column, k)

    def weight(self, weights: Sequence[Read], column: Expr, k: Expr) -> Expr:
        """Return a weight as float32; `weights` are packed codes, scales, and zero points if there are any."""
        packed, scales, *zeros = weights
        centered = tirx.Cast("float32", self.code(packed, column, k))
        centered = centered - self.zero_point(zeros[0] if zeros else None, column, k)
        return centered * self.parameter(scales, column, k)

    def term(self, activations: Sequence[Read], weights: Sequence[Read], column: Expr, k: Expr) -> Expr:
        """Return what input `k` adds to an output: the zero point's part is added once, with a group's first input.

        `activations` read codes [G, group], scales [G] and sums of codes [G] of one row.
        """
        codes, scales, sums = activations
        packed, weight_scales, *zeros = weights
        size = index(self.activation_group)
        group, place = tirx.floordiv(k, size), tirx.floormod(k, size)
        product = tirx.Cast("float32", self.code(packed, column, k) * tirx.Cast("int32", codes(group, place)))
        zero = self.zero_point(zeros[0] if zeros else None, column, k) * tirx.Cast("float32", sums(group))
        first = tirx.Select(place.equal(index(0)), zero, tirx.const(0.0, "float32"))
        return (product - first) * (self.parameter(weight_scales, column, k) * scales(group))


def quantize_rows(x: te.Tensor) -> list[te.Tensor]:
    """Return int8 codes [..., G, group], float32 scales [..., G] and int32 sums of codes [..., G] of x [..., G, group].

    scale = max |x| / 127 of each group; a group of zeros has the scale 0. Codes are x * (127 / max |x|), rounded: one
    division a group.
    """
    *leading, group = x.shape
    levels = tirx.const(float(ACTIVATION_LEVELS), "float32")

    def element(*at: Expr) -> Expr:
        return tirx.Cast("float32", x(*at))

    def code(*at: Expr) -> Expr:
        return tirx.Cast("int8", te.nearbyint(element(*at) * inverses(*at[:-1])))

    def inverse(*at: Expr) -> Expr:
        # Of numbers whose inverse overflows every code is 0, as they are of zeros.
        limit = tirx.const(SMALLEST_QUANTIZED, "float32")
        return tirx.Select(largest(*at) > limit, levels / tirx.max(largest(*at), limit), tirx.const(0.0, "float32"))

    place, step = (te.reduce_axis((index(0), index(int(group))), name) for name in ("place", "step"))
    largest = te.compute(leading, lambda *at: te.max(tirx.abs(element(*at, place)), axis=place), name="largest")
    inverses = te.compute(leading, inverse, name="inverses")
    scales = te.compute(leading, lambda *at: largest(*at) / levels, name="scales")
    codes = te.compute(x.shape, code, name="codes")
    sums = te.compute(leading, lambda *at: te.sum(tirx.Cast("int32", codes(*at, step)), axis=step), name="sums")
    return [codes, scales, sums]


def integer_product(product: QuantizedProduct, columns: int) -> Callable[..., te.Tensor]:
    """Return the function from quantized rows and packed weights to float32 [..., columns]."""

    def compute(codes: te.Tensor, scales: te.Tensor, sums: te.Tensor, *weights: te.Tensor) -> te.Tensor:
        *leading, groups, group = codes.shape
        k = te.reduce_axis((index(0), index(int(groups) * int(group))), "k")

        def element(*at: Expr) -> Expr:
            activations = [_row(tensor, at[:-1]) for tensor in (codes, scales, sums)]
            return te.sum(product.term(activations, weights, at[-1], k), axis=k)

        return te.compute((*leading, columns), element, name="product")

    return compute


def float_product(product: QuantizedProduct, columns: int) -> Callable[..., te.Tensor]:
    """Return the function from float rows [..., K] and packed weights to float32 [..., columns]."""

    def compute(x: te.Tensor, *weights: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, x.shape[-1]), "k")

        def element(*at: Expr) -> Expr:
            value = tirx.Cast("float32", x(*at[:-1], k))
            return te.sum(value * product.weight(weights, at[-1], k), axis=k)

        return te.compute((*x.shape[:-1], columns), element, name="product")

    return compute


def gathered_rows(product: QuantizedProduct, rows: int, inputs: int, dtype: str) -> Callable[..., te.Tensor]:
    """Return the function from indices [...] and packed weights to rows of the matrix [..., inputs] in `dtype`.

    Indices count from the end where they are negative; the nearest row takes the place of one outside the matrix.
    """

    def compute(indices: te.Tensor, *weights: te.Tensor) -> te.Tensor:
        def element(*at: Expr) -> Expr:
            given = tirx.Cast("int64", indices(*at[:-1]))
            row = tirx.Select(given < index(0), given + rows, given)
            row = tirx.max(index(0), tirx.min(row, index(rows - 1)))
            return tirx.Cast(dtype, product.weight(weights, row, at[-1]))

        return te.compute((*indices.shape, inputs), element, name="rows")

    return compute


def _row(tensor: te.Tensor, leading: Sequence[Expr]) -> Read:
    return lambda *at: tensor(*leading, *at)
