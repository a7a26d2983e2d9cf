from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

import targets
from optimizer.compile import CompileOptions, compile_in_memory, compile_model, plan_model
from optimizer.runtime import load

_EMPTY = """<ir_version: 8, opset_import: ["": 17]>
g (float[1] x) => (float[1] y, int64[1, 1, 0] z, float[0, 2] w)
<int64[1, 1, 3] c = {6, 2, 0}, int64[1] two = {2}, int64[1] one = {1}, int64[1] nil = {0}, float[1, 2] d = {1, 2}>
{
    y = Ceil(x)
    z = Slice(c, two, two, two, one)
    e = Slice(d, nil, nil, nil)
    w = Add(e, x)
}"""


def test_constants_without_elements_survive_the_package(tmp_path) -> None:
    onnx.save(onnx.parser.parse_model(_EMPTY), tmp_path / "empty.onnx")
    compile_model(tmp_path / "empty.onnx", tmp_path / "package", CompileOptions(targets.get("host")))
    outputs = load(tmp_path / "package")({"x": np.array([0.5], np.float32)})
    assert [(value.shape, value.dtype.name) for value in outputs.values()] == [
        ((1,), "float32"),
        ((1, 1, 0), "int64"),
        ((0, 2), "float32"),
    ]


_MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[2000, 2000] y, float[n, 4] z)
<float one_and_a_half = {1.5}, int64[2] shape = {2000, 2000}>
{
    y = Expand(one_and_a_half, shape)
    z = Relu(x)
}"""


def test_expand_of_a_scalar_is_computed_at_run_time(tmp_path) -> None:
    model, options = onnx.parser.parse_model(_MODEL), CompileOptions(targets.get("host"))
    path = tmp_path / "expand.onnx"
    onnx.save(model, path)
    _, plan = plan_model(path, options)
    assert sum(weight.numpy().nbytes for weight in plan.lifted.weights) == 0
    outputs = compile_in_memory(model, options)({"x": np.zeros((1, 4), np.float32)})
    assert outputs["y"].shape == (2000, 2000)
    assert (outputs["y"] == 1.5).all()
