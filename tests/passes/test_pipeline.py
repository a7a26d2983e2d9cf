from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes import pipeline
from passes.convert_precision import ConvertPrecision


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
        ("fold-constant", "did you mean 'fold-constants'"),
        ("nothing-like-it", "the passes are"),
        ("fold-constants{size=3}", "has no options"),
        ("convert-precision{kind=1}", "its options are dtype"),
        ("fold-constants;", "cannot read"),
    ],
)
def test_mistakes_name_the_fix(text: str, message: str) -> None:
    with pytest.raises(pipeline.PassOptionError, match=message):
        pipeline.parse(text)
