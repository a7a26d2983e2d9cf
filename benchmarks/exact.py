"""Outputs of a model as it is written, not as an engine optimizes it: who is right where two engines differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from optimizer.certificate.references import Reference, ReferenceFailedError, references

Arrays = Mapping[str, np.ndarray]


def in_float64(model: onnx.ModelProto, inputs: Arrays) -> dict[str, np.ndarray] | None:
    """Return the outputs of a model whose fp32 tensors are float64; None if it has operators not of ONNX itself."""
    if any(node.domain not in ("", "ai.onnx") for node in model.graph.node):
        return None
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in wide.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*wide.graph.input, *wide.graph.output, *wide.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    feeds = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in inputs.items()}
    names = [output.name for output in wide.graph.output]
    results = ReferenceEvaluator(wide).run(names, feeds)
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}


def unoptimized(model: onnx.ModelProto, path: Path, inputs: Arrays) -> Arrays | None:
    """Return the outputs of onnxruntime without graph optimizations, as certificates take them: codes become floats."""
    try:
        reference: Reference = next(iter(references(model, path, None, None)))()
        return reference.run(inputs)
    except ReferenceFailedError:
        return None
