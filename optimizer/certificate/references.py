"""What a compiled model is compared with: onnxruntime, the ONNX reference evaluator, or the unoptimized module."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from optimizer.certificate.unsigned_weights import saturates, with_unsigned_weights

Array = NDArray[np.generic]
Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]
ReferenceKind = Literal["onnxruntime", "onnx", "unoptimized", "dequantized"]

# What MatMulNBits may round its activations to, in onnxruntime's words.
_ACCURACY_LEVEL = "accuracy_level"
_FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 0, 4
# onnxruntime's name (onnxruntime_session_options_config_keys.h) of where a model in memory has its external data.
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
# And that of `unsigned_weights` where its optimizations turn floats into integers.
_EXACT_SUMS_OF_BYTES = "session.x64quantprecision"


class ReferenceFailedError(Exception):
    """The reference cannot run this model, or not with these inputs."""


@dataclass(frozen=True)
class Reference:
    """A way to run the model; `run` raises ReferenceFailedError for inputs that it does not accept."""

    kind: ReferenceKind
    version: str
    run: Runner


def references(
    model: onnx.ModelProto,
    path: Path | None,
    dequantized: Runner | None,
    unoptimized: Runner | None,
    *,
    rounds_activations: bool = False,
) -> Iterator[Callable[[], Reference]]:
    """Yield constructors of references, the most trusted first; each raises ReferenceFailedError if it cannot.

    A model whose weights were rounded has one reference only, itself with those weights. Where the package
    `rounds_activations` of MatMulNBits to int8, onnxruntime does so too, and else it does not, whatever accuracy level
    the model allows: rounding them is a choice that the manifest states, and no error.
    """
    if dequantized is not None:
        yield lambda: Reference("dequantized", onnx.__version__, _refusing(dequantized))
        return
    if importlib.util.find_spec("onnxruntime") is not None:
        same = _with_accuracy_level(model, _INT8_ACTIVATIONS if rounds_activations else _FLOAT_ACTIVATIONS)
        yield lambda: _onnxruntime(same, path, is_as_stored=same is model)
    yield lambda: _evaluator(model, path)
    if unoptimized is not None:
        yield lambda: Reference("unoptimized", onnx.__version__, _refusing(unoptimized))


def _refusing(run: Runner) -> Runner:
    """Return what runs a module, and raises ReferenceFailedError where the module fails at its inputs."""

    def checked(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            return run(inputs)
        except RuntimeError as error:
            raise ReferenceFailedError(str(error)) from error

    return checked


def optimized_onnxruntime(model: onnx.ModelProto, path: Path | None) -> Reference:
    """Return onnxruntime with its graph optimizations, which compute quantized models in integers.

    Raises ReferenceFailedError if it cannot load the model.
    """
    return _onnxruntime(model, path, optimized=True)


def perturbed_onnxruntime(model: onnx.ModelProto, path: Path | None) -> Reference:
    """Return onnxruntime with each number of fp32 that the model holds moved to the next larger one.

    Raises ReferenceFailedError if it cannot load the model.
    """
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    for tensor in moved.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.data_location != onnx.TensorProto.EXTERNAL:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.nextafter(values, np.float32(np.inf)), tensor.name))
    return _onnxruntime(moved, path, is_as_stored=False)


def _with_accuracy_level(model: onnx.ModelProto, level: int) -> onnx.ModelProto:
    """Return the model with an accuracy level for each MatMulNBits: itself where all have it."""
    if all(_accuracy_level(node) == level for node in model.graph.node if node.op_type == "MatMulNBits"):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != _ACCURACY_LEVEL]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(_ACCURACY_LEVEL, level)])
    return changed


def _accuracy_level(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == _ACCURACY_LEVEL), _FLOAT_ACTIVATIONS)


def _onnxruntime(
    model: onnx.ModelProto, path: Path | None, *, optimized: bool = False, is_as_stored: bool = True
) -> Reference:
    """Return onnxruntime with a model, of which `path` holds the whole if it `is_as_stored`, else the external data.

    Its sums of products of bytes are exact where weights are constants.
    """
    import onnxruntime  # noqa: PLC0415 - an optional dependency

    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = ("Fail", "InvalidArgument", "InvalidGraph", "NoSuchFile", "NotImplemented", "RuntimeException", "EPFail")
    errors = (RuntimeError, ValueError, *(getattr(state, name) for name in names))
    beyond_numpy = _beyond_numpy(model)
    if beyond_numpy:
        raise ReferenceFailedError(f"its Python interface has no arrays of {beyond_numpy}")
    exact = with_unsigned_weights(model, None if path is None else path.parent) if saturates() else None
    if exact is not None:
        model, is_as_stored = exact, False
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry(_EXACT_SUMS_OF_BYTES, "1")
    if path is not None and not is_as_stored:
        options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(path.parent))
    try:
        source = str(path) if path is not None and is_as_stored else model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except errors as error:
        raise ReferenceFailedError(str(error)) from error
    outputs = [output.name for output in model.graph.output]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = session.run(outputs, dict(inputs))
        except errors as error:
            raise ReferenceFailedError(str(error)) from error
        return {name: np.asarray(result) for name, result in zip(outputs, results, strict=True)}

    return Reference("onnxruntime", onnxruntime.__version__, run)


def _beyond_numpy(model: onnx.ModelProto) -> str:
    """Return the name of an input's or output's type that NumPy lacks, or ""."""
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind and np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).isbuiltin != 1:
            return onnx.TensorProto.DataType.Name(kind)
    return ""


def _evaluator(model: onnx.ModelProto, path: Path | None) -> Reference:
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - slow to import

    try:
        evaluator = ReferenceEvaluator(str(path) if path is not None else model)
    except Exception as error:
        raise ReferenceFailedError(str(error)) from error  # its constructor runs Python code of every operator
    outputs = [output.name for output in model.graph.output]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            with np.errstate(all="ignore"):
                results = evaluator.run(outputs, dict(inputs))
        except Exception as error:
            raise ReferenceFailedError(str(error)) from error  # as above
        return {name: np.asarray(result) for name, result in zip(outputs, results, strict=True)}

    return Reference("onnx", onnx.__version__, run)
