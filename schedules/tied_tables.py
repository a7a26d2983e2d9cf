"""Embeddings read from the packed weights of the product that they are tied to.

A language model's embedding is often its head's weight, transposed: T[v, k] = W[k, v]. A gather takes few rows of it,
for which the layout hardly matters, while the product streams all of it. So the gather reads W as the product has it
packed, and the matrix is stored once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import ir, relax, tirx
from tvm.ir import Expr, GlobalVar
from tvm.relax.expr_functor import PyExprMutator, mutator

from schedules.packing import Packing, reading_packed
from schedules.report import is_scheduled
from schedules.stages import loads_of


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A constant, how it was packed as a matrix of reduction by columns, and the constant that it became."""

    original: ir.GenericConst
    packing: Packing
    constant: ir.GenericConst

    def is_transpose_of(self, table: ir.GenericConst) -> bool:
        """Return whether `table` holds the same numbers with rows and columns swapped."""
        rows, columns = (int(extent) for extent in table.ty.shape.values)
        size = math.prod(int(extent) for extent in self.original.ty.shape.values)
        depth = size // max(1, self.packing.columns)
        if (rows, columns) != (self.packing.columns, depth) or table.ty.dtype != self.original.ty.dtype or not size:
            return False
        matrix = self.original.value.numpy().transpose(self.packing.order).reshape(depth, rows)
        return np.array_equal(matrix.T, table.value.numpy())


def gather_from_packed(module: tvm.IRModule, weights: Sequence[PackedWeight]) -> tvm.IRModule:
    """Return `module` with constant tables gathered from those of `weights` that are their transposes."""
    gatherer = _Gatherer(module, weights)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            gatherer.builder_.update_func(variable, gatherer.visit_expr(function))
    return gatherer.builder_.get()


@mutator
class _Gatherer(PyExprMutator):
    def __init__(self, module: tvm.IRModule, weights: Sequence[PackedWeight]) -> None:
        super().__init__(module)
        self._module = module
        self._weights = weights

    def visit_call_(self, call: ir.Call) -> Expr:
        """Replace a call of a function that gathers from a table of which there is a packed transpose."""
        call = super().visit_call_(call)
        if not isinstance(call.op, ir.Op) or call.op.name != "relax.call_tir":
            return call
        callee, arguments = call.args[0], list(call.args[1].fields)
        for position, argument in enumerate(arguments):
            weight = self._tied(callee, position, argument)
            if weight is not None:
                function = self._module[callee]
                packing = replace(weight.packing, parameter=position, order=(1, 0))
                arguments[position] = weight.constant
                reading = reading_packed(function, function.params[position], packing)
                variant = self.builder_.add_func(reading, f"{callee.name_hint}_packed")
                fields = relax.Tuple(arguments)
                return ir.Call(call.op, [variant, fields, *call.args[2:]], call.attrs, call.ty_args, call.span)
        return call

    def _tied(self, callee: GlobalVar, position: int, argument: Expr) -> PackedWeight | None:
        if not isinstance(argument, ir.GenericConst) or argument.ty.ndim != 2:
            return None
        function = self._module[callee]
        if not isinstance(function, tirx.PrimFunc) or is_scheduled(function) or not _gathers(function, position):
            return None
        return next((weight for weight in self._weights if weight.is_transpose_of(argument)), None)


def _gathers(function: tirx.PrimFunc, position: int) -> bool:
    """Return whether a function reads rows of a parameter that its data choose, and nothing else of it."""
    reads = [read for read in loads_of(function.body) if read.source.same_as(function.params[position])]
    return bool(reads) and all(len(read.indices) == 2 and loads_of(read.indices[0]) for read in reads)
