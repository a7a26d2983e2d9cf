"""`tune` and `logs` as a user runs them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from optimizer.tuning import fleet
from targets.gpu import gpus
from tests.cli.conftest import Finished

Optimizer = Callable[..., Finished]


def test_a_tuned_model_compiles_from_its_log(optimizer: Optimizer, perceptron: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs"
    tuned = optimizer("tune", perceptron, "--target", "x86-avx2", "--trials", "2", "--log", log, "--json")
    assert tuned.code == 0, tuned.err
    report = json.loads(tuned.out)
    assert report["trials"] == 2
    assert any(task["parameters"] for task in report["tasks"])
    compiled = optimizer("compile", perceptron, "-t", "x86-avx2", "--log", log, "--dry-run", "--json")
    assert json.loads(compiled.out)["tuned"]["x86-avx2"] >= 1
    plain = optimizer("compile", perceptron, "-t", "x86-avx2", "--log", log, "--no-log", "--dry-run", "--json")
    assert json.loads(plain.out)["tuned"] == {}
    listed = optimizer("logs", "list", "--log", log, "--json")
    assert json.loads(listed.out)[0]["trials"] == 2
    assert "matmul" in optimizer("logs", "show", "x86-avx2", "--log", log).out
    assert optimizer("logs", "check", "--log", log).code == 0


def test_a_target_that_cannot_be_measured_here_is_refused(optimizer: Optimizer, perceptron: Path) -> None:
    done = optimizer("tune", perceptron, "--target", "arm64", "--trials", "2")
    assert done.code == 11
    assert "tune on a machine of that kind" in done.err


@pytest.mark.skipif(bool(gpus()), reason="there is an NVIDIA GPU on this machine")
def test_kernels_of_a_gpu_are_refused_without_one(optimizer: Optimizer, perceptron: Path) -> None:
    done = optimizer("tune", perceptron, "--target", "cuda", "--trials", "2")
    assert done.code == 11
    assert "no NVIDIA GPU here" in done.err


@pytest.mark.cuda
@pytest.mark.skipif(not gpus(), reason="no NVIDIA GPU on this machine")
def test_a_model_tuned_on_a_gpu_compiles_from_its_log(optimizer: Optimizer, perceptron: Path, tmp_path: Path) -> None:
    options = ("-t", "cuda", "--gpu-arch", gpus()[0].architecture, "--log", tmp_path)
    tuned = optimizer("tune", perceptron, *options, "--trials", "4", "--json")
    assert tuned.code == 0, tuned.err
    compiled = optimizer("compile", perceptron, *options, "--dry-run", "--json")
    assert json.loads(compiled.out)["tuned"]["cuda"] >= 1


def test_tuning_without_a_log_is_refused(optimizer: Optimizer, perceptron: Path) -> None:
    done = optimizer("compile", perceptron, "--tune", "4", "--no-log")
    assert done.code == 10


def test_an_export_goes_back_into_another_log(optimizer: Optimizer, perceptron: Path, tmp_path: Path) -> None:
    optimizer("tune", perceptron, "--target", "x86-avx2", "--trials", "1", "--log", tmp_path / "a")
    assert optimizer("logs", "export", tmp_path / "all.jsonl", "--log", tmp_path / "a").code == 0
    assert optimizer("logs", "import", tmp_path / "all.jsonl", "--log", tmp_path / "b").code == 0
    for name in "ab":
        listed = json.loads(optimizer("logs", "list", "--log", tmp_path / name, "--json").out)
        assert listed[0]["trials"] == 1
    assert "0 records added" in optimizer("logs", "merge", tmp_path / "a", "--log", tmp_path / "b").out


def test_a_log_of_no_such_target_names_those_there_are(optimizer: Optimizer, tmp_path: Path) -> None:
    done = optimizer("logs", "show", "x86-avx2", "--log", tmp_path)
    assert done.code == 10
    assert "none" in done.err


def test_a_model_is_tuned_on_a_fleet(
    optimizer: Optimizer, perceptron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tornado")
    monkeypatch.setattr(fleet, "state_file", lambda: tmp_path / "fleet.json")
    up = optimizer("fleet", "up", "--port", "9400", "--key", "desk")
    try:
        assert up.code == 0, up.err
        tracker = re.search(r"tracker at (\S+)", up.out)
        assert tracker is not None
        listed = json.loads(optimizer("fleet", "status", "--json").out)
        assert [device["key"] for device in listed["devices"]] == ["desk"]
        assert listed["ended"] == []
        device = f"rpc:desk@{tracker[1]}"
        log = tmp_path / "logs"
        tuned = optimizer("tune", perceptron, "-t", "x86-avx2", "--trials", "1", "--log", log, "--device", device)
        assert tuned.code == 0, tuned.err
        assert "1 x " in tuned.out
        assert json.loads(optimizer("logs", "list", "--log", log, "--json").out)[0]["trials"] == 1
    finally:
        down = optimizer("fleet", "down")
    assert "2 processes ended" in down.out


@pytest.mark.parametrize("device", ["phone", "rpc:phone", "rpc:phone@there", "rpc:@127.0.0.1:9190"])
def test_a_device_that_is_none_is_refused(optimizer: Optimizer, perceptron: Path, device: str) -> None:
    done = optimizer("tune", perceptron, "-t", "x86-avx2", "--device", device)
    assert done.code == 10
    assert "rpc:KEY@HOST:PORT" in done.err
