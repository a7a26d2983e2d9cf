"""Which models each table compares, with their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx

from benchmarks.architecture import EXPORTERS, Exporter
from benchmarks.engines import ENGINES, Cases
from benchmarks.kernels import cases
from benchmarks.models import FULL_SIZE, cases_of, model_path

REFERENCE = "onnxruntime"
_SEED = 0


@dataclass(frozen=True)
class Table:
    """Which full-size models a table compares, of which exporters, on which engines if none are asked for."""

    models: tuple[str, ...]
    exporters: tuple[Exporter, ...] = ("dynamo",)
    engines: tuple[str, ...] = tuple(ENGINES)


@dataclass(frozen=True)
class Subject:
    """One model of a table: the label of its rows, its file, its inputs by case, and the command that makes it."""

    label: str
    path: Path
    cases: Cases
    made_by: str = ""


TABLES: Mapping[str, Table] = {
    "vision": Table(("resnet_50", "mobilenet_v2", "convnext_tiny", "efficientnet_b0", "vit_base_16", "swin_tiny")),
    "encoders": Table(("bert_base", "distilbert_base", "whisper_tiny_encoder")),
    "architectures": Table(tuple(FULL_SIZE), EXPORTERS, ("optimizer", REFERENCE)),
    "tuning": Table(("resnet_50", "mobilenet_v2", "bert_base")),
    # Stock TVM's unscheduled loops would take the time of all others together.
    "kernels": Table((), engines=("optimizer", REFERENCE, "openvino", "peak")),
}


def subjects(
    table: str, only: Sequence[str], exporters: Sequence[Exporter], folder: Path, batch: int = 1
) -> Iterator[Subject]:
    """Yield the models of a table whose names match one of the patterns in `only`, or all if there are none.

    Single kernels are written to `folder`; they take no notice of `exporters` and `batch`.
    """

    def wanted(name: str) -> bool:
        return not only or any(fnmatch(name, pattern) for pattern in only)

    if table == "kernels":
        for case in cases():
            if wanted(case.name):
                path = case.save(folder)
                yield Subject(case.name, path, {"random": _random_inputs(path)})
        return
    several = len(exporters or TABLES[table].exporters) > 1
    for name in filter(wanted, TABLES[table].models):
        for exporter in exporters or TABLES[table].exporters:
            make = f"python -m benchmarks.models {name} --exporter {exporter} --batch {batch}"
            label = f"{name} {exporter}" if several else name
            yield Subject(label, model_path(name, exporter, batch), cases_of(name, batch), make)


def _random_inputs(model: Path) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(_SEED)
    declared = onnx.load(model, load_external_data=False).graph.input
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in declared}
    return {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
