"""Constant matmul operands laid out ahead of time as the register tile reads them.

A weight of K x N becomes [ceil(N / block)][K][block] with the target's column block, so that a tile streams it from
memory in order; columns past N are zeros that nothing reads. The functions that read it are rewritten to index the new
layout; their schedule recognizes it by its indices. Values do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, relax, tirx
from tvm.ir import Expr, GlobalVar, TensorLoad, Var
from tvm.relax.expr_functor import PyExprMutator, mutator

from schedules import direct_convolution
from schedules.access import AxisGroup, as_int
from schedules.family import Kernel
from schedules.inline import inline
from schedules.kernels import cut
from schedules.loops import flatten, index
from schedules.matmul import Matmul, MatmulAnalysis
from schedules.report import is_scheduled
from schedules.stages import contains, parse
from targets.base import Target


@dataclass(frozen=True)
class PrepackReport:
    """A weight that was laid out anew: the function that reads it, which parameter, and its shapes."""

    function: str
    parameter: int
    shape: tuple[int, ...]
    packed_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Packing:
    """How a parameter of a function is packed: the positions of its dimensions in (reduction, columns) order."""

    parameter: int
    order: tuple[int, ...]
    columns: int
    block: int

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return `values` as [ceil(N / block)][K][block]."""
        matrix = values.transpose(self.order).reshape(-1, self.columns)
        padded = np.pad(matrix, [(0, 0), (0, -self.columns % self.block)])
        return np.ascontiguousarray(padded.reshape(len(matrix), -1, self.block).transpose(1, 0, 2))


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
    return rewriter.builder_.get(), tuple(rewriter.reports)


@mutator
class _Prepacker(PyExprMutator):
    """Rewrites calls of matmul functions with a constant weight."""

    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        super().__init__(module)
        self.module = module
        self.target = target
        self.reports: list[PrepackReport] = []
        self.variants: dict[GlobalVar, tuple[GlobalVar, _Packing] | None] = {}

    def visit_call_(self, call: ir.Call) -> Expr:
        call = super().visit_call_(call)
        if not isinstance(call.op, ir.Op) or call.op.name != "relax.call_tir":
            return call
        callee, arguments = call.args[0], list(call.args[1].fields)
        constant = [position for position, argument in enumerate(arguments) if isinstance(argument, ir.GenericConst)]
        variant = self._variant(callee, constant)
        if variant is None:
            return call
        function, packing = variant
        values = arguments[packing.parameter].value.numpy()
        packed = packing.pack(values)
        arguments[packing.parameter] = relax.const(packed)
        self.reports.append(PrepackReport(function.name_hint, packing.parameter, values.shape, packed.shape))
        return ir.Call(call.op, [function, relax.Tuple(arguments), *call.args[2:]], call.attrs, call.ty_args)

    def _variant(self, callee: GlobalVar, constant: Sequence[int]) -> tuple[GlobalVar, _Packing] | None:
        """Return the function that reads the packed weight, None where there is none or the weight is not constant."""
        if callee not in self.variants:
            self.variants[callee] = None
            function = self.module[callee]
            if isinstance(function, tirx.PrimFunc) and not is_scheduled(function):
                packed = _pack_function(function, self.target.layouts.column_block, constant)
                if packed is not None:
                    name = f"{callee.name_hint}_packed"
                    self.variants[callee] = self.builder_.add_func(packed[0], name), packed[1]
        variant = self.variants[callee]
        return variant if variant is not None and variant[1].parameter in constant else None


def _pack_function(
    function: tirx.PrimFunc, block: int, constant: Sequence[int]
) -> tuple[tirx.PrimFunc, _Packing] | None:
    """Return `function` with the weight of its only matmul read in packed layout."""
    analysis = _matmul_of(function)
    if analysis is None:
        return None
    read = analysis.operand
    parameter = next(i for i, p in enumerate(function.params) if p.same_as(read.source))
    order = _dimension_order(read, [*analysis.reduction, analysis.columns])
    columns = analysis.columns.extent
    if parameter not in constant or order is None or not isinstance(columns, int) or len(analysis.columns.axes) != 1:
        return None
    depth = int(np.prod([int(extent) for extent in read.source.shape])) // columns
    packed = tirx.decl_buffer([-(-columns // block), depth, block], str(read.source.dtype), read.source.name)
    packing = _Packing(parameter, order, columns, block)
    return _rewrite(function, read.source, packed, packing), packing


def _matmul_of(function: tirx.PrimFunc) -> MatmulAnalysis | None:
    """Return the analysis of the only matmul that reads its column operand straight from a parameter."""
    staged = parse(function)
    if staged is None:
        return None
    found = []
    for kernel in cut(inline(staged)):
        if not isinstance(kernel, Kernel) or direct_convolution.analyse(kernel) is not None:
            continue
        analysis = Matmul().analyse(kernel)
        if analysis is not None and contains(function.params, analysis.operand.source):
            found.append(analysis)
    return found[0] if len(found) == 1 and not found[0].block else None


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


def _rewrite(function: tirx.PrimFunc, weight: Var, packed: Var, packing: _Packing) -> tirx.PrimFunc:
    """Return `function` with parameter `weight` replaced by `packed` and its reads indexed accordingly."""
    shape = [int(extent) for extent in weight.shape]
    *depth, column = packing.order

    def read(load: TensorLoad, mutate: tvm_ffi.StructuralMutator) -> Expr:
        load = mutate.default_mutate(load)
        if not load.source.same_as(weight):
            return load
        row = flatten([load.indices[d] for d in depth], [shape[d] for d in depth])
        block = index(packing.block)
        place = load.indices[column]
        return tirx.BufferLoad(packed, [tirx.floordiv(place, block), row, tirx.floormod(place, block)])

    def region(declared: ir.TensorRegion, mutate: tvm_ffi.StructuralMutator) -> Expr:
        if not declared.source.same_as(weight):
            return mutate.default_mutate(declared)
        return tirx.BufferRegion(packed, [ir.Range(0, extent) for extent in packed.shape])

    body = tvm_ffi.structural_mutate(function.body, [(TensorLoad, read), (ir.TensorRegion, region)])
    parameters = [packed if parameter.same_as(weight) else parameter for parameter in function.params]
    return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
