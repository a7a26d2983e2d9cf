"""Matrices laid out in column blocks, and functions that read them so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad, Var

from schedules.loops import flatten, index


@dataclass(frozen=True, eq=False)
class Packing:
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

    def buffer(self, weight: Var) -> Var:
        """Return the buffer of the packed form of a parameter of static shape."""
        depth = int(np.prod([int(extent) for extent in weight.shape])) // self.columns
        return tirx.decl_buffer([-(-self.columns // self.block), depth, self.block], str(weight.dtype), weight.name)


def reading_packed(function: tirx.PrimFunc, weight: Var, packing: Packing) -> tirx.PrimFunc:
    """Return `function` with parameter `weight` replaced by its packed form and its reads indexed accordingly."""
    packed = packing.buffer(weight)
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
