from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import targets
from optimizer.json_records import RecordError
from optimizer.tuning.records import Record, target_digest
from schedules import cuda
from schedules.registry import FAMILIES
from tests.tuning.examples import ORIGIN, RECORD

_TIMES = st.floats(1e-9, 1e3, allow_subnormal=False)
_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")))


@given(
    seconds=_TIMES,
    ratio=_TIMES,
    description=_TEXT,
    parameters=st.dictionaries(_TEXT, st.integers(0, 2**62)),
    failure=st.sampled_from(["", "it crashed"]),
)
def test_a_record_is_read_as_it_was_written(
    seconds: float, ratio: float, description: str, parameters: dict[str, int], failure: str
) -> None:
    record = replace(
        RECORD, seconds=seconds, ratio=ratio, description=description, parameters=parameters, failure=failure
    )
    line = record.to_line()
    assert b"\n" not in line
    assert Record.from_line(line) == record


@pytest.mark.parametrize("family", [*(family.name for family in FAMILIES), *cuda.RULES])
def test_every_family_can_be_recorded(family: str) -> None:
    assert Record.from_line(replace(RECORD, family=family).to_line()).family == family


@given(st.binary(max_size=200))
def test_bytes_that_are_no_record_are_refused(line: bytes) -> None:
    with pytest.raises(RecordError):
        Record.from_line(line)


@given(cut=st.integers(1, len(RECORD.to_line()) - 1))
def test_a_line_that_was_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(RecordError):
        Record.from_line(RECORD.to_line()[:cut])


@pytest.mark.parametrize(
    "change",
    [
        {"workload": "nothing"},
        {"family": "../matmul"},
        {"origin": {**json.loads(RECORD.to_line())["origin"], "target": "../../etc"}},
        {"description": "\x1b[2J"},
        {"seconds": 0.0},
        {"ratio": -1.0},
        {"parameters": {"rows": "8"}},
        {"parameters": {"rows": True}},
        {"kind": "guess"},
        {"unknown": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_values_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    document = {**json.loads(RECORD.to_line()), **change}
    with pytest.raises(RecordError):
        Record.from_line(json.dumps(document).encode())


def test_targets_that_declare_other_things_have_other_digests() -> None:
    known = [targets.get(name) for name in targets.names()]
    assert len({target_digest(target) for target in known}) == len(known)


def test_the_digest_does_not_depend_on_the_description() -> None:
    target = targets.get("arm64")
    assert target_digest(replace(target, description="another")) == target_digest(target)


def test_records_of_other_threads_are_of_another_origin() -> None:
    assert replace(ORIGIN, threads=4) != ORIGIN
