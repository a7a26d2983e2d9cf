"""The step of a register tile whose instructions add products of two neighbours of the reduction, as bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.bf16_dot import Bf16Dot
from schedules.loops import index, load, store, unrolled
from schedules.stages import sequence, substitute


@dataclass(frozen=True, eq=False)
class PairProducts:
    """The operands of a product that an instruction takes two neighbours of the reduction at once of."""

    dot: Bf16Dot
    weights: TensorLoad
    activations: TensorLoad

    def step(self, registers: Var, shape: tuple[int, int], at: Callable[[Expr, Expr], Mapping[Var, Expr]]) -> Stmt:
        """Return the step of a tile of `shape` rows by lanes that adds two terms of the reduction to each sum."""
        rows, pitch = shape
        lanes = self.dot.lanes

        def update(r: Expr, v: int) -> Stmt:
            place = [tirx.Ramp(r * pitch + v, index(1), lanes)]
            point = at(r, index(v))
            weights, activations = substitute(self.weights, point), substitute(self.activations, point)
            return store(registers, self.dot.accumulate(load(registers, place), weights, activations), place)

        return unrolled(rows, lambda r: sequence([update(r, v) for v in range(0, pitch, lanes)]))
