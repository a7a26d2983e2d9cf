from __future__ import annotations

from benchmarks.transfer import Step, trials_to

_STEPS = [Step(0, 10.0), Step(8, 8.0), Step(16, 6.1), Step(24, 6.0)]


def test_the_gain_is_counted_from_the_default() -> None:
    assert trials_to(0.5, _STEPS, 6.0) == 8
    assert trials_to(0.95, _STEPS, 6.0) == 16
    assert trials_to(1.0, _STEPS, 6.0) == 24


def test_what_a_search_never_reaches_is_none() -> None:
    assert trials_to(0.95, _STEPS, 2.0) is None
