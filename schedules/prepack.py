"""Constant matmul operands laid out ahead of time as the register tile reads them.

A weight of K x N becomes [ceil(N / block)][K][block] with the target's column block, so that a tile streams it from
memory in order, or [ceil(N / block)][ceil(K / g)][block][g] where the target has dot products of g neighbours of K:
pairs of bfloat16, fours of bytes; for tile registers K is a multiple of their step. Columns past N and rows past K are
zeros that change nothing. The functions that read
it are rewritten to index the new layout; their schedule recognizes it by its indices. An embedding that is tied to a
product is gathered from the product's weights. Values do not change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import ir, relax, tirx
from tvm.ir import Expr, GlobalVar, TensorLoad
from tvm.relax.expr_functor import PyExprMutator, mutator

from schedules import direct_convolution, product_chain, row_parts, winograd_structure
from schedules.access import AxisGroup, as_int
from schedules.family import Kernel
from schedules.inline import inline
from schedules.intrin.matrix_tiles import matrix_tiles
from schedules.kernels import cut
from schedules.matmul import Matmul, MatmulAnalysis, dot_of
from schedules.packing import Packing, reading_packed
from schedules.register_tile import wide_block
from schedules.report import is_scheduled
from schedules.stage_parsing import parse
from schedules.stages import contains
from schedules.tied_tables import PackedWeight, gather_from_packed
from targets.base import Target


@dataclass(frozen=True)
class PrepackReport:
    """A weight that was laid out anew: the function that reads it, which parameter, and its shapes."""

    function: str
    parameter: int
    shape: tuple[int, ...]
    packed_shape: tuple[int, ...]


def prepack(module: tvm.IRModule, target: Target) -> tuple[tvm.IRModule, tuple[PrepackReport, ...]]:
    """Return `module`, fused but not scheduled, with constant weights of matmuls packed for a CPU `target`.

    Call sites whose weight is not a constant keep the function that they call; one that nothing calls any more is left
    for dead code elimination.
    """
    if target.device != "cpu":
        return module, ()
    rewriter = _Prepacker(module, target)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
    packed = gather_from_packed(rewriter.builder_.get(), rewriter.weights)
    return packed, tuple(rewriter.reports)


@mutator
class _Prepacker(PyExprMutator):
    """Rewrites calls of matmul functions with a constant weight."""

    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        super().__init__(module)
        self.module = module
        self.target = target
        self.reports: list[PrepackReport] = []
        self.weights: list[PackedWeight] = []
        self.variants: dict[GlobalVar, tuple[GlobalVar, tuple[Packing, ...]] | None] = {}

    def visit_call_(self, call: ir.Call) -> Expr:
        call = super().visit_call_(call)
        if not isinstance(call.op, ir.Op) or call.op.name != "relax.call_tir":
            return call
        callee, arguments = call.args[0], list(call.args[1].fields)
        constant = [position for position, argument in enumerate(arguments) if isinstance(argument, ir.GenericConst)]
        variant = self._variant(callee, constant)
        if variant is None:
            return call
        function, packings = variant
        for packing in packings:
            original = arguments[packing.parameter]
            values = original.value.numpy()
            packed = packing.pack(values)
            arguments[packing.parameter] = relax.const(packed)
            self.weights.append(PackedWeight(original, packing, arguments[packing.parameter]))
            self.reports.append(PrepackReport(function.name_hint, packing.parameter, values.shape, packed.shape))
        return ir.Call(call.op, [function, relax.Tuple(arguments), *call.args[2:]], call.attrs, call.ty_args)

    def _variant(self, callee: GlobalVar, constant: Sequence[int]) -> tuple[GlobalVar, tuple[Packing, ...]] | None:
        """Return the function that reads packed weights, None where there is none or a weight is not constant."""
        if callee not in self.variants:
            self.variants[callee] = None
            function = self.module[callee]
            if isinstance(function, tirx.PrimFunc) and not is_scheduled(function):
                packed, packings = with_packed_weights(function, self.target, constant)
                if packings:
                    name = f"{callee.name_hint}_packed"
                    self.variants[callee] = self.builder_.add_func(packed, name), packings
        variant = self.variants[callee]
        return variant if variant is not None and all(each.parameter in constant for each in variant[1]) else None


def with_packed_weights(
    function: tirx.PrimFunc, target: Target, constant: Sequence[int]
) -> tuple[tirx.PrimFunc, tuple[Packing, ...]]:
    """Return `function` with the weights of its matmuls read in packed layout, and how they are packed.

    `constant` are the positions of the parameters that may be packed.
    """
    packings: list[Packing] = []
    for analysis in products_of(function):
        if analysis.block:
            continue
        weight = analysis.operand.source
        position = next(i for i, parameter in enumerate(function.params) if parameter.same_as(weight))
        packing = _packing(analysis, position, target)
        if packing is not None and position in constant:
            function = reading_packed(function, weight, packing)
            packings.append(packing)
    return function, tuple(packings)


def _packing(analysis: MatmulAnalysis, parameter: int, target: Target) -> Packing | None:
    """Return how a matmul's weight is packed; None for one that has no order of rows and columns."""
    order = _dimension_order(analysis.operand, [*analysis.reduction, analysis.columns])
    columns = analysis.columns.extent
    if order is None or not isinstance(columns, int) or len(analysis.columns.axes) != 1:
        return None
    dot = dot_of(analysis, target)
    group = 1 if dot is None else dot.terms
    step = 1 if dot is None else _step(analysis, target)
    wide = wide_block(target, str(analysis.operand.source.dtype), columns) if dot is None else None
    return Packing(parameter, order, columns, wide or target.layouts.column_block, group, step)


