"""Det: determinants of square matrices."""

from __future__ import annotations

import tvm.ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as ir

from optimizer.frontend.converters.kernel_loops import kernel, loops
from optimizer.frontend.converters.precision import HALF_TYPES
from optimizer.frontend.dimensions import product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter

_INT64 = "int64"


@converter("Det", since=11)
def determinant(node: Node) -> Result:
    """Convert Det: the determinant of each matrix in the last two axes."""
    data = node.input()
    outer, (rows, columns) = data.shape[:-2], data.shape[-2:]
    wide = "float32" if data.dtype in HALF_TYPES else data.dtype
    matrices = node.emit(relax.op.reshape(data.expr, (product(outer), rows, columns)))
    if wide != data.dtype:
        matrices = node.emit(relax.op.astype(matrices.expr, wide))
    values = node.emit(relax.op.reshape(node.compute(_determinants, matrices.expr).expr, list(outer)))
    return values if wide == data.dtype else relax.op.astype(values.expr, data.dtype)


def _determinants(matrices: te.Tensor) -> te.Tensor:
    """Return the product of the pivots of Gaussian elimination with partial pivoting."""
    dtype = str(matrices.dtype)
    shape = list(matrices.shape)

    def body(source: tirx.Buffer, result: tirx.Buffer, work: tirx.Buffer) -> None:
        count, size, _ = source.shape
        pivot = ir.alloc_buffer((1,), _INT64, scope="local")
        spare = ir.alloc_buffer((1,), dtype, scope="local")
        with loops([count]) as (batch,):
            with loops([size, size]) as (i, j):
                ir.buffer_store(work, source[batch, i, j], [batch, i, j])
            ir.buffer_store(result, tirx.const(1, dtype), [batch])
            with ir.serial(0, size) as k:
                ir.buffer_store(pivot, k, [0])
                with ir.serial(0, size - k) as below:
                    larger = tirx.abs(work[batch, k + below, k]) > tirx.abs(work[batch, pivot[0], k])
                    with ir.If(larger), ir.Then():
                        ir.buffer_store(pivot, k + below, [0])
                with ir.If(pivot[0] != k), ir.Then():
                    ir.buffer_store(result, -result[batch], [batch])
                    with ir.serial(0, size) as j:
                        ir.buffer_store(spare, work[batch, k, j], [0])
                        ir.buffer_store(work, work[batch, pivot[0], j], [batch, k, j])
                        ir.buffer_store(work, spare[0], [batch, pivot[0], j])
                ir.buffer_store(result, result[batch] * work[batch, k, k], [batch])
                with ir.If(work[batch, k, k] != tirx.const(0, dtype)), ir.Then():
                    _eliminate(work, batch, k, size, spare)

    return kernel([matrices], [shape[:1], shape], [dtype, dtype], body, "determinant")[0]


def _eliminate(work: tirx.Buffer, batch: tirx.Var, k: tirx.Var, size: tvm.ir.Expr, spare: tirx.Buffer) -> None:
    """Subtract multiples of row k from the rows below it, so that nothing is left below the pivot."""
    with ir.serial(0, size - k - 1) as below:
        row = k + 1 + below
        ir.buffer_store(spare, work[batch, row, k] / work[batch, k, k], [0])
        with ir.serial(0, size) as j:
            ir.buffer_store(work, work[batch, row, j] - spare[0] * work[batch, k, j], [batch, row, j])
