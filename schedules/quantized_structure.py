"""What makes a reduction a product with quantized weights: its reads, the product of their shapes, and its term."""

from __future__ import annotations

from dataclasses import dataclass

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import TensorLoad, Var

from schedules.access import as_int, occurs
from schedules.quantized_operators import QuantizedProduct
from schedules.stages import Axis, Stage
from schedules.weight_layout import layout_of
from targets.base import Target


@dataclass(frozen=True, eq=False)
class Operands:
    """The reads of a quantized product: three of activations, and of packed weights with their parameters."""

    codes: TensorLoad
    scales: TensorLoad
    sums: TensorLoad
    packed: TensorLoad
    weight_scales: TensorLoad
    zero_points: TensorLoad | None


def operands_of(stage: Stage) -> Operands | None:
    """Return the reads of a stage by their types: int8 codes, float scales and int32 sums of rows, packed weights."""
    column = stage.spatial[-1].variable
    reads: list[TensorLoad] = []
    for each in stage.loads():
        if not any(tvm_ffi.structural_equal(each, other) for other in reads):
            reads.append(each)
    packed = [each for each in reads if str(each.source.dtype) == "uint8" and _is_of_weights(each, column)]
    codes = [each for each in reads if str(each.source.dtype) == "int8"]
    sums = [each for each in reads if str(each.source.dtype) == "int32"]
    floats = [each for each in reads if str(each.source.dtype).startswith(("float", "bfloat"))]
    of_weights = [each for each in floats if _is_of_weights(each, column)]
    scales = [each for each in floats if not _is_of_weights(each, column)]
    if len(codes) != 1 or len(sums) != 1 or len(scales) != 1 or not packed:
        return None
    # Reads stand in the order of the term: codes, zero points, scales.
    weights = [each for each in reads if each in packed or each in of_weights]
    if len(weights) not in (2, 3):
        return None
    return Operands(codes[0], scales[0], sums[0], weights[0], weights[-1], weights[1] if len(weights) == 3 else None)


def described_by(operands: Operands, target: Target) -> QuantizedProduct | None:
    """Return the product that the shapes of the operands belong to."""
    extents = [*operands.packed.source.shape, *operands.weight_scales.source.shape, *operands.codes.source.shape[-2:]]
    known = [extent for extent in map(as_int, extents) if extent is not None]
    if len(known) != len(extents) or 0 in known:
        return None
    blocks, steps, width, scale_blocks, weight_groups, columns, groups, activation_group = known
    inputs = groups * activation_group
    if blocks != scale_blocks or columns != target.layouts.quantized_columns or inputs % weight_groups:
        return None
    reduction, bits, group = width // columns, 8 * steps * width // (columns * inputs), inputs // weight_groups
    if bits not in (4, 8) or reduction != target.layouts.reduction_group or group % activation_group:
        return None
    layout = layout_of(target, bits)
    return QuantizedProduct(layout, group, activation_group, operands.zero_points is not None)


def is_product(stage: Stage, described: QuantizedProduct, operands: Operands, columns: Axis) -> bool:
    """Return whether the stage's value is its output plus the term of a quantized product."""
    codes, scales, sums = operands.codes, operands.scales, operands.sums
    activations = [
        lambda *at: tirx.BufferLoad(codes.source, [*codes.indices[:-2], *at]),
        lambda *at: tirx.BufferLoad(scales.source, [*scales.indices[:-1], *at]),
        lambda *at: tirx.BufferLoad(sums.source, [*sums.indices[:-1], *at]),
    ]
    parameters = [operands.packed, operands.weight_scales]
    if operands.zero_points is not None:
        parameters.append(operands.zero_points)
    weights = [lambda *at, read=read: tirx.BufferLoad(read.source, list(at)) for read in parameters]
    k = stage.reduction[0].variable
    term = described.term(activations, weights, columns.variable, k)
    expected = tirx.BufferLoad(stage.output, list(stage.indices)) + term
    analyzer = sym.Analyzer()
    return bool(tvm_ffi.structural_equal(analyzer.simplify(expected), analyzer.simplify(stage.value)))


def _is_of_weights(read: TensorLoad, column: Var) -> bool:
    """Return whether a read is of weights, [block, step or group, lane], which other outputs read elsewhere."""
    return len(read.source.shape) == 3 and any(occurs(position, column) for position in read.indices)
