"""Instructions that add products of some neighbours of a reduction to each lane, by the types that they multiply."""

from __future__ import annotations

from typing import Protocol

from tvm import tirx
from tvm.ir import Expr, TensorLoad
from tvm.tirx.stmt import Stmt

from schedules.intrin.bf16_conversion import is_product_of_bf16
from schedules.intrin.bf16_dot import bf16_dot
from schedules.intrin.byte_dot import byte_dot, is_product_of_bytes
from targets.base import Target


class GroupedDot(Protocol):
    """The instruction of one target: `lanes` outputs at a time, `terms` neighbours of the reduction of each.

    Weights lie [..., lane, term], and those of all lanes are aligned to a vector. The neighbours in some vectors are
    `at_once`, where the instruction takes an element of one.
    """

    @property
    def lanes(self) -> int: ...

    @property
    def terms(self) -> int: ...

    @property
    def at_once(self) -> int: ...

    def accumulate(self, sums: Expr, weights: Expr, activations: Expr, terms: int) -> Expr:
        """Return the sums with the products of `terms` neighbours: no more are read of the activations.

        `weights` and `activations` are the reads of the first of all lanes' and of the neighbours.
        """
        ...

    def accumulate_group(self, sums: Expr, weights: Expr, group: Expr) -> Expr:
        """Return the sums with the products of as many neighbours as the instruction takes, which `groups` gave."""
        ...

    def groups(self, activations: Expr, count: int) -> Expr:
        """Return one group of neighbours or a vector of at most `at_once`, from the one on that begins at a read."""
        ...

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the instruction, with what it needs."""
        ...


def grouped_dot(target: Target, weights: TensorLoad, term: Expr) -> GroupedDot | None:
    """Return the instruction that adds terms like `term`, a product with a read of weights; None where there is none.

    It is one for the target and the operands' types, whatever their layout.
    """
    if is_product_of_bf16(term):
        return bf16_dot(target)
    if is_product_of_bytes(term):
        other = next((side.value for side in (term.a, term.b) if not side.value.same_as(weights)), None)
        return None if other is None else byte_dot(target, str(other.source.dtype), str(weights.source.dtype))
    return None


def is_grouped_term(term: Expr) -> bool:
    """Return whether some target has an instruction for a sum of terms like this."""
    return isinstance(term, tirx.Mul) and (is_product_of_bf16(term) or is_product_of_bytes(term))
