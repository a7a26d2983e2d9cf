"""One node, imported and run as it is, against onnxruntime on the same random inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized

MICROSOFT = "com.microsoft"
Arrays = Mapping[str, np.ndarray]
Runner = Callable[[Arrays], dict[str, np.ndarray]]
# Sums of a few hundred products in another order: some roundings of each type, of the largest value.
TOLERANCE = {"float32": 32 * 2.0**-23, "float16": 4 * 2.0**-11}


def node_model(
    operator: str,
    inputs: Arrays,
    outputs: Sequence[str],
    *,
    domain: str = MICROSOFT,
    constants: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    opset: int = 21,
    **attributes: object,
) -> onnx.ModelProto:
    """Return a model of one node; an input of the name "" stands for one that is not given.

    `constants` names the inputs that are initializers. `shapes` declares dynamic dimensions.
    """
    declared = []
    for name, array in inputs.items():
        if name in constants or name.startswith("_"):
            continue
        shape = (shapes or {}).get(name, array.shape)
        declared.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    names = ["" if name.startswith("_") else name for name in inputs]
    node = helper.make_node(operator, names, list(outputs), domain=domain, **attributes)
    results = [onnx.ValueInfoProto(name=name) for name in outputs if name]
    stored = [numpy_helper.from_array(inputs[name], name) for name in constants]
    graph = helper.make_graph([node], operator, declared, results, stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def ours(model: onnx.ModelProto) -> Runner:
    """Import a model and return a function that runs it without any optimization."""
    return unoptimized(import_model(model))


def theirs(model: onnx.ModelProto) -> Runner:
    """Return a function that runs a model in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, the reference, is not installed")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def assert_same(
    operator: str, inputs: Arrays, outputs: Sequence[str], *, tolerance: float = 1.0, **options: object
) -> None:
    """Compare one node with onnxruntime; `tolerance` multiplies what rounding alone explains."""
    model = node_model(operator, inputs, outputs, **options)
    fed = {value.name: inputs[value.name] for value in model.graph.input}
    assert_close(ours(model)(fed), theirs(model)(fed), tolerance)


def assert_close(results: Arrays, references: Arrays, tolerance: float = 1.0) -> None:
    """Compare outputs by name: shape, dtype, and values within the rounding of their type; integers within one."""
    assert list(results) == list(references)
    for name, expected in references.items():
        given = results[name]
        assert (given.shape, given.dtype) == (expected.shape, expected.dtype), name
        if expected.size == 0:
            continue
        if given.dtype.kind in "iub":
            step = np.abs(given.astype(np.int64) - expected.astype(np.int64)).max()
            assert step <= (1 if given.dtype.itemsize == 1 else 0), f"{name} differs by {step}"
            continue
        limit = tolerance * TOLERANCE[expected.dtype.name] * max(float(np.abs(expected).max()), 1.0)
        np.testing.assert_allclose(
            given.astype(np.float64), expected.astype(np.float64), rtol=0, atol=limit, err_msg=name
        )


def element_type(name: str) -> int:
    """Return the ONNX element type called `name`."""
    return TensorProto.DataType.Value(name)
