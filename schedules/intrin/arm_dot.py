"""Arm's dot product extension: sdot adds four products of signed bytes to each of four sums of 32 bits, exactly.

Codes are unsigned: those of 8 bits, which would not fit, are taken as two of 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr

from schedules.intrin.llvm_call import intrinsic, splat


@dataclass(frozen=True)
class ArmDot:
    """4 outputs at a time, four neighbours of K; codes of 8 bits as two of 4 bits."""

    bits: int
    lanes = 4
    reduction = 4

    def start(self, offset: Expr) -> list[Expr]:
        """Start from the offset; the high halves of codes of 8 bits are summed apart."""
        return [splat(offset, self.lanes), *[splat(0, self.lanes)] * (self.bits // 4 - 1)]

    def accumulate(self, accumulator: Sequence[Expr], codes: Expr, activations: Expr) -> list[Expr]:
        """Add the products with one instruction to four bits of the codes."""
        halves = [codes]
        if self.bits == 8:
            high = tirx.shift_right(codes, splat(4, self.lanes))
            halves = [tirx.bitwise_and(half, splat(0x0F0F0F0F, self.lanes)) for half in (codes, high)]
        x = tirx.reinterpret("int8x16", splat(activations, self.lanes))
        return [
            intrinsic("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, tirx.reinterpret("int8x16", half), x)
            for total, half in zip(accumulator, halves, strict=True)
        ]

    def total(self, accumulator: Sequence[Expr], offset: Expr) -> Expr:
        """Return the sums, those of the high halves weighted by 16."""
        low, *high = accumulator
        return low + high[0] * splat(16, self.lanes) if high else low
