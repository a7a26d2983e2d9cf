from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.tuning.cost_model import LEAST_RECORDS, CostModel
from tests.tuning.examples import RECORD

_TRIALS = [
    replace(RECORD, kind="trial", parameters={"rows": rows}, ratio=0.1 * rows, features={"bytes": float(bytes_)})
    for rows in (1, 2, 4, 8, 16)
    for bytes_ in range(4)
]
_CANDIDATES = [{"rows": rows} for rows in (16, 1, 4)]


def _trained() -> CostModel:
    model = CostModel()
    model.train(_TRIALS)
    return model


def test_it_orders_candidates_as_they_were_measured() -> None:
    predicted = _trained().predict({"bytes": 2.0}, _CANDIDATES)
    assert predicted is not None
    slow, fast, middle = predicted
    assert fast < middle < slow


def test_too_few_records_teach_nothing() -> None:
    model = CostModel()
    model.train(_TRIALS[: LEAST_RECORDS - 1])
    assert model.predict({}, _CANDIDATES) is None


def test_failures_count_as_slow() -> None:
    model = CostModel()
    failed = [replace(r, failure="it crashed", ratio=0.0) if r.parameters["rows"] == 1 else r for r in _TRIALS]
    model.train(failed)
    predicted = model.predict({"bytes": 2.0}, _CANDIDATES)
    assert predicted is not None
    assert max(predicted) == predicted[1]


def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    path = tmp_path / "matmul.model.json"
    model = _trained()
    model.save(path)
    again = CostModel.load(path)
    assert again.trained_on == len(_TRIALS)
    assert again.predict({"bytes": 2.0}, _CANDIDATES) == model.predict({"bytes": 2.0}, _CANDIDATES)


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        _trained().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"names": ["a"], "trained_on": 1, "trees": {}}'])
def test_a_file_that_is_no_model_is_as_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    assert CostModel.load(path).predict({}, _CANDIDATES) is None
