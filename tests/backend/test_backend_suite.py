"""The ONNX backend suite through our compile and runtime: every case is right, or refused for a reason on record.

All of its cases take about six minutes on two cores (`python -m tests.backend.report`). Here are all but the largest
models and most of the operators that ONNX expands to others: a share that is chosen by name.
"""

from __future__ import annotations

import re
import zlib

import pytest

from tests.backend.cases import BackendCase, light_cases, model_cases, node_cases
from tests.backend.exclusions import exclusion_of, exclusions, tolerances
from tests.backend.execution import REFUSED, RIGHT, judge
from tests.backend.report import onnxruntime_passes

_LEAST_SHARE = 0.95  # of the plain node cases that onnxruntime gets right
_EXPANDED, _ONE_OF = "_expanded", 4
# Compiling them takes half a minute to one each; `tests/models` has architectures like theirs.
_LARGE_MODELS = {"light_densenet121", "light_inception_v1", "light_inception_v2"}


def _is_chosen(case: BackendCase) -> bool:
    return _EXPANDED not in case.name or zlib.crc32(case.name.encode()) % _ONE_OF == 0


def _check(case: BackendCase) -> None:
    outcome = judge(case)
    exclusion = exclusion_of(case.name)
    if exclusion is None:
        assert outcome.verdict == RIGHT, f"{outcome.verdict}: {outcome.reason}"
    else:
        assert outcome.verdict == REFUSED, f"excluded ({exclusion.reason}), but {outcome.verdict} {outcome.reason}"


@pytest.mark.parametrize("case", list(filter(_is_chosen, node_cases())), ids=lambda case: case.name)
def test_node_case_is_right_or_refused_on_record(case: BackendCase) -> None:
    _check(case)


@pytest.mark.parametrize("case", model_cases(), ids=lambda case: case.name)
def test_small_model_is_right_or_refused_on_record(case: BackendCase) -> None:
    _check(case)


@pytest.mark.parametrize(
    "case", [case for case in light_cases() if case.name not in _LARGE_MODELS], ids=lambda case: case.name
)
def test_light_model_is_right(case: BackendCase) -> None:
    outcome = judge(case)
    assert outcome.verdict == RIGHT, outcome.reason


def test_every_exclusion_covers_a_case() -> None:
    names = [case.name for case in (*node_cases(), *model_cases())]
    for exclusion in (*exclusions(), *tolerances()):
        assert exclusion.reason
        for pattern in exclusion.patterns:
            assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_few_of_the_cases_that_onnxruntime_passes_are_excluded() -> None:
    passes = onnxruntime_passes()
    kept = [name for name in passes if exclusion_of(name) is None]
    assert len(kept) / len(passes) >= _LEAST_SHARE


def test_no_light_model_is_excluded() -> None:
    assert [case.name for case in light_cases() if exclusion_of(case.name)] == []
