from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from optimizer.tuning.pool import BenchPool, measurement_of
from optimizer.tuning.process import FailedError, Times
from schedules.family import defaults
from tests.tuning.examples import TARGET, matmul_task

_TASK = matmul_task()


@pytest.fixture(scope="module")
def pool() -> Iterator[BenchPool]:
    with BenchPool(TARGET, threads=2, processes=1) as started:
        yield started


@pytest.mark.parametrize("is_cold", [False, True])
def test_candidates_are_timed_beside_the_default(is_cold: bool, pool: BenchPool) -> None:
    slower = {**defaults(_TASK.space), "rows": 4, "vectors": 1}
    default, measured = pool.measure(replace(_TASK, is_cold=is_cold), [slower], 3)
    assert default.seconds > 0
    assert default.ratio == 1
    assert measured.seconds > 0
    assert measured.ratio > 0


def test_ratios_to_the_default_are_those_of_the_same_rounds() -> None:
    # In the second round something else kept the machine busy while the default ran, in the third while both did.
    measured = measurement_of(Times([2.0, 2.0, 8.0], [1.0, 200.0, 4.0]))
    assert measured.seconds == 2
    assert measured.ratio == 2


def test_a_candidate_that_is_timed_once_is_compared_with_the_median_of_the_default() -> None:
    assert measurement_of(Times([9.0], [1.0, 3.0, 50.0])).ratio == 3


def test_defaults_of_several_tasks_are_timed_in_their_order(pool: BenchPool) -> None:
    broken = replace(_TASK, arguments=_TASK.arguments[:1])
    first, second, third = pool.measure_defaults([_TASK, broken, matmul_task(16)])
    assert first.seconds > 0
    assert "default" in second.failure
    assert third.seconds > 0


def test_a_candidate_that_cannot_be_built_fails_alone(pool: BenchPool) -> None:
    default = defaults(_TASK.space)
    _, wrong, right = pool.measure(_TASK, [{"depth": 3}, {**default, "rows": 4}], 2)
    assert "depth" in wrong.failure
    assert not right.failure


def test_a_process_that_died_is_replaced(pool: BenchPool) -> None:
    pool.measure(_TASK, [], 1)
    pool.kill()
    (default,) = pool.measure(_TASK, [], 1)
    assert default.seconds > 0


def test_a_task_whose_default_cannot_be_built_says_so(pool: BenchPool) -> None:
    broken = replace(_TASK, arguments=_TASK.arguments[:1])
    with pytest.raises(FailedError, match="default"):
        pool.measure(broken, [], 1)
