"""Which candidates are worth a measurement: gradient-boosted trees over a workload's sizes and its parameters.

One model per operator family, trained on all records of a target, predicts the logarithm of the ratio to the default
schedule. The ratio, unlike the time, carries over to other workloads and machines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xgboost

from optimizer.tuning.records import Record
from schedules.family import Parameters

SUFFIX = ".model.json"
# With fewer measurements trees only repeat them.
LEAST_RECORDS = 12
_SETTINGS = {"max_depth": 6, "eta": 0.2, "min_child_weight": 1, "subsample": 0.9, "seed": 0, "nthread": 1}
_ROUNDS = 80
# What a failed candidate counts as: as slow as what is not worth timing twice.
_FAILED = 2.0

Features = Mapping[str, float]


class CostModel:
    """Predicts the base-2 logarithm of the time of a candidate over the default's; knows nothing until trained."""

    def __init__(self) -> None:
        self._booster: xgboost.Booster | None = None
        self._names: tuple[str, ...] = ()
        self.trained_on: int = 0

    def train(self, records: Sequence[Record]) -> None:
        """Learn from trials, failed ones too; too few change nothing."""
        trials = [record for record in records if record.kind == "trial"]
        if len(trials) < LEAST_RECORDS:
            return
        names = sorted({name for record in trials for name in (*record.features, *_logarithms(record.parameters))})
        rows = [_row(names, record.features, record.parameters) for record in trials]
        labels = [_FAILED if record.failure else math.log2(record.ratio) for record in trials]
        data = xgboost.DMatrix(np.asarray(rows), np.asarray(labels), feature_names=names)
        self._booster = xgboost.train(_SETTINGS, data, _ROUNDS)
        self._names = tuple(names)
        self.trained_on = len(trials)

    def predict(self, features: Features, candidates: Sequence[Parameters]) -> list[float] | None:
        """Return a prediction for each candidate, None before there was enough to learn from."""
        if self._booster is None:
            return None
        rows = [_row(self._names, features, parameters) for parameters in candidates]
        data = xgboost.DMatrix(np.asarray(rows), feature_names=list(self._names))
        return [float(value) for value in self._booster.predict(data)]

    def save(self, path: Path) -> None:
        """Write the model, if it has learned anything, as a JSON file that appears only when it is complete."""
        if self._booster is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "names": self._names,
            "trained_on": self.trained_on,
            "trees": json.loads(bytes(self._booster.save_raw("json"))),
        }
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="ascii")
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> CostModel:
        """Return the model at `path`, an untrained one where there is none or it cannot be read."""
        model = CostModel()
        try:
            document = json.loads(path.read_text(encoding="ascii"))
            booster = xgboost.Booster()
            booster.load_model(bytearray(json.dumps(document["trees"]).encode("ascii")))
            names, trained_on = tuple(map(str, document["names"])), int(document["trained_on"])
        except (OSError, ValueError, KeyError, TypeError, xgboost.core.XGBoostError):
            return model
        if booster.num_features() == len(names):
            model._booster, model._names, model.trained_on = booster, names, trained_on
        return model


def _logarithms(parameters: Parameters) -> dict[str, float]:
    return {f"parameter {name}": math.log2(1 + value) for name, value in parameters.items()}


def _row(names: Sequence[str], features: Features, parameters: Parameters) -> list[float]:
    values = {**features, **_logarithms(parameters)}
    return [values.get(name, math.nan) for name in names]
