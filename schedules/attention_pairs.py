"""Keys and values of attention as pairs of bfloat16, packed before the blocks of queries that share them.

Pairs of keys are neighbours of the depth, [key][depth / 2]; pairs of values neighbours of the keys, [key / 2][column]:
each is what one lane of a dot product adds up. Where there are many heads for each core, a task packs one of them
into its own cache and computes all queries of it; where not, tasks pack chunks of the keys of one head, and all wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int
from schedules.attention_operands import narrow_read
from schedules.attention_structure import AttentionAnalysis
from schedules.by_element import over_rows, over_terms
from schedules.intrin.bf16_conversion import rounded
from schedules.intrin.bf16_pairs import PAIR, Bf16Pairs
from schedules.loops import (
    Extent,
    ceiling,
    flatten,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    quotient,
    store,
    tiles,
    unflatten,
    unrolled,
    vector,
    with_local,
)
from schedules.stages import Axis, sequence, substitute, variables_of
from targets.base import Target

FLOAT = "float32"
# Keys of one task of packing: enough to be worth handing out, and few enough that small heads divide evenly.
CHUNK = 32
# Bytes that are packed at a time, so that they are there in caches when they are read, and memory is bounded.
PACKED_BYTES = 4 << 20
PAIR_BYTES = 4
# With so many heads for each core a task packs its own, and one core may get one more than another. With 6, as in a
# batch of 1, that was not faster (Zen 4).
HEADS_TO_OWN = 8
# Registers of a tile's sums, its rows, and the queries in their lanes.
Tile = tuple[Var, int, int]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Packed `keys` [heads][key][depth / 2] and `values` [heads][key / 2][column], int32; `axes` are those of heads.

    Along each axis so many neighbours as `shares` says, heads of queries, have the same keys and values. Of the first
    axis there are `at_once` places in the buffers, all of them or a part that divides them. With `owned` there is one
    head in them: that of a task which packs it and computes all of its queries.
    """

    dot: Bf16Pairs
    analysis: AttentionAnalysis
    axes: tuple[Axis, ...]
    shares: tuple[int, ...]
    keys: Var
    values: Var
    at_once: Extent
    owned: bool = False

    @property
    def buffers(self) -> list[Var]:
        """Return the buffers to allocate around all tasks, or with `owned` in each."""
        return [self.keys, self.values]

    def head(self, point: Mapping[Var, Expr]) -> Expr:
        """Return the place of a head among those packed."""
        if not self.axes or self.owned:
            return index(0)
        places = [
            point[axis.variable] if share == 1 else tirx.floordiv(point[axis.variable], index(share))
            for axis, share in zip(self.axes, self.shares, strict=True)
        ]
        if self.parts != 1:
            places[0] = tirx.floormod(places[0], index(self.at_once))
        return flatten(places, self._extents)

    def point(self, places: Sequence[Expr]) -> dict[Var, Expr]:
        """Return the axes' values of the first of the heads that share the keys and values at `places`."""
        heads = zip(self.axes, self.shares, places, strict=True)
        return {axis.variable: place if share == 1 else place * index(share) for axis, share, place in heads}

    @property
    def heads(self) -> list[Extent]:
        """Return how many places there are along each axis."""
        return _places(self.axes, self.shares)

    @property
    def parts(self) -> int:
        """Return how many parts of the first axis are packed one after the other."""
        extent = self.heads[0] if self.axes else 1
        return extent // self.at_once if isinstance(extent, int) and isinstance(self.at_once, int) else 1

    @property
    def first_heads(self) -> Extent:
        """Return how many heads of queries along the first axis belong to a part."""
        return product([self.at_once, self.shares[0]])

    @property
    def _extents(self) -> list[Extent]:
        return [self.at_once, *self.heads[1:]] if self.axes else []

    def pack(self, part: Expr, large: bool) -> Stmt:
        """Return the packing of all keys and values of a part of the first axis, by all threads."""
        extents = self._extents
        keys = self.analysis.key.extent
        chunks = ceiling(keys, CHUNK)

        def task(number: Expr) -> Stmt:
            *outside, chunk = unflatten(number, [*extents, chunks])
            if self.parts != 1:
                outside[0] = part * self.at_once + outside[0]
            first = chunk * CHUNK
            return self._pack_keys(self.point(outside), first, tirx.min(index(CHUNK), index(keys) - first))

        return parallel(product([*extents, chunks]), task, large)

    def pack_head(self, point: Mapping[Var, Expr]) -> Stmt:
        """Return the packing of all keys and values of one head."""
        return self._pack_keys(point, index(0), self.analysis.key.extent)

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that packs and multiplies pairs, with the functions that it calls."""
        return self.dot.imported(statement)

    def begin(self) -> list[Stmt]:
        """Return what each thread has to do before the products."""
        return []

    def end(self) -> list[Stmt]:
        """Return what each thread has to do behind them."""
        return []

    def _pack_keys(self, point: Mapping[Var, Expr], first: Expr, count: Extent) -> Stmt:
        """Return the packing of `count` keys of a head, with their values, from `first` on, a multiple of CHUNK."""
        return sequence(
            [
                loop(count, lambda number: self._pack_key(point, first + number)),
                loop(ceiling(count, PAIR), lambda number: self._pack_values(point, first + number * PAIR)),
            ]
        )

    def _pack_key(self, point: Mapping[Var, Expr], key: Expr) -> Stmt:
        analysis, lanes = self.analysis, self.dot.lanes
        width = PAIR * lanes
        depth = analysis.depth.extent
        assert isinstance(depth, int)
        head = self.head(point)
        narrow = narrow_read(analysis.keys, analysis.depth)

        def at(d: Expr) -> dict[Var, Expr]:
            return {**point, analysis.key.variable: key, analysis.depth.variable: d}

        def element(d: Expr) -> Expr:
            return substitute(analysis.keys, at(d)).astype(FLOAT)

        def some(base: Expr, count: int) -> Stmt:
            if count < width:
                return loop(count // PAIR, lambda pair: store(self.keys, one(base + pair * PAIR), place(base, pair)))
            to = [head, key, tirx.Ramp(tirx.floordiv(base, index(PAIR)), index(1), lanes)]
            if narrow is not None:
                return store(self.keys, self.dot.read_adjacent(substitute(narrow, at(base))), to)
            row = local([width], FLOAT, "row")
            halves = [load(row, [tirx.Ramp(index(half * lanes), index(1), lanes)]) for half in range(PAIR)]
            return with_local(
                [row],
                [
                    vector(width, lambda v: store(row, element(base + v), [v])),
                    store(self.keys, self.dot.adjacent(*halves), to),
                ],
            )

        def place(base: Expr, pair: Expr) -> list[Expr]:
            return [head, key, tirx.floordiv(base, index(PAIR)) + pair]

        def one(first: Expr) -> Expr:
            low, high = (rounded(element(first + n)).astype("uint32") for n in range(PAIR))
            return tirx.reinterpret("int32", low | (high << tirx.const(16, "uint32")))

        return tiles(depth, [width], some)

    def _pack_values(self, point: Mapping[Var, Expr], key: Expr) -> Stmt:
        """Return the packing of two keys' values; the one past the last key, which weighs nothing, is that key's."""
        analysis, lanes = self.analysis, self.dot.lanes
        place, last = [self.head(point), tirx.floordiv(key, index(PAIR))], index(analysis.key.extent) - 1
        narrow = narrow_read(analysis.values, analysis.column)

        def at(row: int, column: Expr) -> dict[Var, Expr]:
            return {**point, analysis.key.variable: tirx.min(key + row, last), analysis.column.variable: column}

        def element(row: int, column: Expr) -> Expr:
            return substitute(analysis.values, at(row, column)).astype(FLOAT)

        def some(base: Expr, count: int) -> Stmt:
            if narrow is not None and count == lanes:
                both = self.dot.read_alternating(*(substitute(narrow, at(n, base)) for n in range(PAIR)))
                return store(self.values, both, [*place, tirx.Ramp(base, index(1), lanes)])
            rows = [local([lanes], FLOAT, "row") for _ in range(PAIR)]
            packed = local([lanes], "int32", "packed")
            ramp = tirx.Ramp(index(0), index(1), lanes)
            fill = [vector(count, lambda v, n=n: store(rows[n], element(n, base + v), [v])) for n in range(PAIR)]
            return with_local(
                [*rows, packed],
                [
                    *fill,
                    store(packed, self.dot.alternating(*(load(row, [ramp]) for row in rows)), [ramp]),
                    vector(count, lambda v: store(self.values, load(packed, [v]), [*place, base + v])),
                ],
            )

        columns = analysis.column.extent
        assert isinstance(columns, int)
        return tiles(columns, [lanes], some)

    def turn(self, turned: Var, turned_pairs: Var, queries: int) -> Stmt:
        """Return the rounding of queries [depth][queries] to pairs [depth / 2][queries]."""
        depth = self.analysis.depth.extent
        assert isinstance(depth, int)
        return loop(depth // PAIR, lambda pair: self.round_rows(turned, turned_pairs, pair, queries))

    def round_rows(self, source: Var, pairs: Var, number: Expr, queries: int) -> Stmt:
        """Return the rounding of two rows of `source` to row `number` of `pairs`."""

        def part(first: Expr) -> Stmt:
            at = tirx.Ramp(first, index(1), self.dot.lanes)
            rows = [load(source, [number * PAIR + n, at]) for n in range(PAIR)]
            return store(pairs, self.dot.alternating(*rows), [number, at])

        return unrolled(queries // self.dot.lanes, lambda n: part(n * self.dot.lanes))

    def scores(self, tile: Tile, turned_pairs: Var, point: Mapping[Var, Expr], key: Expr) -> Stmt:
        """Return the products of keys from `key` on, one a row, with a block of queries, added to a tile."""
        head = self.head(point)
        depth = self.analysis.depth.extent
        assert isinstance(depth, int)

        def pair(r: Expr, number: Expr) -> Expr:
            return load(self.keys, [head, key + r, number])

        def step(number: Expr, of_row: Callable[[Expr], Expr]) -> Stmt:
            return self._step(tile, (turned_pairs, number), of_row)

        return over_terms(depth // PAIR, self.dot.dot.at_once, tile[1], pair, step, self.dot.words)

    def weighted(
        self,
        tile: Tile,
        weights: Var,
        point: Mapping[Var, Expr],
        keys: tuple[Expr, Extent],
        column: Expr,
    ) -> Stmt:
        """Return the sums of columns, one a row, of the values of some keys, the first an even one, added to a tile."""
        head, (base, extent) = self.head(point), keys
        first = tirx.floordiv(base, index(PAIR))

        def step(number: Expr) -> Stmt:
            def pair(r: Expr) -> Expr:
                return load(self.values, [head, first + number, column + r])

            operand = (weights, number)
            return over_rows(
                tile[1], self.dot.dot.at_once, pair, lambda of_row: self._step(tile, operand, of_row), self.dot.words
            )

        return loop(ceiling(extent, PAIR), step)

    def _step(self, tile: Tile, operand: tuple[Var, Expr], pair: Callable[[Expr], Expr]) -> Stmt:
        """Return a step of a tile: a row of pairs of `operand` by one pair for each row of the tile."""
        registers, rows, queries = tile
        buffer, number = operand
        lanes = self.dot.lanes

        def update(r: Expr, part: int) -> Stmt:
            place = [tirx.Ramp(r * queries + part, index(1), lanes)]
            vectors = load(buffer, [number, tirx.Ramp(index(part), index(1), lanes)])
            return store(registers, self.dot.accumulate(load(registers, place), vectors, pair(r)), place)

        return unrolled(rows, lambda r: sequence([update(r, part) for part in range(0, queries, lanes)]))


def packed(dot: Bf16Pairs, analysis: AttentionAnalysis, target: Target) -> Pairs:
    """Return the packing of an attention's keys and values, once for each of the heads that differ in them."""
    read = [*variables_of(analysis.keys), *variables_of(analysis.values)]
    axes = tuple(axis for axis in analysis.outer if any(axis.variable.same_as(variable) for variable in read))
    shares = tuple(_neighbours(analysis, axis) for axis in axes)
    keys, depth, columns = analysis.key.extent, analysis.depth.extent, analysis.column.extent
    assert isinstance(depth, int)
    extents = _places(axes, shares)
    at_once = _at_once(analysis, axes, extents)
    owned = _owns_heads(analysis, extents, target)
    heads = 1 if owned else product([at_once, *extents[1:]])
    return Pairs(
        dot,
        analysis,
        axes,
        shares,
        local([heads, keys, depth // PAIR], "int32", "packed_keys"),
        local([heads, ceiling(keys, PAIR), columns], "int32", "packed_values"),
        at_once,
        owned,
    )


def _places(axes: Sequence[Axis], shares: Sequence[int]) -> list[Extent]:
    """Return how many keys and values there are along each axis, of which so many neighbours share theirs."""
    return [quotient(axis.extent, share) for axis, share in zip(axes, shares, strict=True)]


def _neighbours(analysis: AttentionAnalysis, axis: Axis) -> int:
    """Return how many neighbours along an axis have the same keys and values: g where they are read at axis // g."""
    if not isinstance(axis.extent, int):
        return 1
    occurrences, runs = 0, list[int]()

    def count(variable: Var) -> None:
        nonlocal occurrences
        occurrences += variable.same_as(axis.variable)

    def note(division: tirx.FloorDiv) -> None:
        length = as_int(division.b)
        if division.a.same_as(axis.variable) and length is not None and axis.extent % length == 0:
            runs.append(length)

    for read in (analysis.keys, analysis.values):
        tvm_ffi.structural_walk(read, [(Var, count), (tirx.FloorDiv, note)])
    return math.gcd(*runs) if runs and len(runs) == occurrences else 1


def _owns_heads(analysis: AttentionAnalysis, extents: Sequence[Extent], target: Target) -> bool:
    """Return whether there are many heads for each core, whose second-level cache holds one beside its queries."""
    heads = product(extents)
    elements = product([analysis.key.extent, analysis.depth.extent + analysis.column.extent])
    if not isinstance(heads, int) or not isinstance(elements, int):
        return False
    return heads >= HEADS_TO_OWN * target.cores and elements // PAIR * PAIR_BYTES <= target.caches.level2 // 2


def _at_once(analysis: AttentionAnalysis, axes: Sequence[Axis], extents: Sequence[Extent]) -> Extent:
    """Return how many places of the first of the heads' axes are packed at a time, if that is the first of all axes."""
    if not axes:
        return 1
    extent = extents[0]
    others = product([analysis.key.extent, *extents[1:]])
    if axes[0] is not analysis.outer[0] or not isinstance(extent, int) or not isinstance(others, int):
        return extent
    elements = analysis.depth.extent + analysis.column.extent
    most = PACKED_BYTES // (others * elements // PAIR * PAIR_BYTES)
    return max(part for part in range(1, extent + 1) if extent % part == 0 and part <= max(1, most))
