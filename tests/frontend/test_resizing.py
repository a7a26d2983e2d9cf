"""Resize and Upsample where the backend suite does not look: symbolic shapes, sizes from the graph, old opsets."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx.reference import ReferenceEvaluator

from optimizer.frontend.converters.resampling import NUMPY, Axis, Sampling, known_taps, line_through, source_position
from optimizer.frontend.importer import import_model
from tests.frontend.comparison import assert_close, node_model, ours

_IMAGE = np.random.default_rng(0).standard_normal((2, 3, 8, 6)).astype(np.float32)
_SYMBOLIC = {"x": ["n", 3, "h", "w"]}


def resize_model(scales: list[float], mode: str, **attributes: int) -> onnx.ModelProto:
    inputs = {"x": _IMAGE, "_roi": _IMAGE, "scales": np.array(scales, np.float32)}
    return node_model(
        "Resize", inputs, ["y"], domain="", constants=["scales"], shapes=_SYMBOLIC, mode=mode, **attributes
    )


def reference(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": ReferenceEvaluator(model).run(None, inputs)[0]}


def result_type(model: onnx.ModelProto) -> str:
    return str(import_model(model).module["main"].ret_ty)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_constant_scales_of_a_symbolic_image(mode: str):
    model = resize_model([1, 1, 0.5, 1.5], mode=mode)
    assert_close(ours(model)({"x": _IMAGE}), reference(model, {"x": _IMAGE}), tolerance=4)


@pytest.mark.parametrize(("scale", "length"), [(2, "h * 2"), (0.5, "h // 2"), (1.5, "h * 3 // 2")])
def test_constant_scales_keep_symbolic_dimensions(scale: float, length: str):
    model = resize_model([1, 1, scale, 1], mode="linear")
    assert result_type(model) == f'R.Tensor((n, 3, {length}, w), dtype="float32")'


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialiasing_of_a_symbolic_image(mode: str):
    model = resize_model([1, 1, 0.6, 0.25], mode=mode, antialias=1, exclude_outside=1)
    assert_close(ours(model)({"x": _IMAGE}), reference(model, {"x": _IMAGE}), tolerance=8)


def test_sizes_computed_from_the_shape_keep_the_other_dimensions():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 19]>
        g (float[n, 3, h, w] x) => (float[n, 3, a, b] y)
        <int64[2] two = {2, 2}, int64[1] begin = {0}, int64[1] middle = {2}, int64[1] end = {4}> {
            shape = Shape (x)
            outer = Slice (shape, begin, middle)
            image = Slice (shape, middle, end)
            larger = Mul (image, two)
            sizes = Concat <axis = 0> (outer, larger)
            y = Resize <mode = "linear"> (x, , , sizes)
        }"""
    )
    assert result_type(model) == 'R.Tensor((n, 3, h * 2, w * 2), dtype="float32")'
    assert_close(ours(model)({"x": _IMAGE}), reference(model, {"x": _IMAGE}), tolerance=4)


@pytest.mark.parametrize(("mode", "expected"), [("nearest", [[1.0, 3.0]]), ("linear", [[1.0, 8 / 3]])])
def test_shrinking_by_the_rules_of_opset_10(mode: str, expected: list[list[float]]):
    # The values are those of the backend suite of opset 10, which newer ones no longer hold.
    image = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 2, 4)
    inputs = {"x": image, "scales": np.array([1, 1, 0.6, 0.6], np.float32)}
    model = node_model("Resize", inputs, ["y"], domain="", opset=10, mode=mode)
    assert_close(ours(model)(inputs), {"y": np.array([[expected]], np.float32)}, tolerance=4)


def test_upsample_repeats_pixels():
    scales = [1.0, 1.0, 2.0, 3.0]
    model = node_model("Upsample", {"x": _IMAGE}, ["y"], domain="", opset=7, shapes=_SYMBOLIC, scales=scales)
    expected = np.repeat(np.repeat(_IMAGE, 2, axis=2), 3, axis=3)
    assert_close(ours(model)({"x": _IMAGE}), {"y": expected})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 300),
    output=st.integers(2, 300),
    coordinates=st.sampled_from(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]),
    filter_name=st.sampled_from(["linear", "cubic"]),
)
def test_a_line_gives_the_indices_that_it_is_drawn_through(
    length: int, output: int, coordinates: str, filter_name: str
) -> None:
    sampling = Sampling(filter_name, coordinates, "floor", -0.75, False, False)
    axis = Axis(float(length), float(output), output / length, float(output), 0.0, 1.0)
    places = np.arange(output)
    positions = np.asarray(source_position(sampling, axis, places.astype(np.float64), NUMPY))
    for indices in known_taps(sampling, axis)[0].T:
        line = line_through(indices, positions, length)
        if line is not None:
            quotients = (places * line.numerator + line.offset) // line.denominator
            np.testing.assert_array_equal(np.clip(quotients, 0, line.last), indices)


@pytest.mark.parametrize("output", [28, 112, 113, 224])
def test_usual_scales_make_lines(output: int) -> None:
    sampling = Sampling("linear", "half_pixel", "floor", -0.75, False, False)
    axis = Axis(56.0, float(output), output / 56, float(output), 0.0, 1.0)
    positions = np.asarray(source_position(sampling, axis, np.arange(output, dtype=np.float64), NUMPY))
    assert all(line_through(indices, positions, 56) is not None for indices in known_taps(sampling, axis)[0].T)
