from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.errors import TuningError
from optimizer.tuning.log import TuningLog, decisions_of
from optimizer.tuning.session import Budget, Progress, TuningSession
from optimizer.tuning.tasks import Task
from schedules.family import Choice, Parameters, defaults
from tests.tuning.examples import ORIGIN, TARGET, Bench, matmul_task

_SPACE = (Choice("rows", 8, (4, 6, 8, 12)), Choice("vectors", 2, (1, 2, 3)), Choice("row_block", 32, (32, 64, 128)))
_TASK = replace(matmul_task(), space=_SPACE)
_BEST = {choice.name: choice.candidates[0] for choice in _TASK.space}


def _distance(task: Task, parameters: Parameters) -> float:
    """Time grows with the number of parameters that are not the best."""
    del task
    return 1e-3 * (1 + sum(parameters[name] != value for name, value in _BEST.items()))


def _session(bench: Bench, folder: Path, tasks: Sequence[Task] = (_TASK,), **origin: object) -> TuningSession:
    log = TuningLog(folder, TARGET.name)
    return TuningSession(tasks, bench, log, replace(ORIGIN, **origin))  # pyright: ignore[reportArgumentType]


def test_the_best_candidate_is_decided_and_applies(tmp_path: Path) -> None:
    _session(Bench(_distance), tmp_path).run(Budget(trials=10_000))
    decisions = decisions_of(TuningLog(tmp_path, TARGET.name).read(), TARGET)
    (record,) = decisions.records.values()
    assert record.parameters == _BEST
    assert record.ratio == pytest.approx(1 / len(_BEST), abs=0.3)


def test_the_default_stays_where_nothing_is_faster(tmp_path: Path) -> None:
    default = defaults(_TASK.space)
    session = _session(Bench(lambda _, p: 1e-3 if p == default else 2e-3), tmp_path)
    session.run(Budget(trials=16))
    assert session.progress[0].decided == default
    assert session.progress[0].ratio == 1


def test_a_gain_within_the_noise_does_not_replace_the_default(tmp_path: Path) -> None:
    default = defaults(_TASK.space)
    session = _session(Bench(lambda _, p: 1e-3 if p == default else 0.99e-3), tmp_path)
    session.run(Budget(trials=16))
    assert session.progress[0].decided == default


def test_no_more_trials_than_the_budget(tmp_path: Path) -> None:
    session = _session(Bench(_distance), tmp_path)
    session.run(Budget(trials=13))
    assert session.progress[0].trials == 13


def test_a_second_run_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    _session(Bench(_distance), tmp_path).run(Budget(trials=8))
    bench = Bench(_distance)
    session = _session(bench, tmp_path)
    session.run(Budget(trials=20))
    first = TuningLog(tmp_path, TARGET.name).read().records[:8]
    assert session.progress[0].trials == 20
    assert not [record for record in first if record.parameters in bench.measured[:12]]


def test_a_finished_search_measures_no_candidates_again(tmp_path: Path) -> None:
    _session(Bench(_distance), tmp_path).run(Budget(trials=8))
    bench = Bench(_distance)
    _session(bench, tmp_path).run(Budget(trials=8))
    assert bench.measured == []


def test_trials_of_another_machine_do_not_count(tmp_path: Path) -> None:
    _session(Bench(_distance), tmp_path, cpu="another CPU").run(Budget(trials=8))
    session = _session(Bench(_distance), tmp_path)
    assert session.progress[0].trials == 0


def test_failing_candidates_are_recorded_with_their_reason(tmp_path: Path) -> None:
    def sometimes(task: Task, parameters: Parameters) -> float:
        if parameters["rows"] != defaults(task.space)["rows"]:
            raise ArithmeticError("the process crashed: at once")
        return 1e-3

    session = _session(Bench(sometimes), tmp_path)
    session.run(Budget(trials=24))
    failed = [record for record in TuningLog(tmp_path, TARGET.name).read().records if record.failure]
    assert session.progress[0].failures == {"the process crashed": len(failed)}
    assert failed


def test_a_task_whose_default_fails_is_skipped_and_the_others_go_on(tmp_path: Path) -> None:
    broken = replace(matmul_task(40), space=_SPACE)

    def seconds(task: Task, parameters: Parameters) -> float:
        if task is broken:
            raise ArithmeticError("it hangs")
        return _distance(task, parameters)

    session = _session(Bench(seconds), tmp_path, (broken, _TASK))
    session.run(Budget(trials=16))
    assert session.progress[0].skipped == "it hangs"
    assert session.progress[1].trials == 16


def test_it_is_an_error_if_no_task_can_be_measured(tmp_path: Path) -> None:
    def fail(*_: object) -> float:
        raise ArithmeticError("it hangs")

    with pytest.raises(TuningError, match="it hangs"):
        _session(Bench(fail), tmp_path).run(Budget(trials=8))


def test_an_interrupted_search_leaves_its_trials_and_a_decision(tmp_path: Path) -> None:
    def interrupt(progress: Sequence[Progress]) -> None:
        if progress[0].trials >= 8 and progress[0].decided is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _session(Bench(_distance), tmp_path).run(Budget(trials=64), interrupt)
    records = TuningLog(tmp_path, TARGET.name).read().records
    assert [record.kind for record in records] == ["trial"] * 8 + ["decision"]


def test_trials_go_to_the_task_that_takes_most_of_a_step(tmp_path: Path) -> None:
    light = replace(matmul_task(40), space=_SPACE)
    session = _session(Bench(lambda task, _: 1e-6 if task is light else 1e-3), tmp_path, (light, _TASK))
    session.run(Budget(trials=32))
    assert session.progress[1].trials > session.progress[0].trials


def test_a_trained_model_is_left_beside_the_log(tmp_path: Path) -> None:
    _session(Bench(_distance), tmp_path).run(Budget(trials=32))
    assert (tmp_path / TARGET.name / "matmul.model.json").exists()
