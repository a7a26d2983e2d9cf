from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import targets
from optimizer.errors import TuningLogError
from optimizer.tuning import upkeep
from optimizer.tuning.log import TuningLog, decisions_of
from optimizer.tuning.records import target_digest
from schedules import cuda
from tests.tuning.examples import ORIGIN, RECORD, TARGET

_TRIALS = [replace(RECORD, kind="trial", ratio=ratio) for ratio in (0.9, 0.5, 0.7)]


@pytest.fixture
def log(tmp_path: Path) -> TuningLog:
    return TuningLog(tmp_path / "logs", TARGET.name)


def test_merging_adds_what_is_not_there(log: TuningLog) -> None:
    log.append(_TRIALS[:2])
    assert upkeep.merge(_TRIALS, log) == 1
    assert upkeep.merge(_TRIALS, log) == 0
    assert log.read().records == tuple(_TRIALS)


def test_records_of_another_target_are_not_merged(log: TuningLog) -> None:
    with pytest.raises(TuningLogError, match="arm64"):
        upkeep.merge([replace(RECORD, origin=replace(ORIGIN, target="arm64"))], log)


def test_pruning_keeps_the_best_trials_and_the_last_decision(log: TuningLog) -> None:
    last = replace(RECORD, ratio=0.4)
    stale = replace(RECORD, version=99)
    failed = replace(_TRIALS[0], failure="it crashed")
    log.append([*_TRIALS, RECORD, stale, failed, last])
    assert upkeep.prune(log, 2) == 4
    assert log.read().records == (_TRIALS[1], _TRIALS[2], last)


def test_pruning_keeps_the_last_confirmation_of_each_choice(log: TuningLog) -> None:
    first = replace(RECORD, kind="confirmation", ratio=1.1)
    last, other = replace(first, ratio=1.2), replace(first, parameters={"rows": 4, "vectors": 2})
    log.append([first, last, other])
    assert upkeep.prune(log, 0) == 1
    assert log.read().records == (last, other)


def test_pruning_keeps_the_decision_that_applies_where_a_later_one_was_taken_back(log: TuningLog) -> None:
    later = replace(RECORD, parameters={"rows": 4, "vectors": 2}, ratio=0.4)
    log.append([RECORD, later, replace(later, kind="confirmation", ratio=1.1)])
    before = decisions_of(log.read(), TARGET)
    upkeep.prune(log, 0)
    assert decisions_of(log.read(), TARGET) == before


def test_records_of_a_gpu_are_kept_and_nothing_is_said_of_them(tmp_path: Path) -> None:
    gpu = TuningLog(tmp_path, "cuda")
    origin = replace(
        ORIGIN, target="cuda", target_digest=target_digest(targets.get("cuda")), tvm=metadata.version("apache-tvm")
    )
    records = [replace(RECORD, family=rule, version=cuda.VERSION, origin=origin) for rule in cuda.RULES]
    gpu.append(records)
    assert upkeep.prune(gpu, 1) == 0
    assert upkeep.check(gpu) == []


def test_records_of_a_target_that_is_not_known_here_are_kept(tmp_path: Path) -> None:
    elsewhere = TuningLog(tmp_path, "another-cpu")
    elsewhere.append([replace(RECORD, origin=replace(ORIGIN, target="another-cpu"))])
    assert upkeep.prune(elsewhere, 1) == 0


def test_pruning_away_a_whole_family_removes_its_file(log: TuningLog) -> None:
    log.append([replace(RECORD, version=99)])
    upkeep.prune(log, 2)
    assert list(log.folder.iterdir()) == []


def test_an_exported_file_is_read_as_it_was(log: TuningLog, tmp_path: Path) -> None:
    log.append([*_TRIALS, RECORD])
    upkeep.export(log.read().records, tmp_path / "all.jsonl")
    assert tuple(upkeep.read_archive(tmp_path / "all.jsonl")) == log.read().records


def test_a_malformed_archive_is_refused_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_bytes(RECORD.to_line() + b"\n{}\n")
    with pytest.raises(TuningLogError, match=r"all\.jsonl:2"):
        upkeep.read_archive(path)


def test_a_log_of_usable_records_passes(log: TuningLog) -> None:
    log.append([replace(RECORD, origin=replace(ORIGIN, tvm=upkeep.metadata.version("apache-tvm")))])
    assert upkeep.check(log) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 99}, "version 99"),
        ({"family": "unheard-of"}, "unknown family"),
        ({"origin": replace(ORIGIN, target_digest="0" * 12)}, "another definition"),
        ({"origin": replace(ORIGIN, tvm="0.1")}, "TVM 0.1"),
    ],
)
def test_what_cannot_be_used_is_told(change: dict[str, object], told: str, log: TuningLog) -> None:
    log.append([replace(RECORD, **change)])
    (line,) = upkeep.check(log)
    assert told in line


def test_the_summary_counts(log: TuningLog) -> None:
    log.append([*_TRIALS, RECORD])
    summary = upkeep.summarize(log)
    assert (summary.workloads, summary.trials, summary.decisions, summary.failures) == (1, 3, 1, 0)
