"""Models whose kernels have symbolic intermediate tensors, compiled with schedules."""

from __future__ import annotations

import numpy as np
from onnx.reference import ReferenceEvaluator

import targets
from optimizer.compile import CompileOptions, compile_in_memory
from tests.frontend.comparison import assert_close, node_model

_OPTIONS = CompileOptions(targets.get("host"))


def test_antialiased_resize_of_a_half_precision_image_with_scales_known_at_run_time() -> None:
    """TVM sized the intermediate tensor, which is summed in fp32, by a loop variable that is not defined there."""
    inputs = {
        "x": np.random.default_rng(0).standard_normal((2, 3, 8, 6)).astype(np.float16),
        "scales": np.array([1, 1, 0.6, 0.5], np.float32),
    }
    shapes = {"x": ["n", 3, "h", "w"]}
    given = {"x": inputs["x"], "_roi": inputs["x"], "scales": inputs["scales"]}
    model = node_model("Resize", given, ["y"], domain="", shapes=shapes, mode="linear", antialias=1)
    results = compile_in_memory(model, _OPTIONS)(inputs)
    assert_close(results, {"y": ReferenceEvaluator(model).run(None, inputs)[0]}, tolerance=8)


def test_integer_product_with_a_zero_point_for_each_of_a_symbolic_number_of_rows() -> None:
    generator = np.random.default_rng(0)
    inputs = {
        "a": generator.integers(0, 255, (5, 40)).astype(np.uint8),
        "b": generator.integers(-100, 100, (40, 24)).astype(np.int8),
        "a_zero": np.arange(5, dtype=np.uint8),
        "b_zero": np.arange(24, dtype=np.int8),
    }
    model = node_model("MatMulInteger", inputs, ["y"], domain="", shapes={"a": ["m", "k"]})
    wide = {name: array.astype(np.int32) for name, array in inputs.items()}
    expected = (wide["a"] - wide["a_zero"][:, None]) @ (wide["b"] - wide["b_zero"])
    np.testing.assert_array_equal(compile_in_memory(model, _OPTIONS)(inputs)["y"], expected)
