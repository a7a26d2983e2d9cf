"""Arm's dot product extension: sdot adds four products of signed bytes to each of four sums of 32 bits, exactly.

Codes are unsigned: 128 is taken from those of 8 bits, which would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr

from schedules.intrin.llvm_call import intrinsic, splat

_SIGN_BITS = -0x7F7F7F80
# Bytes of a vector: activations are loaded whole, and sdot takes four of them by their place.
_BYTES = 16


@dataclass(frozen=True)
class ArmDot:
    """4 outputs at a time, four neighbours of K."""

    bits: int
    lanes = 4
    reduction = 4
    shifts_bytes = True

    @property
    def center(self) -> int:
        """The half of codes of 8 bits, whose sign bit is turned."""
        return 128 if self.bits == 8 else 0

    def start(self, offset: Expr) -> list[Expr]:
        """Start from the offset."""
        return [splat(offset, self.lanes)]

    def activations(self, read: Callable[[int, int], Expr], k: int) -> Expr:
        """Take four bytes out of a vector, which the instruction does by itself."""
        first = k - k % _BYTES
        words = tirx.reinterpret("int32x4", read(first, _BYTES))
        return tirx.Shuffle([words], [tirx.const((k - first) // 4, "int32")] * self.lanes)

    def accumulate(self, accumulator: Sequence[Expr], codes: Expr, activations: Expr) -> list[Expr]:
        """Add the products with one instruction."""
        signed = tirx.bitwise_xor(codes, splat(_SIGN_BITS, self.lanes)) if self.bits == 8 else codes
        operands = (tirx.reinterpret("int8x16", signed), tirx.reinterpret("int8x16", activations))
        return [intrinsic("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", accumulator[0], *operands)]

    def total(self, accumulator: Sequence[Expr], offset: Expr) -> Expr:
        """Return the sums."""
        return accumulator[0]
