from __future__ import annotations

import numpy as np
import pytest

from benchmarks.comparison import Judge, Row, judged

_TOLERANCE = 2.0**-4


def _rows(engine: float, reference: float, judge: float | None, *, loosened: bool) -> dict[str, Row]:
    """Return the judged rows of engines, of which each and the judge have an output that far from the reference's."""

    def off(by: float) -> dict[str, np.ndarray]:
        return {"y": np.array([1.0, 1.0 + by], np.float32)}

    results = {"optimizer": off(engine), "onnxruntime": off(reference)}
    rows = {name: Row(name, difference=abs(by)) for name, by in (("optimizer", engine), ("onnxruntime", reference))}
    own = Judge("its floats", _TOLERANCE, lambda _: None if judge is None else off(judge), loosened)
    return {row.engine: row for row in judged(rows, results, own, {}, "onnxruntime")}


def test_nobody_is_asked_about_what_agrees() -> None:
    rows = _rows(_TOLERANCE / 2, 0, 1.0, loosened=True)
    assert all(row.judge == "" and row.tolerance == _TOLERANCE for row in rows.values())


@pytest.mark.parametrize(("own", "factor"), [(0.5, 1), (1.5, 1.5), (9, 4)])
def test_engines_may_be_as_far_off_as_the_reference_up_to_four_tolerances(own: float, factor: float) -> None:
    row = _rows(2 * _TOLERANCE, 0, -own * _TOLERANCE, loosened=True)["optimizer"]
    assert row.tolerance == pytest.approx(factor * _TOLERANCE, rel=0.02)
    assert row.judge == "its floats"
    assert row.difference == pytest.approx((2 + own) * _TOLERANCE, rel=0.5)


def test_an_exact_judge_allows_nothing_more() -> None:
    assert _rows(2 * _TOLERANCE, 0, -2 * _TOLERANCE, loosened=False)["optimizer"].tolerance == _TOLERANCE


def test_without_a_decision_the_reference_stands() -> None:
    row = _rows(2 * _TOLERANCE, 0, None, loosened=True)["optimizer"]
    assert (row.judge, row.difference) == ("", 2 * _TOLERANCE)
