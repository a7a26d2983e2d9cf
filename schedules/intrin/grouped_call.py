"""Calls of the functions in LLVM's language that add products of some neighbours of a reduction to each lane."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import imported


@dataclass(frozen=True)
class GroupedDot:
    """The instruction of one target: `lanes` outputs at a time, `terms` neighbours of the reduction of each.

    `source` defines `call`, which adds to sums of the type `total`, and functions that read activations: `read`_n
    fewer neighbours than `terms` or as many, `read`_vector_n so many groups of `terms`. Weights lie [..., lane, term],
    and those of all lanes are aligned to a vector. The neighbours in some vectors are `at_once`, where the instruction
    takes an element of one.
    """

    lanes: int
    terms: int
    total: str
    call: str
    read: str
    source: str
    at_once: int

    def accumulate(self, sums: Expr, weights: Expr, activations: Expr, terms: int) -> Expr:
        """Return sums[l] + the sum of w[l][k] * x[k] over `terms` neighbours: no more are read of the activations.

        `weights` and `activations` are the reads of the first of all lanes' and of the neighbours.
        """
        return self.accumulate_group(sums, weights, self._neighbours(activations, terms))

    def accumulate_group(self, sums: Expr, weights: Expr, group: Expr) -> Expr:
        """Return the same with as many neighbours as the instruction takes, which `groups` gave."""
        return tirx.call_extern(f"{self.total}x{self.lanes}", self.call, sums, tirx.address_of(weights), group)

    def groups(self, activations: Expr, count: int) -> Expr:
        """Return one group of neighbours or a vector of at most `at_once`, from the one on that begins at a read."""
        if count == 1:
            return self._neighbours(activations, self.terms)
        return tirx.call_extern(f"int32x{count}", f"{self.read}_vector_{count}", tirx.address_of(activations))

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the functions, with the functions."""
        return imported(statement, self.source)

    def _neighbours(self, activations: Expr, count: int) -> Expr:
        return tirx.call_extern("int32", f"{self.read}_{count}", tirx.address_of(activations))
