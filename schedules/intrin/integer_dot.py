"""Integer dot products of weight codes with broadcast activations, by the instruction set that a target has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.arm_dot import ArmDot
from schedules.intrin.avx2_dot import Avx2Dot
from schedules.intrin.vnni import Vnni
from targets.base import Target


class IntegerDot(Protocol):
    """Sums of products of codes with signed bytes, for `lanes` outputs at a time.

    An accumulator is a list of vectors. `reduction` is how many neighbours of K a lane takes at once. `panel_tile` is
    the rows and vectors of a tile that reads unpacked codes from memory, None where each tile unpacks them itself.
    `center` is what is taken from each code before it is multiplied. `unit`, a power of two, is what `total` makes of
    a sum of one.
    """

    reduction: int

    @property
    def lanes(self) -> int: ...

    @property
    def panel_tile(self) -> tuple[int, int] | None: ...

    @property
    def center(self) -> int: ...

    @property
    def unit(self) -> float: ...

    def unpack(self, packed: Expr, bits: int) -> list[Expr]:
        """Return the codes of `bits` bits in a vector of bytes: bytes, as int32 lanes, in the order of K."""
        ...

    def start(self, offset: Expr) -> list[Expr]:
        """Return an accumulator; `offset` is an int32 that `total` has in every lane."""
        ...

    def activations(self, read: Callable[[int, int], Expr], k: int) -> Expr:
        """Return the activations from the constant `k` on in every lane: `read` gives a vector of int8 of a group.

        `read` takes the first element and how many.
        """
        ...

    def accumulate(self, accumulator: Sequence[Expr], codes: Expr, activations: Expr) -> list[Expr]:
        """Return the accumulator with the products of `codes` and `activations`, both bytes as int32 lanes."""
        ...

    def in_steps(self, accumulator: Sequence[Expr]) -> list[Expr]:
        """Return the accumulator as one that LLVM has to know before it adds the products of the next step."""
        ...

    def with_steps(self, statement: Stmt, target: Target) -> Stmt:
        """Return a statement that calls `in_steps`, with what that needs."""
        ...

    def total(self, accumulator: Sequence[Expr], offset: Expr) -> Expr:
        """Return the sums of the lanes as float32, times `unit`."""
        ...


def integer_dot(target: Target, bits: int) -> IntegerDot | None:
    """Return the dot product for weights of `bits` bits on a CPU target, None where there is none."""
    if target.device != "cpu":
        return None
    if target.has_vnni:
        return Vnni(target.vector_lanes(32))
    if "avx2" in target.features:
        return Avx2Dot(bits)
    if "asimddp" in target.features:
        return ArmDot(bits)
    return None
