"""Arm's dot product extension: sdot adds four products of signed bytes to each of four sums of 32 bits, exactly.

Codes lie in memory as signed numbers. Those of 4 bits are multiplied in the upper half of a byte, as 16 times
themselves, so that each takes one instruction to unpack; the conversion of a sum to a float takes fraction bits.

A sum of codes of 8 bits becomes a float without a conversion, which takes two steps of one pipeline for a vector: it
starts from the bits of 24, the last of which counts 2**-19, and is at last a float that is larger by 24 (Hacker's
Delight, 17-1, on conversions by addition). 24 takes an instruction and no register; 1.5 * 2**23, whose last bit counts
units, takes a register that there is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_call import intrinsic, splat
from targets.base import Target

# Bytes of a vector: activations are loaded whole, and sdot takes four of them by their place.
_BYTES = 16
_NIBBLE_BITS = 4
# Between 16 and 32 bits count 2**-19, and the middle leaves 2**22 of them to either side: enough for sums of 128
# products of signed bytes, each with its offset. Groups of activations are no longer than 32.
_ORIGIN, _ORIGIN_UNIT = 24.0, 2.0**-19


@dataclass(frozen=True)
class ArmDot:
    """4 outputs at a time, four neighbours of K."""

    bits: int
    lanes = 4
    reduction = 4
    panel_tile = None

    @property
    def center(self) -> int:
        """The middle of the codes, which signed ones have as zero."""
        return 1 << (self.bits - 1)

    def unpack(self, packed: Expr, bits: int) -> list[Expr]:
        """Move each code to the upper end of a byte."""
        if bits == 8:
            return [tirx.reinterpret("int32x4", packed)]
        four, upper = (tirx.Broadcast(tirx.const(value, "uint8"), _BYTES) for value in (_NIBBLE_BITS, 0xF0))
        codes = (tirx.shift_left(packed, four), tirx.bitwise_and(packed, upper))
        return [tirx.reinterpret("int32x4", each) for each in codes]

    @property
    def unit(self) -> float:
        """What `total` makes of a sum of one."""
        return _ORIGIN_UNIT if self.bits == 8 else 1.0

    def start(self, offset: Expr) -> list[Expr]:
        """Start from the offset."""
        if self.bits == 8:
            return [splat(offset + int(np.float32(_ORIGIN).view(np.int32)), self.lanes)]
        return [splat(offset * (1 << _NIBBLE_BITS), self.lanes)]

    def activations(self, read: Callable[[int, int], Expr], k: int) -> Expr:
        """Take four bytes out of a vector, which the instruction does by itself."""
        first = k - k % _BYTES
        words = tirx.reinterpret("int32x4", read(first, _BYTES))
        return tirx.Shuffle([words], [tirx.const((k - first) // 4, "int32")] * self.lanes)

    def accumulate(self, accumulator: Sequence[Expr], codes: Expr, activations: Expr) -> list[Expr]:
        """Add the products with one instruction."""
        operands = (tirx.reinterpret("int8x16", codes), tirx.reinterpret("int8x16", activations))
        return [intrinsic("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", accumulator[0], *operands)]

    def in_steps(self, accumulator: Sequence[Expr]) -> list[Expr]:
        """Return the accumulator: an instruction adds its products itself."""
        return list(accumulator)

    def with_steps(self, statement: Stmt, target: Target) -> Stmt:
        """Return the statement: nothing is needed."""
        return statement

    def total(self, accumulator: Sequence[Expr], offset: Expr) -> Expr:
        """Convert the sums."""
        if self.bits == 8:
            numbers = tirx.reinterpret("float32x4", accumulator[0])
            return numbers - tirx.Broadcast(tirx.const(_ORIGIN, "float32"), self.lanes)
        name = "llvm.aarch64.neon.vcvtfxs2fp.v4f32.v4i32"
        return intrinsic("float32x4", name, accumulator[0], tirx.const(_NIBBLE_BITS, "int32"))
