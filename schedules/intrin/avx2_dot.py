"""AVX2: vpmaddubsw adds pairs of products of unsigned with signed bytes in 16 bits, vpmaddwd pairs of those in 32.

The 16-bit sums saturate: codes of 4 bits times activations of magnitude 127 leave room for eight steps (8 * 2 * 15 *
127 < 2 ** 15), a group of 32. Codes of 8 bits are taken as two of 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.fixed_order import in_order, with_fixed_order
from schedules.intrin.llvm_call import broadcast_bytes, intrinsic, splat, unpacked
from targets.base import Target

_NIBBLES = 0x0F0F0F0F


@dataclass(frozen=True)
class Avx2Dot:
    """8 outputs at a time, four neighbours of K, groups of at most 32."""

    bits: int
    lanes = 8
    reduction = 4
    unit = 1.0
    center = 0

    @property
    def panel_tile(self) -> tuple[int, int] | None:
        """Eight sums of 16 bits, four vectors of codes, and activations fit the registers; codes of 8 bits do not."""
        return (2, 4) if self.bits == 4 else None

    def unpack(self, packed: Expr, bits: int) -> list[Expr]:
        """Take the codes as they are."""
        return unpacked(packed, bits, self.lanes)

    def start(self, offset: Expr) -> list[Expr]:
        """Start from the offset modulo 2 ** 16, in the first pair of each lane.

        Sums of a group are then less than 2 ** 15: 16 * 8 * 127 of the pair, and as much of the other one's offset.
        Those of codes of 8 bits would not be, which start from zero.
        """
        if self.bits == 4:
            low = tirx.bitwise_and(offset, tirx.const(0xFFFF, "int32"))
            return [tirx.reinterpret("int16x16", splat(low, self.lanes))]
        return [tirx.Broadcast(tirx.const(0, "int16"), 16)] * (self.bits // 4)

    def activations(self, read: Callable[[int, int], Expr], k: int) -> Expr:
        """Broadcast four bytes."""
        return broadcast_bytes(read, k, self.lanes)

    def accumulate(self, accumulator: Sequence[Expr], codes: Expr, activations: Expr) -> list[Expr]:
        """Add the products of each half of the codes."""
        halves = [codes]
        if self.bits == 8:
            high = tirx.shift_right(codes, splat(4, self.lanes))
            halves = [tirx.bitwise_and(half, splat(_NIBBLES, self.lanes)) for half in (codes, high)]
        x = tirx.reinterpret("int8x32", activations)
        return [
            total + intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", tirx.reinterpret("int8x32", half), x)
            for total, half in zip(accumulator, halves, strict=True)
        ]

    def in_steps(self, accumulator: Sequence[Expr]) -> list[Expr]:
        """Fix the order of sums: eight steps of one cell after the other would take the registers of codes."""
        return [in_order(total) for total in accumulator]

    def with_steps(self, statement: Stmt, target: Target) -> Stmt:
        """Return the statement with what fixes the order."""
        return with_fixed_order(statement, target)

    def total(self, accumulator: Sequence[Expr], offset: Expr) -> Expr:
        """Return the pairs' sums, the higher half weighted by 16, and the offset where they lack it."""
        result = splat(0 if self.bits == 4 else offset, self.lanes)
        for number, pairs in enumerate(accumulator):
            weights = tirx.Broadcast(tirx.const(16**number, "int16"), 16)
            result = result + intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, weights)
        return tirx.Cast("float32x8", result)
