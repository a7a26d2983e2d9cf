"""Calls of LLVM's intrinsics on vectors."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    """Return the call of an intrinsic without side effects."""
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


def unpacked(packed: Expr, bits: int, lanes: int) -> list[Expr]:
    """Return the unsigned codes in a vector of bytes, of each byte the lower one first, as bytes of int32 lanes."""
    words = tirx.reinterpret(f"int32x{lanes}", packed)
    if bits == 8:
        return [words]
    mask = splat(0x0F0F0F0F, lanes)
    return [tirx.bitwise_and(words, mask), tirx.bitwise_and(tirx.shift_right(words, splat(4, lanes)), mask)]


def splat(value: Expr | int, lanes: int) -> Expr:
    """Return an int32 in every lane of a vector."""
    return tirx.Broadcast(tirx.const(value, "int32") if isinstance(value, int) else value, lanes)


def broadcast_bytes(read: Callable[[int, int], Expr], k: int, lanes: int) -> Expr:
    """Return four bytes from `k` on, which `read` gives by the first and how many, in every int32 lane of a vector."""
    return splat(tirx.reinterpret("int32", read(k, 4)), lanes)
