"""Decisions of a tuning log in compiles: they apply, they are reported, and they change no number."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import targets
from optimizer.compile import CompileOptions, Plan, compile_model, plan_model
from optimizer.runtime import load
from optimizer.tuning.log import TuningLog, decisions_for
from optimizer.tuning.records import target_digest
from optimizer.tuning.tasks import tasks_of
from schedules.family import Parameters
from tests.tuning.examples import TARGET, decision_for, matmul_task

_OTHER_ROWS = 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[96, 48] x) => (float[96, 64] y) { y = MatMul(x, w) }'
    )
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


def _plan(model: Path, log: Path | None) -> Plan:
    return plan_model(model, CompileOptions(TARGET, tuning_log=log))[1]


def _decide(model: Path, folder: Path) -> Parameters:
    """Write a decision for the model's only kernel and return it."""
    (task,) = tasks_of(_plan(model, None).lowered, {})
    decided = {**{choice.name: choice.default for choice in task.space}, "rows": _OTHER_ROWS}
    TuningLog(folder, TARGET.name).append([decision_for(task, decided)])
    return decided


def test_a_decision_replaces_the_default(model: Path, tmp_path: Path) -> None:
    (before,) = _plan(model, None).lowered.kernels
    decided = _decide(model, tmp_path / "logs")
    (after,) = _plan(model, tmp_path / "logs").lowered.kernels
    assert before.parameters["rows"] != _OTHER_ROWS
    assert (before.tuned, after.tuned) == (False, True)
    assert after.parameters == decided


def test_the_manifest_lists_hits_and_misses(model: Path, tmp_path: Path) -> None:
    _decide(model, tmp_path / "logs")
    options = CompileOptions(TARGET, tuning_log=tmp_path / "logs")
    tuned = compile_model(model, tmp_path / "tuned", options, certify=False).manifest.tuning
    plain = compile_model(model, tmp_path / "plain", CompileOptions(TARGET, tuning_log=None), certify=False)
    assert (len(tuned.hits), len(tuned.misses)) == (1, 0)
    assert plain.manifest.tuning.misses == tuned.hits


def test_a_tuned_package_is_certified_and_its_bytes_do_not_change(model: Path, tmp_path: Path) -> None:
    _decide(model, tmp_path / "logs")
    options = CompileOptions(TARGET, tuning_log=tmp_path / "logs")
    for name in ("first.opt", "second.opt"):
        compile_model(model, tmp_path / name, options)
    assert load(tmp_path / "first.opt").manifest.certificate is not None
    assert filecmp.cmp(tmp_path / "first.opt", tmp_path / "second.opt", shallow=False)


def test_lines_that_hold_no_record_are_reported(model: Path, tmp_path: Path) -> None:
    _decide(model, tmp_path / "logs")
    path = next((tmp_path / "logs" / TARGET.name).iterdir())
    path.write_bytes(b'{"kind":"decis\n' + path.read_bytes())
    plan = _plan(model, tmp_path / "logs")
    assert plan.lowered.kernels[0].tuned
    assert [line.place for line in plan.decisions.unusable] == [f"{path}:1"]


def test_a_sibling_decides_where_the_target_has_nothing(tmp_path: Path) -> None:
    own, sibling = targets.get("x86-avx512-bf16"), targets.get("x86-avx512")
    task = matmul_task()
    record = decision_for(task, {choice.name: choice.default for choice in task.space})
    measured = replace(record, origin=replace(record.origin, target=sibling.name, target_digest=target_digest(sibling)))
    TuningLog(tmp_path, sibling.name).append([measured])
    assert list(decisions_for(own, tmp_path).records.values()) == [measured]
    mine = replace(record, ratio=0.9, origin=replace(record.origin, target=own.name, target_digest=target_digest(own)))
    TuningLog(tmp_path, own.name).append([mine])
    assert list(decisions_for(own, tmp_path).records.values()) == [mine]
    assert not decisions_for(TARGET, tmp_path).records
