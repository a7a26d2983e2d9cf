"""Which models each table compares, with their inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx

from benchmarks.architecture import EXPORTERS, Exporter
from benchmarks.engines import ENGINES, Cases
from benchmarks.kernels import cases
from benchmarks.models import FULL_SIZE, USUAL, Sizes, cases_of, model_path, takes_a_text

REFERENCE = "onnxruntime"
_SEED = 0
_BUNDLED = "decoder"
_BUNDLED_PATH = Path(__file__).resolve().parents[1] / "examples" / "decoder" / "model.onnx"


@dataclass(frozen=True)
class Table:
    """Which full-size models a table compares, of which exporters, on which engines if none are asked for."""

    models: tuple[str, ...]
    exporters: tuple[Exporter, ...] = ("dynamo",)
    engines: tuple[str, ...] = tuple(ENGINES)


@dataclass(frozen=True)
class Subject:
    """One model of a table: the label of its rows, its file, its inputs by case, and the command that makes it.

    `sizes` are those of its symbolic dimensions in the case that is tuned for. A kernel is a model of a few operators.
    """

    label: str
    path: Path
    cases: Cases
    made_by: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    is_kernel: bool = False


TABLES: Mapping[str, Table] = {
    "vision": Table(("resnet_50", "mobilenet_v2", "convnext_tiny", "efficientnet_b0", "vit_base_16", "swin_tiny")),
    "encoders": Table(("bert_base", "distilbert_base", "whisper_tiny_encoder")),
    "architectures": Table(tuple(FULL_SIZE), EXPORTERS, ("optimizer", REFERENCE)),
    "tuning": Table(("resnet_50", "mobilenet_v2", "bert_base")),
    "transfer": Table(("efficientnet_b0", "distilbert_base", "vit_base_16")),
    # Stock TVM's unscheduled loops would take the time of all others together.
    "kernels": Table((), engines=("optimizer", REFERENCE, "openvino", "optimizer-kernels", "peak")),
}


def subjects(
    table: str, only: Sequence[str], exporters: Sequence[Exporter], folder: Path, sizes: Sizes = USUAL
) -> Iterator[Subject]:
    """Yield the models of a table whose names match one of the patterns in `only`, or all if there are none.

    Single kernels are written to `folder`; they take no notice of `exporters` and `sizes`.
    With lengths of texts there are but the models that take one.
    """

    def wanted(name: str) -> bool:
        return not only or any(fnmatch(name, pattern) for pattern in only)

    if table == "kernels":
        for case in cases():
            if wanted(case.name):
                path = case.save(folder)
                yield Subject(case.name, path, {"random": random_inputs(path)}, is_kernel=True)
        return
    several = len(exporters or TABLES[table].exporters) > 1
    options = (f" --batch {sizes.batch}" if sizes.batch > 1 else "") + (" --any-length" if sizes.lengths else "")
    options += " --int8" if sizes.int8 else ""
    for name in filter(wanted, TABLES[table].models):
        if sizes.lengths and not takes_a_text(name):
            continue
        for exporter in exporters or TABLES[table].exporters:
            make = f"python -m benchmarks.models {name} --exporter {exporter}{options}"
            label = f"{name} {exporter}" if several else name
            yield Subject(label, model_path(name, exporter, sizes), cases_of(name, sizes), make)
    if table == "tuning" and wanted(_BUNDLED):
        yield _bundled_decoder()


def _bundled_decoder() -> Subject:
    """Return the bundled decoder making a token after others, without the rewriting of its cache."""
    sizes = {"batch": 1, "sequence": 1, "past_sequence": 64}
    generator = np.random.default_rng(_SEED)
    declared = onnx.load(_BUNDLED_PATH, load_external_data=False).graph.input
    inputs: dict[str, np.ndarray] = {}
    for value in declared:
        kind = value.type.tensor_type
        names = [size.dim_param or size.dim_value for size in kind.shape.dim]
        shape = [_size_of(name, sizes) for name in names]
        if kind.elem_type == onnx.TensorProto.FLOAT:
            inputs[value.name] = generator.standard_normal(shape, dtype=np.float32)
        else:  # tokens, positions and masks
            inputs[value.name] = np.ones(shape, np.int64)
    return Subject(_BUNDLED, _BUNDLED_PATH, {"decode": inputs}, sizes=sizes)


def _size_of(dimension: str | int, sizes: Mapping[str, int]) -> int:
    """Return a dimension's size: a number, a symbol, or a sum of symbols."""
    if isinstance(dimension, int):
        return dimension
    return sum(sizes[name.strip()] for name in dimension.split("+"))


def random_inputs(model: Path) -> dict[str, np.ndarray]:
    """Return normal values for the inputs of a model, and any codes or truth values for those of them.

    Integers are positions, below what the model's metadata says, as it says how large symbolic dimensions are.
    """
    generator = np.random.default_rng(_SEED)
    loaded = onnx.load(model, load_external_data=False)
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    inputs: dict[str, np.ndarray] = {}
    for value in loaded.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        shape = [int(metadata[f"size {each.dim_param}"]) if each.dim_param else each.dim_value for each in dimensions]
        kind = value.type.tensor_type.elem_type
        if kind == onnx.TensorProto.UINT8:
            inputs[value.name] = generator.integers(0, 256, shape, np.uint8)
        elif kind == onnx.TensorProto.INT64:
            inputs[value.name] = _positions(generator, shape, int(metadata[f"below {value.name}"]))
        elif kind == onnx.TensorProto.BOOL:
            inputs[value.name] = generator.integers(0, 2, shape).astype(np.bool_)
        else:
            inputs[value.name] = generator.standard_normal(shape, dtype=np.float32)
    return inputs


def _positions(generator: np.random.Generator, shape: list[int], below: int) -> np.ndarray:
    """Return integers below a number, all different where there are enough: else results depend on their order."""
    count = math.prod(shape)
    if count > below:
        return generator.integers(0, below, shape)
    return generator.permutation(below)[:count].reshape(shape)
