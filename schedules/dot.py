"""Contractions whose operands are both contiguous along the reduced axis: lanes along it, added up at the end.

This serves a matrix product with a transposed second operand when too few rows share it for copying it to pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup
from schedules.epilogue import Epilogue
from schedules.loops import (
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    nest,
    parallel,
    product,
    quotient,
    remainder,
    store,
    tile_choice,
    tiles,
    unflatten,
    unrolled,
    vector,
    with_local,
)
from schedules.reducer import Reducer, accumulator_dtype, fold, lanes_for, load_lanes, term_at
from schedules.stages import Stage, substitute

# Rows of one task: enough to reuse the column operand from the first-level cache.
TASK_ROWS = 16


@dataclass(frozen=True, eq=False)
class DotTile:
    """How a contraction is cut into `rows` x `columns` outputs whose terms are summed in lanes along `along`."""

    stage: Stage
    epilogue: Epilogue
    reducer: Reducer
    outer: tuple[AxisGroup, ...]
    row_group: AxisGroup | None
    column_group: AxisGroup
    reduction: tuple[AxisGroup, ...]
    along: AxisGroup
    lanes: int
    rows: int
    columns: int
    parallel: bool


def emit(tile: DotTile) -> Stmt:
    """Return the loop nest of `tile`."""
    outer = [group.extent for group in tile.outer]
    rows: Extent = tile.row_group.extent if tile.row_group is not None else 1
    columns = tile.column_group.extent
    blocks, strips = ceiling(rows, TASK_ROWS), ceiling(columns, tile.columns)

    def task(number: Expr) -> Stmt:
        *outside, strip, block = unflatten(number, [*outer, strips, blocks])
        point: dict[Var, Expr] = {}
        for group, position in zip(tile.outer, outside, strict=True):
            point.update(group.point(position))

        def strip_of(column: Expr, width: int) -> Stmt:
            return _part(
                block, rows, TASK_ROWS, tile.rows, lambda row, count: _micro(tile, point, (row, count), (column, width))
            )

        return _part(strip, columns, tile.columns, tile.columns, strip_of)

    return parallel(product([*outer, strips, blocks]), task, tile.parallel)


def _part(number: Expr, extent: Extent, size: int, step: int, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return tiles of `step` over part `number`, of `size`, of [0, extent)."""
    if isinstance(extent, int):
        return tile_choice(
            number, extent, size, lambda base, width: tiles(width, [step], lambda i, count: body(base + i, count))
        )
    base = number * size
    rest = tirx.min(index(size), extent - base)
    return tiles(rest, [step, 1], lambda i, count: body(base + i, count))


def _micro(tile: DotTile, point: Mapping[Var, Expr], rows: tuple[Expr, int], columns: tuple[Expr, int]) -> Stmt:
    """Return one tile of outputs; `rows` and `columns` are offset and count."""
    dtype = accumulator_dtype(tile.stage)
    cells = rows[1] * columns[1]
    extent = tile.along.extent
    lanes = lanes_for(extent, tile.lanes, most=1)
    partial, total = local([cells * lanes], dtype, "partial"), local([cells], dtype, "total")
    others = [group for group in tile.reduction if group is not tile.along]
    combine = tile.reducer.combine

    def at(cell: Expr) -> dict[Var, Expr]:
        values = {**point, **tile.column_group.point(columns[0] + cell % columns[1])}
        if tile.row_group is not None:
            values.update(tile.row_group.point(rows[0] + tirx.floordiv(cell, index(columns[1]))))
        return values

    def along_others(body: Callable[[dict[Var, Expr]], Stmt]) -> Stmt:
        def inside(positions: Sequence[Expr]) -> Stmt:
            values: dict[Var, Expr] = {}
            for group, position in zip(others, positions, strict=True):
                values.update(group.point(position))
            return body(values)

        return nest([group.extent for group in others], inside)

    def update(buffer: Var, place: Expr, values: Mapping[Var, Expr]) -> Stmt:
        return store(buffer, combine(load(buffer, [place]), term_at(tile.stage, tile.reducer, values)), [place])

    def vectors(values: dict[Var, Expr]) -> Stmt:
        def step(i: Expr, cell: Expr, v: Expr) -> Stmt:
            here = {**values, **at(cell), **tile.along.point(i * lanes + v)}
            return update(partial, cell * lanes + v, here)

        return loop(
            quotient(extent, lanes), lambda i: unrolled(cells, lambda cell: vector(lanes, lambda v: step(i, cell, v)))
        )

    def scalars(values: dict[Var, Expr]) -> Stmt:
        done = index(0) + quotient(extent, lanes) * lanes
        return loop(
            remainder(extent, lanes),
            lambda i: unrolled(
                cells, lambda cell: update(total, cell, {**values, **at(cell), **tile.along.point(done + i)})
            ),
        )

    def folded(cell: Expr) -> Expr:
        return fold(tile.reducer, load_lanes(partial, cell * lanes, lanes), lanes)

    identity = tile.reducer.identity.astype(dtype)
    initial = tile.stage.initial
    assert initial is not None
    rest = remainder(extent, lanes)
    statements = [
        unrolled(cells, lambda cell: vector(lanes, lambda v: store(partial, identity, [cell * lanes + v]))),
        unrolled(cells, lambda cell: store(total, substitute(initial, at(cell)).astype(dtype), [cell])),
        along_others(vectors),
        *([] if isinstance(rest, int) and rest == 0 else [along_others(scalars)]),
        unrolled(cells, lambda cell: _finish(tile, combine(load(total, [cell]), folded(cell)), at(cell))),
    ]
    return with_local([partial, total], statements)


def _finish(tile: DotTile, total: Expr, point: Mapping[Var, Expr]) -> Stmt:
    return tile.epilogue.store(total.astype(tile.stage.output.dtype), point)
