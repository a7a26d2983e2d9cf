from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from tvm.relax import op

from passes.base import Refusal
from passes.rule_pass import MOST_ROUNDS, RulePass
from tests.passes.graph import graph
from tests.passes.relax_modules import operators


def _to(name: str):
    return lambda call, _: getattr(op, name)(call.args[0])


@dataclass(frozen=True)
class _Chain(RulePass):
    """exp -> sin -> cos, in rounds of their own; the first rule that applies counts."""

    name: ClassVar[str] = "chain"
    rules: ClassVar = {"relax.exp": (lambda call, _: None, _to("sin"), _to("tan")), "relax.sin": (_to("cos"),)}


@dataclass(frozen=True)
class _Endless(RulePass):
    name: ClassVar[str] = "endless"
    rules: ClassVar = {"relax.exp": (_to("sin"),), "relax.sin": (_to("exp"),)}


@dataclass(frozen=True)
class _Refusing(_Chain):
    def check(self, match, dataflow) -> None:
        if match.op.name == "relax.cos":
            raise Refusal("no cosines")


def test_rules_are_applied_until_none_fires() -> None:
    outcome = _Chain().run(graph(lambda x: op.exp(op.exp(x)), (2,)))
    assert operators(outcome.module) == ["relax.cos", "relax.cos"]
    assert [site.refusal for site in outcome.sites] == [None] * 4


def test_of_the_refusals_those_of_the_last_round_count() -> None:
    outcome = _Refusing().run(graph(op.exp, (2,)))
    assert operators(outcome.module) == ["relax.sin"]
    assert [site.refusal for site in outcome.sites] == [None, "no cosines"]


def test_what_no_rule_is_for_is_no_site() -> None:
    assert _Chain().run(graph(op.negative, (2,))).sites == ()


def test_rules_that_undo_each_other_are_a_mistake() -> None:
    with pytest.raises(RuntimeError, match=rf"^the rules of endless still fire after {MOST_ROUNDS} rounds$"):
        _Endless().run(graph(op.exp, (2,)))
