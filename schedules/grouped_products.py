"""The step of a register tile whose instructions add products of some neighbours of the reduction to each sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.grouped_call import GroupedDot
from schedules.loops import index, load, store, unrolled
from schedules.stages import sequence, substitute


@dataclass(frozen=True, eq=False)
class GroupedProducts:
    """The operands of a product that an instruction takes `dot.terms` neighbours of the reduction at once of."""

    dot: GroupedDot
    weights: TensorLoad
    activations: TensorLoad

    def step(
        self,
        registers: Var,
        shape: tuple[int, int],
        at: Callable[[Expr, Expr], Mapping[Var, Expr]],
        terms: int,
        group_of: Callable[[Expr], Expr] | None = None,
    ) -> Stmt:
        """Return the step of a tile of `shape` rows by lanes that adds `terms` terms of the reduction to each sum.

        At the end of a reduction there may be fewer than the instruction takes: past them the weights are zero.
        `group_of` gives the activations of a row, where they were loaded before.
        """
        rows, pitch = shape
        lanes = self.dot.lanes

        def update(r: Expr, v: int) -> Stmt:
            place = [tirx.Ramp(r * pitch + v, index(1), lanes)]
            point = at(r, index(v))
            sums, weights = load(registers, place), substitute(self.weights, point)
            if group_of is not None:
                return store(registers, self.dot.accumulate_group(sums, weights, group_of(r)), place)
            activations = substitute(self.activations, point)
            return store(registers, self.dot.accumulate(sums, weights, activations, terms), place)

        return unrolled(rows, lambda r: sequence([update(r, v) for v in range(0, pitch, lanes)]))
