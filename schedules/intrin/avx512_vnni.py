"""AVX-512 VNNI: vpdpbusd adds four products of unsigned with signed bytes to each of 16 sums of 32 bits, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_call import broadcast_bytes, intrinsic, splat, unpacked
from targets.base import Target


class Avx512Vnni:
    """16 outputs at a time, four neighbours of K."""

    lanes = 16
    reduction = 4
    unit = 1.0
    center = 0
    panel_tile = None

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
        operands = (tirx.reinterpret("int8x64", codes), tirx.reinterpret("int8x64", activations))
        return [intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", accumulator[0], *operands)]

    def in_steps(self, accumulator: Sequence[Expr]) -> list[Expr]:
        """Return the accumulator: an instruction adds its products itself."""
        return list(accumulator)

    def with_steps(self, statement: Stmt, target: Target) -> Stmt:
        """Return the statement: nothing is needed."""
        return statement

    def total(self, accumulator: Sequence[Expr], offset: Expr) -> Expr:
        """Return the sums."""
        return tirx.Cast("float32x16", accumulator[0])
