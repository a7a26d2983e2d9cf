"""The cases of ONNX's own backend suite (`onnx.backend.test`): node cases, small models and the `light_*` models.

Making the node cases takes half a minute, so they are kept in a file beside the interpreter's temporary files, once
for each version of onnx.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test import loader
from onnx.backend.test.case.test_case import TestCase

NODE, MODEL, LIGHT = "node", "model", "light"
_MODEL_KINDS = ("simple", "pytorch-converted", "pytorch-operator")
# The types of numpy itself: the suite's tensors of other types (bfloat16, 8-bit and 4-bit numbers) are not counted
# among the plain ones.
_NUMPY_TYPES = frozenset(
    [
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
        "float16",
        "float32",
        "float64",
        "bool",
    ]
)


@dataclass(frozen=True)
class BackendCase:
    """One case: a model, its inputs and expected outputs in order, and the tolerances that the suite gives it.

    An item that is not a tensor (a sequence, an optional) stands as the suite gives it. `is_plain` says that the suite
    gives all inputs and outputs as arrays of numpy's own number types.
    """

    name: str
    kind: str
    model_bytes: bytes
    inputs: tuple[object, ...]
    outputs: tuple[object, ...]
    rtol: float
    atol: float
    is_plain: bool

    @property
    def model(self) -> onnx.ModelProto:
        """Return the model."""
        return onnx.ModelProto.FromString(self.model_bytes)

    @property
    def operators(self) -> tuple[str, ...]:
        """Return the operators of the model, each once."""
        nodes = self.model.graph.node
        return tuple(dict.fromkeys(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes))


@cache
def node_cases() -> tuple[BackendCase, ...]:
    """Return all node cases of the installed onnx."""
    path = Path(tempfile.gettempdir()) / f"onnx-backend-node-cases-{onnx.__version__}-{os.getuid()}.pickle"
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_bytes(pickle.dumps(tuple(_generated_node_cases())))
            unfinished.replace(path)
    return tuple(_case(*fields) for fields in pickle.loads(path.read_bytes()))


@cache
def model_cases() -> tuple[BackendCase, ...]:
    """Return the cases with a model on disk, other than the `light_*` models."""
    return tuple(case for kind in _MODEL_KINDS for test in loader.load_model_tests(kind=kind) for case in _stored(test))


@cache
def light_cases() -> tuple[BackendCase, ...]:
    """Return the `light_*` models: the architectures of the model zoo with weights made by ConstantOfShape.

    Their input is the ramp that onnx's own runner gives them.
    """
    root = Path(loader.DATA_DIR) / "light"
    return tuple(_light(path) for path in sorted(root.glob("light_*.onnx")))


def all_cases() -> tuple[BackendCase, ...]:
    """Return the cases of all three kinds."""
    return node_cases() + model_cases() + light_cases()


def case_named(name: str) -> BackendCase:
    """Return the case with this name."""
    return next(case for case in all_cases() if case.name == name)


def _generated_node_cases() -> Iterator[tuple[object, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = loader.load_model_tests(kind="node")
    for test in tests:
        for inputs, outputs in test.data_sets or ():
            yield test.name, NODE, test.model.SerializeToString(), inputs, outputs, test.rtol, test.atol


def _stored(test: TestCase) -> Iterator[BackendCase]:
    directory = Path(test.model_dir or "")
    model = onnx.load(directory / "model.onnx")
    for index, data in enumerate(sorted(directory.glob("test_data_set_*"))):
        name = test.name if index == 0 else f"{test.name}_{index}"
        inputs = _stored_items(data, "input", model.graph.input)
        outputs = _stored_items(data, "output", model.graph.output)
        yield _case(name, MODEL, model.SerializeToString(), inputs, outputs, test.rtol, test.atol)


def _stored_items(directory: Path, prefix: str, declared: Sequence[onnx.ValueInfoProto]) -> list[object]:
    items: list[object] = []
    for index in range(len(list(directory.glob(f"{prefix}_*.pb")))):
        content = (directory / f"{prefix}_{index}.pb").read_bytes()
        if declared[index].type.HasField("sequence_type"):
            items.append(numpy_helper.to_list(onnx.SequenceProto.FromString(content)))
        else:
            items.append(onnx.TensorProto.FromString(content))
    return items


def _light(path: Path) -> BackendCase:
    model = onnx.load(path)
    initializers = {tensor.name for tensor in model.graph.initializer}
    (declared,) = [value for value in model.graph.input if value.name not in initializers]
    shape = [dimension.dim_value for dimension in declared.type.tensor_type.shape.dim]
    count = int(np.prod(shape))
    ramp = (np.arange(count).reshape(shape) / count).astype(np.float32)
    stored = onnx.TensorProto.FromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
    return _case(path.stem, LIGHT, model.SerializeToString(), [ramp], [stored], 1e-3, 1e-7)


def _case(
    name: str, kind: str, model: bytes, inputs: Sequence[object], outputs: Sequence[object], rtol: float, atol: float
) -> BackendCase:
    is_plain = all(isinstance(item, np.ndarray) and item.dtype.name in _NUMPY_TYPES for item in (*inputs, *outputs))
    return BackendCase(name, kind, model, tuple(map(_item, inputs)), tuple(map(_item, outputs)), rtol, atol, is_plain)


def _item(item: object) -> object:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else item
