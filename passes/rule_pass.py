"""Passes that are tables of rewrite rules, applied until none of them fires any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic

import tvm
import tvm.ir
from tvm import relax

from passes.base import Dataflow, Match, PassOutcome, PatternPass, Site, canonical

# Every rule makes an expression smaller or moves one operator one step; a longer run means rules that undo each other.
MOST_ROUNDS = 100

# What takes a call's place, or None where the rule does not apply.
Rule = Callable[[tvm.ir.Call, Dataflow], relax.Expr | None]


@dataclass(frozen=True)
class RepeatedPass(PatternPass[Match], Generic[Match]):
    """A pass whose rewriting makes new sites for itself: it runs until there are none, so that it is idempotent."""

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite until nothing is left to rewrite; of the refusals those of the last round count."""
        sites: list[Site] = []
        for _ in range(MOST_ROUNDS):
            outcome = super().run(module)
            if not outcome.rewritten:
                return PassOutcome(module, (*sites, *outcome.sites))
            # An output that became a constant leaves a binding that nobody reads.
            module = canonical(outcome.module)
            sites.extend(site for site in outcome.sites if site.refusal is None)
        raise RuntimeError(f"the rules of {self.name} still fire after {MOST_ROUNDS} rounds")


@dataclass(frozen=True)
class RulePass(RepeatedPass[relax.Expr]):
    """A pass that asks the rules for an expression's operator one after the other; the first that applies counts."""

    rules: ClassVar[Mapping[str, tuple[Rule, ...]]]

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> relax.Expr | None:
        """Return what the first rule puts in the place of `expr`."""
        if not isinstance(expr, tvm.ir.Call) or not isinstance(expr.op, tvm.ir.Op):
            return None
        replacements = (rule(expr, dataflow) for rule in self.rules.get(expr.op.name, ()))
        return next((replacement for replacement in replacements if replacement is not None), None)

    def check(self, match: relax.Expr, dataflow: Dataflow) -> None:
        """Accept: a rule applies only where it may."""

    def rewrite(self, match: relax.Expr) -> relax.Expr:
        """Return what the rule gave."""
        return match
