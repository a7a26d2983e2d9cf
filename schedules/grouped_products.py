"""The step of a register tile whose instructions add products of some neighbours of the reduction to each sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.byte_dot import FOURS, ByteDot
from schedules.intrin.grouped_dot import GroupedDot
from schedules.loops import index, load, local, store, unrolled, with_local
from schedules.stages import sequence, substitute

# The axes' values at a row and a lane, and at a step of the reduction beyond the first.
Place = Callable[[Expr, Expr, int], Mapping[Var, Expr]]


@dataclass(frozen=True, eq=False)
class GroupedProducts:
    """The operands of a product that an instruction takes `dot.terms` neighbours of the reduction at once of.

    `by_element` is whether the instruction takes the activations out of a vector at no cost.
    """

    dot: GroupedDot
    weights: TensorLoad
    activations: TensorLoad
    by_element: bool = False

    @property
    def together(self) -> int:
        """How many steps have their activations by one load."""
        return FOURS if self.by_element and isinstance(self.dot, ByteDot) else 1

    def steps(self, registers: Var, shape: tuple[int, int], at: Place, count: int) -> Stmt:
        """Return `count` steps of a tile of `shape` rows by lanes, of `dot.terms` terms of the reduction each."""
        dot, (rows, _) = self.dot, shape
        if count == 1 or count != self.together or not isinstance(dot, ByteDot):
            return sequence([self.step(registers, shape, at, dot.terms, number) for number in range(count)])
        held = local([rows * count], "int32", "fours")

        def fetch(r: Expr) -> Stmt:
            fours = dot.fours(substitute(self.activations, at(r, index(0), 0)))
            return store(held, fours, [tirx.Ramp(r * count, index(1), count)])

        def add(number: int) -> Stmt:
            def product(sums: Expr, r: Expr, weights: Expr) -> Expr:
                return dot.accumulate_four(sums, weights, load(held, [r * count + number]))

            return self._each(registers, shape, lambda r, v: at(r, v, number), product)

        return with_local([held], [unrolled(rows, fetch), *map(add, range(count))])

    def step(self, registers: Var, shape: tuple[int, int], at: Place, terms: int, number: int = 0) -> Stmt:
        """Return step `number`, which adds `terms` terms of the reduction to each sum.

        At the end of a reduction there may be fewer than the instruction takes: past them the weights are zero.
        """

        def product(sums: Expr, r: Expr, weights: Expr) -> Expr:
            return self.dot.accumulate(sums, weights, substitute(self.activations, at(r, index(0), number)), terms)

        return self._each(registers, shape, lambda r, v: at(r, v, number), product)

    def _each(
        self,
        registers: Var,
        shape: tuple[int, int],
        at: Callable[[Expr, Expr], Mapping[Var, Expr]],
        product: Callable[[Expr, Expr, Expr], Expr],
    ) -> Stmt:
        """Return the statement for each vector of sums, which `product` makes of the sums, the row and the weights."""
        rows, pitch = shape
        lanes = self.dot.lanes

        def update(r: Expr, v: int) -> Stmt:
            place = [tirx.Ramp(r * pitch + v, index(1), lanes)]
            weights = substitute(self.weights, at(r, index(v)))
            return store(registers, product(load(registers, place), r, weights), place)

        return unrolled(rows, lambda r: sequence([update(r, v) for v in range(0, pitch, lanes)]))
