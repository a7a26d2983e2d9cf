"""The small models of real architectures in this folder, with their reference cases. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """Inputs of one run and the outputs that onnxruntime gives for them, by name."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class ExportedModel:
    """One committed model: an architecture, the exporter that wrote it, and the names of its reference cases."""

    name: str
    exporter: str
    path: Path
    cases: tuple[str, ...]
    keeps_a_cache: bool

    def case(self, name: str) -> Case:
        """Read the case called `name`; raises KeyError for a name that is not in `cases`."""
        if name not in self.cases:
            raise KeyError(f"{self.path.name} has no case {name!r}; it has {', '.join(self.cases)}")
        inputs: dict[str, np.ndarray] = {}
        outputs: dict[str, np.ndarray] = {}
        with np.load(self.path.with_suffix(".npz")) as arrays:
            for key in arrays.files:
                case, kind, tensor = key.split("/")
                if case == name:
                    (inputs if kind == "inputs" else outputs)[tensor] = arrays[key]
        return Case(inputs, outputs)


def _read(path: Path) -> ExportedModel:
    name, exporter = path.stem.rsplit("_", 1)
    with np.load(path.with_suffix(".npz")) as arrays:
        cases = tuple(dict.fromkeys(key.split("/")[0] for key in arrays.files))
        keeps_a_cache = any("/inputs/past_key_values." in key for key in arrays.files)
    return ExportedModel(name, exporter, path, cases, keeps_a_cache)


MODELS: tuple[ExportedModel, ...] = tuple(_read(path) for path in sorted(FOLDER.glob("*.onnx")))
