from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.errors import TuningError
from optimizer.tuning.log import TuningLog, decisions_of
from optimizer.tuning.pool import Measurement
from optimizer.tuning.records import WorkloadKey
from optimizer.tuning.session import Budget, CompareInStep, Progress, TuningSession
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


def _in_step(ratio: float) -> CompareInStep:
    """Return a step of a model in which each decision takes `ratio` times as long as the default."""
    return lambda decided: {key: Measurement(1e-3 * ratio, 0.0, ratio) for key in decided}


def _applied(folder: Path) -> Parameters | None:
    record = decisions_of(TuningLog(folder, TARGET.name).read(), TARGET).records.get(_TASK.key)
    return None if record is None else record.parameters


def test_a_decision_that_is_no_faster_in_a_step_is_taken_back(tmp_path: Path) -> None:
    session = _session(Bench(_distance), tmp_path)
    session.run(Budget(trials=10_000))
    session.confirm(_in_step(1.0))
    assert _applied(tmp_path) is None
    assert (session.progress[0].decided, session.progress[0].ratio) == (defaults(_TASK.space), 1)
    assert session.progress[0].in_step == 1


def test_a_decision_that_is_faster_in_a_step_stays_with_what_it_gains_there(tmp_path: Path) -> None:
    session = _session(Bench(_distance), tmp_path)
    session.run(Budget(trials=10_000))
    session.confirm(_in_step(0.9))
    assert _applied(tmp_path) == session.progress[0].decided == _BEST
    assert session.progress[0].ratio == 0.9


def test_what_was_taken_back_is_not_decided_again(tmp_path: Path) -> None:
    session = _session(Bench(_distance), tmp_path)
    session.run(Budget(trials=24))
    session.confirm(_in_step(1.1))
    taken_back = [r.parameters for r in TuningLog(tmp_path, TARGET.name).read().records if r.kind == "confirmation"]
    again = _session(Bench(_distance), tmp_path)
    again.run(Budget(trials=10_000))
    assert again.progress[0].decided not in taken_back


def test_an_earlier_decision_is_compared_before_it_takes_the_place_of_one_taken_back(tmp_path: Path) -> None:
    _session(Bench(_distance), tmp_path).run(Budget(trials=8))
    earlier = _applied(tmp_path)
    session = _session(Bench(_distance), tmp_path)
    session.run(Budget(trials=10_000))
    compared: list[Parameters] = []

    def compare(decided: Mapping[WorkloadKey, Parameters]) -> dict[WorkloadKey, Measurement]:
        compared.extend(decided.values())
        return {key: Measurement(1e-3, 0.0, 1.2 if len(compared) == 1 else 0.8) for key in decided}

    session.confirm(compare)
    assert compared == [_BEST, earlier]
    assert _applied(tmp_path) == earlier


def test_a_decision_is_compared_in_a_step_once(tmp_path: Path) -> None:
    session = _session(Bench(_distance), tmp_path)
    session.run(Budget(trials=8))
    session.confirm(_in_step(0.9))
    again = _session(Bench(_distance), tmp_path)
    again.run(Budget(trials=8))
    again.confirm(lambda _: pytest.fail("compared again"))
    assert again.progress[0].ratio == 0.9


def test_a_trained_model_is_left_beside_the_log(tmp_path: Path) -> None:
    _session(Bench(_distance), tmp_path).run(Budget(trials=32))
    assert (tmp_path / TARGET.name / "matmul.model.json").exists()
