"""Products in tile registers that are at work all the time."""

# TVMScript writes shapes where types stand.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import ml_dtypes
import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.script import tirx as T  # noqa: N812 - as TVM writes it

from schedules.intrin.matrix_tiles import BLOCK, BYTES, TILE, MatrixTiles

# Steps whose operands, 4 KiB each, stay in the first-level cache.
_STEPS = 6

Array = NDArray[np.generic]


def tile_products(tiles: MatrixTiles, work: int, threads: int) -> tuple[tvm.tirx.PrimFunc, list[Array]]:
    """Return a function of `work` operations, two to a multiply-add, and its arguments.

    These are random: on zeros an instruction takes a fifth less time than on random numbers (Granite Rapids).
    """
    passes = max(1, work // (2 * BLOCK * BLOCK * tiles.terms * _STEPS * threads))
    pitch, last = _STEPS * BYTES, BLOCK - 1
    begun, cleared, ended = (each.value for each in (tiles.begin(TILE, TILE), tiles.zero(), tiles.end()))

    def step(upper: tvm.ir.Expr, lower: tvm.ir.Expr, columns: tvm.ir.Expr) -> tvm.ir.Expr:
        return tiles.step((2, 2), [upper, lower], pitch, columns, 2 * BYTES).value

    def stored(*places: tvm.ir.Expr) -> tvm.ir.Expr:
        return tiles.store((2, 2), places, BLOCK * 4).value

    @T.prim_func(s_tir=True)
    def spin(
        rows: T.Buffer((threads, BLOCK, pitch), "int8"),
        columns: T.Buffer((threads, _STEPS, TILE, 2 * BYTES), "int8"),
        sums: T.Buffer((threads, BLOCK, BLOCK), tiles.total),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        with T.sblock("root"), T.attr(T.int32(0), "pragma_import_llvm", tiles.source):
            for thread in T.parallel(threads):
                with T.sblock("thread"):
                    owner = T.axis.spatial(threads, thread)
                    T.evaluate(begun)
                    for _ in range(passes):
                        T.evaluate(cleared)
                        for number in T.unroll(_STEPS):
                            T.evaluate(
                                step(
                                    rows[owner, 0, number * BYTES],
                                    rows[owner, TILE, number * BYTES],
                                    columns[owner, number, 0, 0],
                                )
                            )
                    T.evaluate(stored(sums[owner, 0, 0], sums[owner, TILE, 0], sums[owner, last, last]))
                    T.evaluate(ended)

    operands = [_random(tiles, (threads, BLOCK, pitch)), _random(tiles, (threads, _STEPS, TILE, 2 * BYTES))]
    return spin, [*operands, np.zeros((threads, BLOCK, BLOCK), tiles.total)]


def _random(tiles: MatrixTiles, shape: tuple[int, ...]) -> Array:
    """Return bytes of so many: any, or those of normal numbers in bfloat16."""
    generator = np.random.default_rng(0)
    if tiles.terms == BYTES:
        return generator.integers(-128, 128, shape, np.int8)
    *others, size = shape
    return generator.standard_normal((*others, size // 2)).astype(ml_dtypes.bfloat16).view(np.int8)
