from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

import targets
from optimizer.compile import CompileOptions, compile_in_memory, plan_model

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
