"""The matrix products of Winograd's filtering: register tiles of blocks of output channels by tiles of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.by_element import over_terms
from schedules.intrin.bf16_dot import PAIR
from schedules.intrin.bf16_pairs import Bf16Pairs
from schedules.intrin.grouped_call import GroupedDot
from schedules.loops import LINE_BITS, index, load, local, loop, prefetch, store, tiles, unrolled, vector, with_local
from schedules.stages import sequence
from schedules.winograd_structure import WinogradAnalysis

# How far ahead weights are asked for: they come from memory, a line for each step, which takes some 26 cycles.
LINES_AHEAD = 48


@dataclass(frozen=True)
class NarrowProducts:
    """Products of pairs: a target's dot product of them, and how it rounds to those of bfloat16; words are exact."""

    dot: GroupedDot
    pairs: Bf16Pairs | None = None

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the functions, with the functions."""
        return self.dot.imported(statement) if self.pairs is None else self.pairs.imported(statement)


@dataclass(frozen=True)
class Factors:
    """The `spectrum` of `width` tiles of the image, [window^2, width, channels] or pairs of bfloat16, and the weights.

    Register tiles have `columns` tiles; `terms_at_once` elements of a tile's channels are loaded together.
    """

    analysis: WinogradAnalysis
    spectrum: Var
    width: int
    columns: int
    terms_at_once: int
    rounded: NarrowProducts | None

    def multiply(self, products: Var, block: Expr, count: int) -> Stmt:
        """Return the matrix products of `count` blocks of output channels, one frequency after the other."""

        def frequency(number: Expr) -> Stmt:
            return tiles(
                self.width, [self.columns], lambda tile, n: self._register_tile(products, block, count, number, tile, n)
            )

        return loop(self.analysis.transforms.window**2, frequency)

    def _register_tile(self, products: Var, block: Expr, count: int, frequency: Expr, tile: Expr, columns: int) -> Stmt:
        lanes = self.analysis.block
        sums = local([columns * count * lanes], self.analysis.total, "accumulators")

        def cells(element: Callable[[Expr, Expr, Expr], Stmt]) -> Stmt:
            return unrolled(columns, lambda t: unrolled(count, lambda o: vector(lanes, lambda v: element(t, o, v))))

        def at(t: Expr, o: Expr, v: Expr) -> Expr:
            return (t * count + o) * lanes + v

        rounded, apart = self.rounded, PAIR if self.analysis.in_words else 1

        def image(t: Expr, step: Expr) -> Expr:
            return load(self.spectrum, [frequency, tile + t, step * apart])

        def step(channel: Expr, image_of: Callable[[Expr], Expr]) -> Stmt:
            if rounded is not None:
                return self._step_of_pairs(rounded, sums, (columns, count), (block, frequency, channel), image_of)

            def add(t: Expr, o: Expr, v: Expr) -> Stmt:
                weight = load(self.analysis.weights, [block + o, frequency, channel, v])
                return store(sums, load(sums, [at(t, o, v)]) + image_of(t) * weight, [at(t, o, v)])

            return cells(add)

        def ahead(channel: Expr, image_of: Callable[[Expr], Expr]) -> Stmt:
            return sequence([*self._weights_ahead(block, count, frequency, channel), step(channel, image_of)])

        depth, at_once, groups = self.analysis.channels, self.terms_at_once, None
        if rounded is not None:
            depth, at_once, groups = depth // PAIR, rounded.dot.at_once, rounded.dot.groups
        return with_local(
            [sums],
            [
                cells(lambda t, o, v: store(sums, tirx.const(0, self.analysis.total), [at(t, o, v)])),
                over_terms(depth, at_once, columns, image, ahead, groups),
                cells(lambda t, o, v: store(products, load(sums, [at(t, o, v)]), [frequency, o, tile + t, v])),
            ],
        )

    def _weights_ahead(self, block: Expr, count: int, frequency: Expr, step: Expr) -> list[Stmt]:
        """Return requests for the weights of a later step, of this frequency or the next, where each takes a line."""
        weights = self.analysis.weights
        bits = self.analysis.block * weights.dtype.bits * (PAIR if self.analysis.in_pairs else 1)
        if bits < LINE_BITS:
            return []
        within = [index(0)] * (len(weights.shape) - 3)
        return [prefetch(load(weights, [block + o, frequency, step + LINES_AHEAD, *within])) for o in range(count)]

    def _step_of_pairs(
        self,
        rounded: NarrowProducts,
        sums: Var,
        shape: tuple[int, int],
        place: tuple[Expr, Expr, Expr],
        image_of: Callable[[Expr], Expr],
    ) -> Stmt:
        """Return the step of a register tile of `shape` by two channels; its weights are at block, frequency, pair."""
        (columns, count), (block, frequency, pair) = shape, place

        def add(t: Expr, o: Expr) -> Stmt:
            at = [tirx.Ramp((t * count + o) * self.analysis.block, index(1), self.analysis.block)]
            weight = load(self.analysis.weights, [block + o, frequency, pair, index(0), index(0)])
            return store(sums, rounded.dot.accumulate_group(load(sums, at), weight, image_of(t)), at)

        return unrolled(columns, lambda t: unrolled(count, lambda o: add(t, o)))
