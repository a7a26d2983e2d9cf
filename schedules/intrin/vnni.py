"""VNNI: vpdpbusd adds four products of unsigned with signed bytes to each sum of 32 bits, exactly.

AVX-512 VNNI has it for 16 sums, AVX-VNNI for 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.fixed_order import with_fixed_order
from schedules.intrin.llvm_call import broadcast_bytes, intrinsic, splat, unpacked
from targets.base import Target

# Of vectors of 256 bits, of which there are 16.
FEW_LANES = 8


@dataclass(frozen=True)
class Vnni:
    """`lanes` outputs at a time, 16 or 8, four neighbours of K."""

    lanes: int
    reduction = 4
    unit = 1.0
    center = 0

    @property
    def panel_tile(self) -> tuple[int, int] | None:
        """With 16 registers eight sums, two vectors of codes and activations: there is no place to unpack codes."""
        return (4, 2) if self.lanes == FEW_LANES else None

    def unpack(self, packed: Expr, bits: int) -> list[Expr]:
        """Take the codes as they are."""
        return unpacked(packed, bits, self.lanes)

    def start(self, offset: Expr) -> list[Expr]:
        """Start from the offset, which costs nothing."""
        return [splat(offset, self.lanes)]

    def activations(self, read: Callable[[int, int], Expr], k: int) -> Expr:
        """Broadcast four bytes."""
        return broadcast_bytes(read, k, self.lanes)

    def accumulate(self, accumulator: Sequence[Expr], codes: Expr, activations: Expr) -> list[Expr]:
        """Add the products with one instruction."""
        operands = [tirx.reinterpret(f"int8x{4 * self.lanes}", each) for each in (codes, activations)]
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        return [intrinsic(f"int32x{self.lanes}", name, accumulator[0], *operands)]

    def in_steps(self, accumulator: Sequence[Expr]) -> list[Expr]:
        """Return the accumulator: an instruction adds its products itself."""
        return list(accumulator)

    def with_steps(self, statement: Stmt, target: Target) -> Stmt:
        """Return the statement, with what panels call where there are any."""
        return statement if self.panel_tile is None else with_fixed_order(statement, target)

    def total(self, accumulator: Sequence[Expr], offset: Expr) -> Expr:
        """Return the sums."""
        return tirx.Cast(f"float32x{self.lanes}", accumulator[0])
