"""Operators on quantized weights as Relax calls: weights packed for one target, products with them, rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm.ir
from numpy.typing import NDArray
from tvm import relax

import targets
from passes.quantization.scheme import QuantizedMatrix, SchemeError
from schedules import quantized_operators as operators
from schedules.intrin.integer_dot import integer_dot
from schedules.intrin.matrix_tiles import matrix_tiles
from schedules.quantized_operators import ACTIVATION_GROUP, QuantizedProduct
from schedules.quantized_tiles import FEWEST_ROWS
from schedules.weight_layout import layout_of
from targets.base import Target

ACTIVATIONS = ("auto", "int8", "float", "reference")
SMALLEST_GROUP = 16
# TVM's kind of a reduction after which element-wise operators may be fused (OpPatternKind, kOutEWiseFusable).
_FUSABLE_REDUCTION = 4


def activations_on(target: Target, asked: str, bits: int) -> str:
    """Return what products compute with: "int8", "float", or "reference" (dequantized weights, for comparison).

    Left to the target, int8 where it has an integer dot product. Raises SchemeError for what it does not have.
    """
    if asked not in ACTIVATIONS:
        raise SchemeError(f"activations '{asked}'; choose one of {', '.join(ACTIVATIONS)}")
    has_integers = integer_dot(target, bits) is not None
    if asked == "int8" and not has_integers:
        raise SchemeError(f"{target.name} has no int8 products with quantized weights; choose activations=float")
    return ("int8" if has_integers else "float") if asked == "auto" else asked


@dataclass(frozen=True)
class WeightUse:
    """For which target weights are packed and what activations are computed in."""

    target: Target
    activations: str

    def __str__(self) -> str:
        if self.activations != "int8":
            return f"{self.activations} activations"
        # Tile registers take both operands times their scales (`schedules/quantized_tiles.py`).
        tiles = f", in bf16 from {FEWEST_ROWS} rows on" if matrix_tiles(self.target, "bfloat16", "bfloat16") else ""
        return f"int8 activations in groups of 32{tiles}"

    @staticmethod
    def of(target: str, activations: str, bits: int) -> WeightUse:
        """Return the use on a named target; raises SchemeError for a choice that it does not have."""
        found = targets.get(target)
        return WeightUse(found, activations_on(found, activations, bits))


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A quantized matrix in a target's layout: `arrays` are codes, scales, and zero points if there are any."""

    matrix: QuantizedMatrix
    product: QuantizedProduct
    arrays: tuple[NDArray[np.generic], ...]

    @property
    def depth(self) -> int:
        """K with the last group filled up."""
        return self.matrix.codes.shape[1]


def pack(matrix: QuantizedMatrix, target: Target) -> PackedMatrix:
    """Return a quantized matrix packed for a target; its groups are multiples of 16."""
    layout = layout_of(target, matrix.bits)
    group = ACTIVATION_GROUP if matrix.group % ACTIVATION_GROUP == 0 else SMALLEST_GROUP
    product = QuantizedProduct(layout, matrix.group, group, matrix.zero_points is not None)
    parameters = [matrix.scales] if matrix.zero_points is None else [matrix.scales, matrix.zero_points]
    return PackedMatrix(matrix, product, (layout.pack(matrix.codes), *map(layout.pack_groups, parameters)))


def product_with(
    builder: relax.BlockBuilder, x: relax.Expr, matrix: QuantizedMatrix, use: WeightUse, dtype: str
) -> relax.Expr:
    """Return x [..., K] times the transpose of a quantized matrix [N, K], in `dtype`."""
    if use.activations == "reference":
        weights = relax.const(np.ascontiguousarray(matrix.dequantized().T).astype(np.float32))
        wide = builder.emit(relax.op.astype(x, "float32")) if _dtype(x) != "float32" else x
        return _as(builder, relax.op.matmul(wide, weights), dtype)
    packed = pack(matrix, use.target)
    constants = [relax.const(array) for array in packed.arrays]
    filled = _filled(builder, x, packed.depth)
    if use.activations == "float":
        compute, arguments = operators.float_product(packed.product, matrix.rows), [filled, *constants]
    else:
        compute = operators.integer_product(packed.product, matrix.rows)
        arguments = [*_quantized(builder, filled, packed.product.activation_group), *constants]
    call = builder.call_te(
        compute, *arguments, primfunc_name_hint="quantized_matmul", primfunc_attrs={"op_pattern": _FUSABLE_REDUCTION}
    )
    return _as(builder, call, dtype)


def rows_of(
    builder: relax.BlockBuilder, indices: relax.Expr, matrix: QuantizedMatrix, use: WeightUse, dtype: str
) -> relax.Expr:
    """Return the rows of a quantized matrix that `indices` name, in `dtype`."""
    if use.activations == "reference":
        table = relax.const(np.ascontiguousarray(matrix.dequantized()).astype(np.float32))
        return _as(builder, relax.op.take(table, indices, axis=0, mode="clip"), dtype)
    packed = pack(matrix, use.target)
    compute = operators.gathered_rows(packed.product, matrix.rows, matrix.inputs, dtype)
    constants = [relax.const(array) for array in packed.arrays]
    return builder.call_te(compute, indices, *constants, primfunc_name_hint="quantized_rows")


def _quantized(builder: relax.BlockBuilder, x: relax.Expr, group: int) -> Sequence[relax.Expr]:
    """Return the int8 codes, scales and sums of codes of x [..., K]."""
    *leading, depth = x.ty.shape
    grouped = builder.emit(relax.op.reshape(x, [*leading, int(depth) // group, group]))
    parts = builder.emit(builder.call_te(operators.quantize_rows, grouped, primfunc_name_hint="quantize_rows"))
    return [builder.emit(relax.TupleGetItem(parts, field)) for field in range(3)]


def _filled(builder: relax.BlockBuilder, x: relax.Expr, depth: int) -> relax.Expr:
    """Return x [..., K] with zeros up to `depth` elements a row."""
    *leading, inputs = x.ty.shape
    if int(inputs) == depth:
        return x
    return builder.emit(relax.op.nn.pad(x, [0] * (2 * len(leading) + 1) + [depth - int(inputs)]))


def _as(builder: relax.BlockBuilder, value: relax.Expr, dtype: str) -> relax.Expr:
    emitted = builder.normalize(value)
    return emitted if _dtype(emitted) == dtype else relax.op.astype(builder.emit(emitted), dtype)


def _dtype(expr: relax.Expr) -> str:
    return str(expr.ty.dtype.dtype)


def constant_array(expr: relax.Expr) -> NDArray[np.generic] | None:
    """Return the value of a constant."""
    return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None
