from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import TuningLogError
from optimizer.tuning.log import Decisions, LogContents, TuningLog, decisions_of, fits
from optimizer.tuning.records import Record
from schedules import KernelReport
from schedules.family import Choice
from tests.tuning.examples import ORIGIN, RECORD, TARGET

_SPACE = (Choice("rows", 8, (4, 8)), Choice("vectors", 2, (1, 2)))
_REPORT = KernelReport("f", "matmul", workload=RECORD.workload, space=_SPACE, version=RECORD.version)


def _log(folder: Path) -> TuningLog:
    return TuningLog(folder, TARGET.name)


def _decisions(*records: Record) -> Decisions:
    return decisions_of(LogContents(records, ()), TARGET)


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    records = [replace(RECORD, ratio=ratio) for ratio in (0.5, 0.6, 0.7)]
    log = _log(tmp_path)
    for record in records:
        log.append([record])
    assert log.read().records == tuple(records)
    assert not log.read().unusable


def test_there_is_one_file_for_each_family(tmp_path: Path) -> None:
    _log(tmp_path).append([RECORD, replace(RECORD, family="rowwise")])
    assert sorted(path.name for path in (tmp_path / TARGET.name).iterdir()) == ["matmul.jsonl", "rowwise.jsonl"]


def test_a_missing_folder_is_an_empty_log(tmp_path: Path) -> None:
    assert _log(tmp_path / "nowhere").read() == LogContents((), ())


@given(cut=st.integers(1, len(RECORD.to_line())))
def test_a_crash_in_the_middle_of_a_line_loses_that_line_alone(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = _log(tmp_path_factory.mktemp("log"))
    log.append([RECORD])
    path = log.folder / "matmul.jsonl"
    path.write_bytes(path.read_bytes() + RECORD.to_line()[:cut])
    other = replace(RECORD, ratio=0.25)
    log.append([other])
    contents = log.read()
    whole = cut == len(RECORD.to_line())
    assert contents.records == ((RECORD, RECORD, other) if whole else (RECORD, other))
    assert [line.place for line in contents.unusable] == ([] if whole else [f"{path}:2"])


def test_a_record_in_the_folder_of_another_target_is_reported_and_not_used(tmp_path: Path) -> None:
    log = _log(tmp_path)
    log.append([replace(RECORD, origin=replace(ORIGIN, target="arm64"))])
    contents = log.read()
    assert not contents.records
    assert "arm64" in contents.unusable[0].reason


def test_a_record_in_the_file_of_another_family_is_reported_and_not_used(tmp_path: Path) -> None:
    log = _log(tmp_path)
    log.append([RECORD])
    (log.folder / "matmul.jsonl").rename(log.folder / "rowwise.jsonl")
    assert not log.read().records
    assert len(log.read().unusable) == 1


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningLogError, match="--log"):
        _log(tmp_path / "file").append([RECORD])


def test_a_decision_applies_to_its_workload() -> None:
    assert _decisions(RECORD).decide(_REPORT) == RECORD.parameters


@pytest.mark.parametrize(
    "record",
    [
        replace(RECORD, workload="f" * 16),
        replace(RECORD, version=RECORD.version + 1),
        replace(RECORD, kind="trial"),
        replace(RECORD, failure="it crashed"),
        replace(RECORD, origin=replace(ORIGIN, target_digest="0" * 12)),
        replace(RECORD, parameters={"rows": 8}),
        replace(RECORD, parameters={"rows": 8, "vectors": 2, "depth": 1}),
        replace(RECORD, parameters={"rows": 1 << 40, "vectors": 2}),
    ],
    ids=["workload", "version", "trial", "failure", "target", "missing", "unknown", "value"],
)
def test_a_record_of_something_else_does_not_apply(record: Record) -> None:
    assert _decisions(record).decide(_REPORT) is None


@given(order=st.permutations(range(6)))
def test_the_order_of_lines_does_not_matter(order: list[int]) -> None:
    records = [
        replace(RECORD, ratio=ratio, parameters={"rows": rows, "vectors": vectors})
        for ratio, rows, vectors in ((0.5, 8, 1), (0.5, 4, 2), (0.5, 4, 1), (0.7, 8, 2), (0.9, 4, 2), (0.6, 8, 2))
    ]
    shuffled = _decisions(*(records[position] for position in order))
    assert shuffled.decide(_REPORT) == {"rows": 4, "vectors": 1}


_CONFIRMATION = replace(RECORD, kind="confirmation")


def test_what_gained_most_in_steps_of_models_applies() -> None:
    other = replace(RECORD, parameters={"rows": 4, "vectors": 2}, ratio=0.9)
    records = (RECORD, other, replace(_CONFIRMATION, ratio=0.99), replace(other, kind="confirmation", ratio=0.95))
    assert _decisions(*records).decide(_REPORT) == other.parameters


def test_what_was_no_faster_in_steps_of_models_does_not_apply() -> None:
    slower, faster = replace(_CONFIRMATION, ratio=1.0), replace(_CONFIRMATION, ratio=0.9)
    assert _decisions(RECORD, slower).decide(_REPORT) is None
    assert _decisions(RECORD, slower, faster).decide(_REPORT) == RECORD.parameters


def test_what_is_confirmed_goes_before_what_is_not() -> None:
    unconfirmed = replace(RECORD, parameters={"rows": 4, "vectors": 2}, ratio=0.1)
    assert _decisions(unconfirmed, RECORD, replace(_CONFIRMATION, ratio=0.9)).decide(_REPORT) == RECORD.parameters


def test_the_default_fits_a_space_that_does_not_list_it() -> None:
    assert fits({"rows": 7}, (Choice("rows", 7, (4, 8)),))
