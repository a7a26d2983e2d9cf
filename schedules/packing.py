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
    """How a parameter of a function is packed: the positions of its dimensions in (reduction, columns) order.

    `group` neighbours of the reduction lie side by side, for instructions that consume them at once; what is missing to
    a multiple of `step`, which is one of the group, is filled up with zeros.
    """

    parameter: int
    order: tuple[int, ...]
    columns: int
    block: int
    group: int = 1
    step: int = 1

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return `values` as [ceil(N / block)][K][block], or [ceil(N / block)][ceil(K / group)][block][group]."""
        matrix = values.transpose(self.order).reshape(-1, self.columns)
        padded = np.pad(matrix, [(0, self._filled(len(matrix)) - len(matrix)), (0, -self.columns % self.block)])
        grouped = padded.reshape(-1, self.group, padded.shape[1] // self.block, self.block).transpose(2, 0, 3, 1)
        return np.ascontiguousarray(grouped).reshape(self.shape(len(matrix)))

    def shape(self, depth: int) -> tuple[int, ...]:
        """Return the shape of the packed form of a matrix of `depth` rows."""
        grouped = (-(-self.columns // self.block), self._filled(depth) // self.group, self.block, self.group)
        return grouped if self.group > 1 else grouped[:-1]

    def _filled(self, depth: int) -> int:
        step = max(self.step, self.group)
        return -(-depth // step) * step

    def place(self, row: Expr, column: Expr) -> list[Expr]:
        """Return the indices of an element of the matrix in its packed form."""
        block, group = index(self.block), index(self.group)
        if self.group == 1:
            return [tirx.floordiv(column, block), row, tirx.floormod(column, block)]
        within = [tirx.floormod(column, block), tirx.floormod(row, group)]
        return [tirx.floordiv(column, block), tirx.floordiv(row, group), *within]

    def buffer(self, weight: Var) -> Var:
        """Return the buffer of the packed form of a parameter of static shape."""
        depth = int(np.prod([int(extent) for extent in weight.shape])) // self.columns
        return tirx.decl_buffer(self.shape(depth), str(weight.dtype), weight.name)


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
        return tirx.BufferLoad(packed, packing.place(row, load.indices[column]))

    def region(declared: ir.TensorRegion, mutate: tvm_ffi.StructuralMutator) -> Expr:
        if not declared.source.same_as(weight):
            return mutate.default_mutate(declared)
        return tirx.BufferRegion(packed, [ir.Range(0, extent) for extent in packed.shape])

    body = tvm_ffi.structural_mutate(function.body, [(TensorLoad, read), (ir.TensorRegion, region)])
    parameters = [packed if parameter.same_as(weight) else parameter for parameter in function.params]
    return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
