"""Det: the determinant of square matrices."""

from __future__ import annotations

from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as T

from optimizer.frontend.accumulation import accumulation_dtype, cast
from optimizer.frontend.converters.kernel_loops import kernel, loops
from optimizer.frontend.dimensions import product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter


@converter("Det", since=11)
def determinant(node: Node) -> Result:
    """Convert Det: the determinant of each matrix of the last two axes."""
    data = node.input()
    wide = accumulation_dtype(data.dtype)
    size = data.shape[-1]
    matrices = node.emit(relax.op.reshape(cast(data.expr, data.dtype, wide), (product(data.shape[:-2]), size, size)))
    found = node.compute(lambda tensor: _determinants(tensor, wide), matrices.expr)
    return node.emit(cast(relax.op.reshape(found.expr, list(data.shape[:-2])), wide, data.dtype))


def _determinants(matrices: te.Tensor, dtype: str) -> te.Tensor:
    """Return the determinants of a batch of matrices, by Gaussian elimination with partial pivoting."""

    def body(source: tirx.Buffer, result: tirx.Buffer, work: tirx.Buffer) -> None:
        batch, size, _ = source.shape
        with loops([batch], parallel=True) as (b,):
            pivot = T.alloc_buffer((1,), "int64", scope="local")
            found = T.alloc_buffer((1,), dtype, scope="local")
            T.buffer_store(found, tirx.const(1, dtype), [0])
            with loops([size, size]) as (i, j):
                T.buffer_store(work, source[b, i, j], [b, i, j])
            with T.serial(0, size) as k:
                _choose_pivot(work, pivot, b, k)
                T.buffer_store(found, found[0] * work[b, pivot[0], k], [0])
                with T.If(pivot[0] != k), T.Then():
                    T.buffer_store(found, -found[0], [0])
                    _swap_rows(work, pivot[0], b, k, dtype)
                with T.If(work[b, k, k] != tirx.const(0, dtype)), T.Then():
                    _eliminate(work, b, k)
            T.buffer_store(result, found[0], [b])

    shapes = [(matrices.shape[0],), matrices.shape]
    return kernel([matrices], shapes, [dtype, dtype], body, "determinant")[0]


def _choose_pivot(work: tirx.Buffer, pivot: tirx.Buffer, b: tirx.Var, k: tirx.Var) -> None:
    """Store the row, from row k on, whose element in column k is largest in size."""
    T.buffer_store(pivot, k, [0])
    with T.serial(k + 1, work.shape[1]) as row:
        larger = tirx.abs(work[b, row, k]) > tirx.abs(work[b, pivot[0], k])
        with T.If(larger), T.Then():
            T.buffer_store(pivot, row, [0])


def _swap_rows(work: tirx.Buffer, row: tirx.Expr, b: tirx.Var, k: tirx.Var, dtype: str) -> None:
    held = T.alloc_buffer((1,), dtype, scope="local")
    with T.serial(k, work.shape[1]) as j:
        T.buffer_store(held, work[b, k, j], [0])
        T.buffer_store(work, work[b, row, j], [b, k, j])
        T.buffer_store(work, held[0], [b, row, j])


def _eliminate(work: tirx.Buffer, b: tirx.Var, k: tirx.Var) -> None:
    """Make column k zero below row k (the zeros themselves are not written, as nothing reads them)."""
    size = work.shape[1]
    with T.serial(k + 1, size) as row, T.serial(k + 1, size) as j:
        T.buffer_store(work, work[b, row, j] - work[b, row, k] / work[b, k, k] * work[b, k, j], [b, row, j])
