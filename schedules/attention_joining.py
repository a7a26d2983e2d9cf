"""The results of blocks of keys put together, as in decoding (Dao et al., Flash-Decoding, 2023).

With m_b the maximum of block b, and m the largest of them, a query's result is
    sum_b exp(m_b - m) weighted_b / sum_b exp(m_b - m) total_b
A sink is one more block, of one exponential and no value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_structure import AttentionAnalysis
from schedules.intrin.vector_math import exp_of_nonpositive
from schedules.loops import Extent, in_vectors, index, load, local, loop, store, with_local
from schedules.stages import sequence, substitute

FLOAT = "float32"
LOWEST = -3.4028234663852886e38
LOWEST_NUMBER = tirx.const(LOWEST, FLOAT)
ZERO = tirx.const(0.0, FLOAT)


@dataclass(frozen=True, eq=False)
class Row:
    """The results of `blocks` blocks from `first` for one query of one head, to be put together."""

    analysis: AttentionAnalysis
    lanes: int
    point: Mapping[Var, Expr]
    first: Expr
    head: Expr
    blocks: Extent
    largest: Var
    total: Var
    sums: Var


def joined(row: Row) -> Stmt:
    """Return the sum of the blocks' results, each shrunken by what its maximum lacks to the largest."""
    analysis, zero = row.analysis, index(0)
    columns = analysis.column.extent
    largest, total, factor = (local([1], FLOAT, name) for name in ("largest", "total", "factor"))
    sums = local([columns], FLOAT, "sums")

    def of(buffer: Var, block: Expr, *column: Expr) -> Expr:
        return load(buffer, [row.first + block, row.head, *column])

    def grow(block: Expr) -> Stmt:
        return store(largest, tirx.max(load(largest, [zero]), of(row.largest, block)), [zero])

    def add(block: Expr) -> Stmt:
        shrunk = exp_of_nonpositive(of(row.largest, block) - load(largest, [zero]))

        def column(e: Expr) -> Stmt:
            return store(sums, load(sums, [e]) + load(factor, [zero]) * of(row.sums, block, e), [e])

        return sequence(
            [
                store(factor, shrunk, [zero]),
                store(total, load(total, [zero]) + load(factor, [zero]) * of(row.total, block), [zero]),
                in_vectors(row.lanes, columns, column),
            ]
        )

    def finish(e: Expr) -> Stmt:
        value = (load(sums, [e]) * load(factor, [zero])).astype(analysis.output.dtype)
        indices = [substitute(i, {**row.point, analysis.column.variable: e}) for i in analysis.indices]
        return store(analysis.output, value, indices)

    sink = LOWEST_NUMBER if analysis.sink is None else tirx.max(substitute(analysis.sink, row.point), LOWEST_NUMBER)
    rest = ZERO if analysis.sink is None else exp_of_nonpositive(sink - load(largest, [zero]))
    inverse = tirx.const(1.0, FLOAT) / load(total, [zero])
    if analysis.zero_if_empty:
        inverse = tirx.Select(load(total, [zero]) > ZERO, inverse, ZERO)
    return with_local(
        [largest, total, factor, sums],
        [
            store(largest, sink, [zero]),
            in_vectors(row.lanes, columns, lambda e: store(sums, ZERO, [e])),
            loop(row.blocks, grow),
            store(total, rest, [zero]),
            loop(row.blocks, add),
            store(factor, inverse, [zero]),
            in_vectors(row.lanes, columns, finish),
        ],
    )
