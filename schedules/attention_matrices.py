"""Attention's products in tile registers: keys and values packed into the order of their operands.

A block of scores is [keys][queries]: 32 rows of keys, as they lie, by queries in pairs along the depth. One of results
is [columns][queries]: columns of values, turned to rows of 32 keys each, by exponentials in pairs along the keys. So
queries stay in lanes for the softmax in between. What keys, the depth, and columns lack to whole tiles is in the
packed copies: zeros, or keys whose exponentials are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.attention_operands import narrow_read
from schedules.attention_pairs import Pairs
from schedules.intrin.bf16_pairs import PAIR
from schedules.intrin.matrix_tiles import BLOCK, TILE, MatrixTiles
from schedules.loops import Extent, ceiling, index, load, local, loop, store, tiles, vector, with_local
from schedules.stages import sequence, substitute
from schedules.turn import turned_vectors

FLOAT = "float32"
# Terms of a reduction, or keys, whose pairs fill a row of a tile.
TERMS = PAIR * TILE
_ROW = TERMS * 2  # bytes of bfloat16
_NO_PAIR = tirx.const(0, "int32")


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrices(Pairs):
    """Packed `keys` [heads][key][depth / 2] and `values` [heads][key / 32][column][16], int32; `tiles` multiply them.

    Keys, the depth and columns are rounded up to whole tiles.
    """

    tiles: MatrixTiles

    def imported(self, statement: Stmt) -> Stmt:
        return self.tiles.imported(super().imported(statement))

    def begin(self) -> list[Stmt]:
        return [self.tiles.begin(TILE, TILE)]

    def end(self) -> list[Stmt]:
        return [self.tiles.end()]

    def _pack_keys(self, point: Mapping[Var, Expr], first: Expr, count: Extent) -> Stmt:
        whole = ceiling(count, BLOCK)
        head, pairs = self.head(point), _pairs_of(self.analysis.depth.extent)
        missing = whole * BLOCK - index(count) if not isinstance(count, int) else whole * BLOCK - count

        def nothing(number: Expr) -> Stmt:
            key = first + index(count) + number
            return loop(pairs // TILE, lambda part: store(self.keys, _none(), [head, key, _row(part * TILE)]))

        return sequence(
            [
                loop(count, lambda number: self._pack_key(point, first + number)),
                loop(missing, nothing) if missing != 0 else tirx.Evaluate(0),
                loop(whole, lambda number: self._turn_values(point, first + number * BLOCK)),
            ]
        )

    def _pack_key(self, point: Mapping[Var, Expr], key: Expr) -> Stmt:
        depth = self.analysis.depth.extent
        assert isinstance(depth, int)
        packed, used = super()._pack_key(point, key), depth // PAIR
        head, missing = self.head(point), _pairs_of(depth) - used
        if not missing:
            return packed
        return sequence([packed, vector(missing, lambda v: store(self.keys, _NO_PAIR, [head, key, used + v]))])

    def _turn_values(self, point: Mapping[Var, Expr], key: Expr) -> Stmt:
        """Return the packing of 32 keys' values; those past the last key, which weigh nothing, are that key's."""
        analysis = self.analysis
        head, last = self.head(point), index(analysis.key.extent) - 1
        narrow = narrow_read(analysis.values, analysis.column)

        def at(row: Expr, column: Expr) -> dict[Var, Expr]:
            return {**point, analysis.key.variable: tirx.min(key + row, last), analysis.column.variable: column}

        def some(base: Expr, count: int) -> Stmt:
            def keep(column: Expr, value: Expr) -> Stmt:
                return store(
                    self.values, value, [head, tirx.floordiv(key, index(BLOCK)), base + column, _row(index(0))]
                )

            if narrow is not None and count == TILE:

                def read(pair: Expr) -> Expr:
                    both = (substitute(narrow, at(pair * PAIR + n, base)) for n in range(PAIR))
                    return self.dot.read_alternating(*both)

                return turned_vectors(TILE, "int32", read, keep)
            rows = [local([TILE], FLOAT, "row") for _ in range(PAIR)]
            pairs = local([TILE, TILE], "int32", "pairs")

            def fill(pair: Expr) -> Stmt:
                def element(n: int, column: Expr) -> Expr:
                    return substitute(analysis.values, at(pair * PAIR + n, base + column)).astype(FLOAT)

                clear = [vector(TILE, lambda v, n=n: store(rows[n], tirx.const(0.0, FLOAT), [v])) for n in range(PAIR)]
                read = [vector(count, lambda v, n=n: store(rows[n], element(n, v), [v])) for n in range(PAIR)]
                both = self.dot.alternating(*(load(row, [_row(index(0))]) for row in rows))
                return with_local(
                    rows, [*(clear if count < TILE else []), *read, store(pairs, both, [pair, _row(index(0))])]
                )

            turn = turned_vectors(TILE, "int32", lambda pair: load(pairs, [pair, _row(index(0))]), keep)
            return with_local([pairs], [loop(TILE, fill), turn])

        columns = analysis.column.extent
        assert isinstance(columns, int)
        return tiles(columns, [TILE], some)

    def turn(self, turned: Var, turned_pairs: Var, queries: int) -> Stmt:
        depth = self.analysis.depth.extent
        assert isinstance(depth, int)
        used = depth // PAIR
        missing = _pairs_of(depth) - used
        clear = loop(missing, lambda r: vector(queries, lambda v: store(turned_pairs, _NO_PAIR, [used + r, v])))
        pairs = super().turn(turned, turned_pairs, queries)
        return sequence([pairs, clear]) if missing else pairs

    def block_of_scores(
        self, weights: Var, turned_pairs: Var, queries: int, point: Mapping[Var, Expr], keys: tuple[Expr, Extent]
    ) -> Stmt:
        """Return the products of `keys[1]` keys from `keys[0]` on with queries, stored to `weights` [keys][queries]."""
        base, extent = keys
        head, pairs = self.head(point), _pairs_of(self.analysis.depth.extent)

        def some(first: Expr, rows: int) -> Stmt:
            def step(number: Expr) -> Stmt:
                part = number * TILE
                reads = [load(self.keys, [head, base + first + r, part]) for r in range(0, rows, TILE)]
                columns = load(turned_pairs, [part, index(0)])
                return self.tiles.step(_form(rows, queries), reads, pairs * 4, columns, queries * 4)

            steps = loop(pairs // TILE, step)
            return sequence([self.tiles.zero(), steps, self._stored(weights, first, rows, queries)])

        return _in_tiles(extent, some)

    def block_of_sums(
        self,
        sums: Var,
        exponentials: Var,
        queries: int,
        point: Mapping[Var, Expr],
        keys: tuple[Expr, Extent],
        single: bool,
    ) -> Stmt:
        """Return the sums of values of `keys[1]` keys from `keys[0]` on, weighted by exponentials [key / 2][queries].

        They are added to what is in `sums` [columns][queries], or with `single` stored there.
        """
        base, extent = keys
        head, columns = self.head(point), self.analysis.column.extent
        number = tirx.floordiv(base, index(BLOCK))
        steps = ceiling(extent, BLOCK)

        def some(first: Expr, rows: int) -> Stmt:
            def step(part: Expr) -> Stmt:
                reads = [load(self.values, [head, number + part, first + r, 0]) for r in range(0, rows, TILE)]
                pairs = load(exponentials, [part * TILE, index(0)])
                return self.tiles.step(_form(rows, queries), reads, _ROW, pairs, queries * 4)

            form, places = _form(rows, queries), _places(sums, first, rows)
            begin = self.tiles.zero() if single else self.tiles.load(form, places, queries * 4)
            return sequence([begin, loop(steps, step), self._stored(sums, first, rows, queries)])

        return _in_tiles(columns, some)

    def clear_rest(self, exponentials: Var, queries: int, extent: Extent) -> list[Stmt]:
        """Return what makes zero the exponentials of the keys behind `extent` that a tile has, too."""
        pairs = ceiling(extent, PAIR)
        if isinstance(pairs, int):
            missing: Extent = -pairs % TILE
            if not missing:
                return []
        else:
            missing = ceiling(extent, BLOCK) * TILE - pairs
        return [
            loop(missing, lambda r: vector(queries, lambda v: store(exponentials, _NO_PAIR, [index(pairs) + r, v])))
        ]

    def _stored(self, buffer: Var, first: Expr, rows: int, queries: int) -> Stmt:
        return self.tiles.store(_form(rows, queries), _places(buffer, first, rows), queries * 4)


def in_tiles(pairs: Pairs, tiles: MatrixTiles) -> Matrices:
    """Return the packing of what `pairs` packs for products in tile registers."""
    analysis, heads = pairs.analysis, pairs.keys.shape[0]
    keys = rounded_up(analysis.key.extent, BLOCK)
    columns = rounded_up(analysis.column.extent, TILE)
    return Matrices(
        pairs.dot,
        analysis,
        pairs.axes,
        pairs.shares,
        local([heads, keys, _pairs_of(analysis.depth.extent)], "int32", "packed_keys"),
        local([heads, ceiling(keys, BLOCK), columns, TILE], "int32", "packed_values"),
        pairs.at_once,
        pairs.owned,
        tiles=tiles,
    )


def rounded_up(extent: Extent, size: int) -> Extent:
    """Return the least multiple of `size` that is not less than an extent."""
    return ceiling(extent, size) * size


def _in_tiles(extent: Extent, some: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return `some` for all rows, 32 at once; of the last ones 16 where those are enough."""
    if not isinstance(extent, int):
        return loop(ceiling(extent, BLOCK), lambda number: some(number * BLOCK, BLOCK))
    return tiles(int(rounded_up(extent, TILE)), [BLOCK, TILE], some)


def _pairs_of(depth: Extent) -> int:
    assert isinstance(depth, int)
    return int(rounded_up(depth, TERMS)) // PAIR


def _form(rows: int, queries: int) -> tuple[int, int]:
    return rows // TILE, queries // TILE


def _places(buffer: Var, first: Expr, rows: int) -> list[Expr]:
    """Return the reads of the first of a block's upper and lower rows, and of the last element of its buffer."""
    last = [extent - 1 for extent in buffer.shape]
    lower = first + (TILE if rows > TILE else 0)
    return [load(buffer, [first, index(0)]), load(buffer, [lower, index(0)]), load(buffer, last)]


def _row(first: Expr) -> Expr:
    return tirx.Ramp(first, index(1), TILE)


def _none() -> Expr:
    return tirx.Broadcast(_NO_PAIR, TILE)