def _step(analysis: MatmulAnalysis, target: Target) -> int:
    """Return of how many rows a multiple is filled up: whole steps of tile registers where they add floats."""
    tiles = matrix_tiles(target, *[str(load.source.dtype) for load in analysis.stage.loads()][:2])
    depth = math.prod(group.extent for group in analysis.reduction if isinstance(group.extent, int))
    return tiles.terms if tiles is not None and tiles.total == "float32" and depth >= tiles.terms else 1


def products_of(function: tirx.PrimFunc) -> list[MatmulAnalysis]:
    """Return the analyses of matmuls that read their column operands straight from parameters, each one its own."""
    staged = parse(function)
    if staged is None or winograd_structure.whole(staged) is not None:
        return []
    found: list[MatmulAnalysis] = []
    parted, chain = row_parts.whole(staged), product_chain.whole(staged)
    parts = parted.parts if parted is not None else None if chain is None else chain.parts
    for kernel in cut(inline(staged)) if parts is None else parts:
        if not isinstance(kernel, Kernel) or direct_convolution.analyse(kernel) is not None:
            continue
        analysis = Matmul().analyse(kernel)
        if analysis is not None and contains(function.params, analysis.operand.source):
            found.append(analysis)
    weights = [analysis.operand.source for analysis in found]
    alone = [sum(weight.same_as(other) for other in weights) == 1 for weight in weights]
    return [analysis for analysis, own in zip(found, alone, strict=True) if own]


def _dimension_order(read: TensorLoad, groups: Sequence[AxisGroup]) -> tuple[int, ...] | None:
    """Return the read's dimensions in the order of the groups' axes; None where an index is not one whole axis."""
    axes = [axis for group in groups for axis in group.axes]
    order = [position for position, i in enumerate(read.indices) if as_int(i) is not None]
    for axis in axes:
        matching = [position for position, i in enumerate(read.indices) if i.same_as(axis.variable)]
        if len(matching) != 1 or as_int(read.source.shape[matching[0]]) != axis.extent:
            return None
        order += matching
    return tuple(order) if len(order) == len(read.indices) else None
