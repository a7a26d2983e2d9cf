"""Loops over index spaces, for kernels that write where the data say and so cannot be tensor expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import tvm.ir
from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as ir

Body = Callable[..., None]
# The elements of vectors, which are written as such: compilers do not make vectors of these kernels' loops.
LANES = 16


def kernel(
    inputs: Sequence[te.Tensor], shapes: Sequence[Sequence[tvm.ir.Expr]], dtypes: Sequence[str], body: Body, name: str
) -> te.Tensor | list[te.Tensor]:
    """Return the outputs of a kernel; `body` gets the input and output buffers and emits its statements."""

    def generate(given: Sequence[tirx.Buffer], results: Sequence[tirx.Buffer]) -> tirx.Stmt:
        with IRBuilder() as builder:
            with ir.seq_scope():
                body(*given, *results)
            # The scope's own pragma means nothing to the code generators, which warn of it.
            return builder.get().body

    return te.extern([tuple(shape) for shape in shapes], list(inputs), generate, dtype=list(dtypes), name=name)


@contextmanager
def loops(extents: Sequence[tvm.ir.Expr], parallel: bool = False) -> Iterator[list[tirx.Var]]:
    """Open nested loops, the outermost of them parallel if asked for; gives the loop variables."""
    with ExitStack() as stack:
        variables: list[tirx.Var] = []
        for depth, extent in enumerate(extents):
            loop = ir.parallel if parallel and depth == 0 else ir.serial
            variables.append(stack.enter_context(loop(0, extent)))
        yield variables


def copy(source: tirx.Buffer, target: tirx.Buffer) -> None:
    """Copy a buffer to another of the same shape, in vectors where the last of several axes is static."""
    *outer, last = source.shape if len(source.shape) > 0 else [tirx.const(1, "int64")]
    width = int(last) if outer and isinstance(last, tirx.IntImm) and str(source.dtype) != "bool" else 0
    vectors = width // LANES
    with loops(outer or [last], parallel=True) as index:
        if vectors:
            with ir.serial(0, vectors) as vector, ir.vectorized(0, LANES) as lane:
                place = (*index, vector * LANES + lane)
                ir.buffer_store(target, source[place], list(place))
        rest = [last - vectors * LANES] if outer else []
        with loops(rest) as own:
            place = (*index, *(vectors * LANES + each for each in own))[: len(source.shape)]
            ir.buffer_store(target, source[place], list(place))


__all__ = ["LANES", "copy", "kernel", "loops"]
