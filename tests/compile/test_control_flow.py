"""Branches and loops through passes, fusion and weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper, parser

import targets
from optimizer.compile import CompileOptions, compile_in_memory, plan_model

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
    g (int64 trips, bool c, float[n, 32] x) => (float[n, 32] y) {
      z = If (c) <
        then_branch = t () => (float[n, 32] a) { p = MatMul(x, w) a = Tanh(p) },
        else_branch = e () => (float[n, 32] b) { s = Sigmoid(x) b = Mul(x, s) }
      >
      y = Loop (trips, c, z) <
        body = b (int64 i, bool going, float[n, 32] v) => (bool next, float[n, 32] after) {
          next = Identity(going)
          q = MatMul(v, w)
          after = Tanh(q)
        }
      >
    }"""
OPTIONS = CompileOptions(targets.resolve_host())


def model() -> tuple[onnx.ModelProto, np.ndarray]:
    parsed = parser.parse_model(TEXT)
    weight = (np.random.default_rng(0).standard_normal((32, 32)) / 6).astype(np.float32)
    parsed.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return parsed, weight


def test_branches_and_loops_are_rewritten_and_fused_and_share_weights(tmp_path) -> None:
    onnx.save(model()[0], tmp_path / "model.onnx")
    _, plan = plan_model(tmp_path / "model.onnx", OPTIONS)
    kernels = {kernel.function: kernel.nodes for kernel in plan.lowered.kernels}
    assert kernels["matmul_tanh_packed"] == (("z",), ("y",))
    assert kernels["silu"] == (("z",),)
    assert [weight.numpy().size for weight in plan.lifted.weights] == [32 * 32]


def test_branches_and_loops_that_share_weights_give_the_right_values() -> None:
    parsed, weight = model()
    run = compile_in_memory(parsed, OPTIONS)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    for trips in (0, 1, 5):
        expected = x
        for _ in range(trips + 1):
            expected = np.tanh(expected @ weight)
        given = {"c": np.array(True), "x": x, "trips": np.array(trips)}
        np.testing.assert_allclose(run(given)["y"], expected, rtol=1e-5, atol=1e-6)
    silu = x / (1 + np.exp(-x))
    given = {"c": np.array(False), "x": x, "trips": np.array(5)}
    np.testing.assert_allclose(run(given)["y"], silu, rtol=1e-5, atol=1e-6)
