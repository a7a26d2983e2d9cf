from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from passes import pipeline
from passes.base import Pass, PassOutcome
from passes.convert_precision import ConvertPrecision
from passes.fold_constants import FoldConstants
from passes.quantize_weights import QuantizeWeights
from tests.passes.graph import graph
from tests.passes.relax_modules import operators


def test_every_registered_pass_can_be_made_by_its_name() -> None:
    assert [item.name for item in pipeline.parse(",".join(pipeline.pass_names()))] == list(pipeline.pass_names())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(pipeline.pass_names()), max_size=6))
def test_notation_reads_back_as_the_same_passes(names: list[str]) -> None:
    passes = pipeline.parse(",".join(names))
    assert pipeline.parse(",".join(pipeline.notation(item) for item in passes)) == passes


def test_options_reach_the_pass() -> None:
    assert pipeline.parse("convert-precision{dtype=float16}") == (ConvertPrecision("float16"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-constant", "unknown pass 'fold-constant'; did you mean 'fold-constants'?"),
        ("nothing-like-it", f"unknown pass 'nothing-like-it'; the passes are {', '.join(pipeline.pass_names())}"),
        ("fold-constants{size=3}", "pass 'fold-constants' has no option 'size'; it has no options"),
        ("convert-precision{kind=1}", "pass 'convert-precision' has no option 'kind'; its options are dtype"),
        (
            "quantize-weights{size=1}",
            "pass 'quantize-weights' has no option 'size'; "
            "its options are bits, group, symmetric, method, scales, target, activations, exceptions, calibration, "
            "quality",
        ),
        (
            "fold-constants,fuse;",
            "cannot read 'fuse;' among the passes; write name,name{option=value}",
        ),
        ("block-channels{block=big}", "option 'block' of pass 'block-channels' is to be of type int, not 'big'"),
        (
            "quantize-weights{symmetric=maybe}",
            "option 'symmetric' of pass 'quantize-weights' is to be of type bool, not 'maybe'",
        ),
    ],
)
def test_mistakes_name_the_fix(text: str, message: str) -> None:
    with pytest.raises(pipeline.PassOptionError, match=f"^{re.escape(message)}$"):
        pipeline.parse(text)


def test_several_options_and_spaces_are_read() -> None:
    expected = QuantizeWeights(bits=8, group=64, symmetric=False)
    assert pipeline.parse(" quantize-weights {bits=8 , group=64,symmetric=False } , fold-constants ") == (
        expected,
        FoldConstants(),
    )
    assert pipeline.notation(expected) == (
        "quantize-weights{bits=8,group=64,symmetric=False,method=rtn,scales=float16,target=host,activations=auto,"
        "exceptions=,calibration=,quality=}"
    )
    assert pipeline.notation(FoldConstants()) == "fold-constants"
    assert pipeline.parse("") == ()
    assert pipeline.instance("quantize-weights", {"bits": 8, "group": 64, "symmetric": False}) == expected


def test_a_pass_is_described_by_its_class() -> None:
    description = pipeline.describe("block-channels")
    assert description.name == "block-channels"
    assert description.documentation.startswith("Give convolutions of fp32 with constant weights")
    assert description.options == (
        pipeline.OptionDescription("block", "int", "16"),
        pipeline.OptionDescription("winograd", "int", "4"),
        pipeline.OptionDescription("dtype", "str", "float32"),
        pipeline.OptionDescription("integers", "str", ""),
        pipeline.OptionDescription("byte_block", "int", "0"),
        pipeline.OptionDescription("words", "bool", "False"),
    )


def test_a_run_records_each_pass_and_calls_back() -> None:
    module = graph(lambda x: op.add(x, op.exp(relax.const(1.0))), (2,))
    seen: list[pipeline.PassRecord] = []
    passes = pipeline.parse("fold-constants,simplify-algebra")
    after, records = pipeline.run(module, passes, seen.append)
    assert [record.item for record in records] == list(passes)
    assert tuple(seen) == records
    assert [record.outcome.rewritten for record in records] == [1, 0]
    assert all(0 <= record.seconds < 60 for record in records)
    assert after.same_as(records[-1].outcome.module)


@pytest.mark.parametrize("name", ["fold-constants", "simplify-algebra", "simplify-casts", "recognize-activations"])
def test_a_pass_that_rewrites_nothing_returns_the_module_it_was_given(name: str) -> None:
    module = graph(op.exp, (2,))
    assert pipeline.instance(name, {}).run(module).module.same_as(module)


def test_what_nobody_reads_is_no_reader() -> None:
    """Transposes meet over an operator whose result they alone read."""

    def body(x: relax.Expr) -> relax.Expr:
        moved = relax.BlockBuilder.current().emit(op.exp(op.permute_dims(x, [1, 0])))
        relax.BlockBuilder.current().emit(op.sin(moved))
        return op.permute_dims(moved, [1, 0])

    module = graph(body, (2, 3))
    assert operators(module).count("relax.permute_dims") == 2
    assert operators(pipeline.run(module, pipeline.parse("cancel-transposes"))[0]) == ["relax.exp"]


def test_an_ill_formed_result_of_a_pass_is_found_at_once() -> None:
    @dataclass(frozen=True)
    class Unbinding(Pass):
        name: ClassVar[str] = "unbinding"

        def run(self, module: tvm.IRModule) -> PassOutcome:
            unbound = relax.Var("unbound", relax.TensorType((2,), "float32"))
            return PassOutcome(tvm.IRModule({"main": relax.Function([], unbound, unbound.ty)}))

    with pytest.raises(ValueError, match="unbound"):
        pipeline.run(graph(op.exp, (2,)), [Unbinding()])


def test_what_a_manifest_records_may_hold_any_text() -> None:
    options = {"method": "rtn", "calibration": "a.txt, b.txt (sha256 1)", "quality": "KL 0.1, 2 {x}=y"}
    assert pipeline.instance("quantize-weights", options) == QuantizeWeights(
        calibration="a.txt, b.txt (sha256 1)", quality="KL 0.1, 2 {x}=y"
    )
