from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tvm
import tvm.ir
from tvm import relax
from tvm.relax import op

from passes.base import Dataflow, PassOutcome, PatternPass, Refusal, Site, require
from passes.provenance import annotate
from tests.passes.graph import graph
from tests.passes.relax_modules import operators


@dataclass(frozen=True)
class _Exponential:
    parts: tuple[list[relax.Expr], str]

    @property
    def argument(self) -> relax.Expr:
        return self.parts[0][0]


@dataclass(frozen=True)
class _Doubled(PatternPass[_Exponential]):
    """exp(x) -> x + x, but of no exponential."""

    name: ClassVar[str] = "doubled"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> _Exponential | None:
        call = dataflow.call(expr, "relax.exp")
        return None if call is None else _Exponential(([call.args[0]], "x"))

    def check(self, match: _Exponential, dataflow: Dataflow) -> None:
        require(dataflow.call(match.argument, "relax.exp") is None, "of an exponential")

    def rewrite(self, match: _Exponential) -> relax.Expr:
        return op.add(match.argument, match.argument)


def test_a_condition_that_holds_refuses_nothing() -> None:
    require(True, "no")
    with pytest.raises(Refusal, match=r"^no$"):
        require(False, "no")


def test_every_match_is_recorded_as_rewritten_or_refused() -> None:
    outcome = _Doubled().run(graph(lambda x: op.exp(op.exp(op.tanh(x))), (2,)))
    assert operators(outcome.module) == ["relax.tanh", "relax.add", "relax.exp"]
    assert [site.refusal for site in outcome.sites] == [None, "of an exponential"]
    assert len({site.location for site in outcome.sites}) == 2
    assert outcome.rewritten == 1
    assert PassOutcome(outcome.module).sites == ()


def test_sites_carry_the_nodes_of_all_that_they_consist_of() -> None:
    module = graph(lambda x: op.exp(op.tanh(x)), (2,))
    first, second = (binding.var for binding in module["main"].body.blocks[0].bindings)
    module = annotate(module, {first: ("first",), second: ("second",)})
    assert _Doubled().run(module).sites == (Site(second.name, None, ("first", "second")),)


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_only_the_first_sites_are_rewritten_where_asked(most: int) -> None:
    module = graph(lambda x: [op.exp(x), op.exp(op.tanh(x)), op.exp(op.sin(x))], (2,))
    outcome = _Doubled().run_first(module, most)
    assert outcome.rewritten == len(outcome.sites) == min(most, 3)
    assert operators(outcome.module).count("relax.exp") == 3 - min(most, 3)


def test_the_limit_is_of_all_functions_together() -> None:
    module = graph(op.exp, (2,))
    twice = tvm.IRModule({"one": module["main"], "two": module["main"]})
    assert _Doubled().run(twice).rewritten == 2
    assert _Doubled().run_first(twice, 1).rewritten == 1


def test_attributes_of_the_module_stay() -> None:
    module = graph(op.exp, (2,)).with_attr("kept", 1)
    assert _Doubled().run(module).module.attrs["kept"] == 1


def test_dataflow_knows_producers_through_renamings_and_readers() -> None:
    def body(x):
        y = relax.BlockBuilder.current().emit(op.exp(x))
        z = relax.BlockBuilder.current().emit(y)
        return [op.add(z, z), op.tanh(x)]

    function = _uncanonical(body)
    dataflow = Dataflow(function)
    (parameter,) = function.params
    first, renamed, total = (binding.var for binding in function.body.blocks[0].bindings[:3])
    assert dataflow.producer(renamed).op.name == "relax.exp"
    assert dataflow.producer(parameter).same_as(parameter)
    assert dataflow.call(renamed, "relax.tanh", "relax.exp") is not None
    assert dataflow.call(renamed, "relax.tanh") is None
    assert dataflow.call(parameter, "relax.exp") is None
    assert dataflow.read_once(first)
    assert not dataflow.read_once(renamed)
    assert not dataflow.read_once(parameter)
    assert dataflow.read_once(total)
    assert dataflow.read_once(relax.const(1.0))


def test_what_is_read_under_another_name_too_is_not_read_once() -> None:
    def body(x):
        y = relax.BlockBuilder.current().emit(op.exp(x))
        return [y, op.tanh(y)]

    function = _uncanonical(body)
    dataflow = Dataflow(function)
    exponential, renamed, total = (binding.var for binding in function.body.blocks[0].bindings)
    assert not dataflow.read_once(exponential)
    assert not dataflow.read_once(renamed)
    assert dataflow.read_once(total)


def _uncanonical(body) -> relax.Function:
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            outputs = [builder.emit_output(result) for result in body(x)]
        builder.emit_func_output(relax.Tuple(outputs))
    return builder.get()["main"]
