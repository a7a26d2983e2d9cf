"""`tune` and `logs` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

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
