"""Detection, sampling and signals against onnxruntime, where the backend suite does not look."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.comparison import assert_close, assert_same, node_model, ours, theirs


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("centered", [0, 1])
def test_suppression_over_batches_and_classes(centered: int):
    rng = np.random.default_rng(3)
    inputs = {
        "boxes": rng.uniform(0, 4, (2, 30, 4)).astype(np.float32),
        "scores": rng.uniform(0, 1, (2, 3, 30)).astype(np.float32).round(1),  # with ties
        "most": np.array([6], np.int64),
        "overlap": np.array([0.3], np.float32),
        "threshold": np.array([0.4], np.float32),
    }
    shapes = {"boxes": ["batch", "n", 4], "scores": ["batch", 3, "n"]}
    assert_same("NonMaxSuppression", inputs, ["y"], domain="", shapes=shapes, center_point_box=centered)


def test_suppression_among_many_boxes_without_a_threshold():
    rng = np.random.default_rng(4)
    corners = rng.uniform(0, 9, (1, 201, 2))
    inputs = {
        "boxes": np.concatenate([corners, corners + rng.uniform(0, 3, corners.shape)], -1).astype(np.float32),
        "scores": rng.integers(0, 50, (1, 1, 201)).astype(np.float32),  # with ties
        "most": np.array([60], np.int64),
        "overlap": np.array([0.2], np.float32),
    }
    assert_same("NonMaxSuppression", inputs, ["y"], domain="")


def test_suppression_that_selects_nothing():
    inputs = {"boxes": numbers(1, 4, 4), "scores": numbers(1, 2, 4)}
    model = node_model("NonMaxSuppression", inputs, ["y"], domain="")
    assert ours(model)(inputs)["y"].shape == (0, 3)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_region_alignment(mode: str, ratio: int):
    regions = np.array([[0, 0, 7, 7], [2.4, 1.6, 5.2, 11], [-3, 6, 30, 6.5]], np.float32)
    inputs = {"x": numbers(2, 2, 8, 9), "r": regions, "b": np.array([0, 1, 0], np.int64)}
    options = {"output_height": 3, "output_width": 2, "sampling_ratio": ratio, "spatial_scale": 0.8}
    assert_same("RoiAlign", inputs, ["y"], domain="", mode=mode, opset=16, tolerance=4, **options)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
def test_sampling_far_outside_of_a_symbolic_image(mode: str, padding: str):
    inputs = {"x": numbers(2, 3, 5, 6), "g": 3 * numbers(2, 4, 3, 2)}
    for aligned in (0, 1):
        assert_same(
            "GridSample",
            inputs,
            ["y"],
            domain="",
            shapes={"x": ["n", 3, "h", "w"]},
            mode=mode,
            padding_mode=padding,
            align_corners=aligned,
            tolerance=16,
        )


def test_as_many_grids_as_maps_whatever_the_given_size_says():
    maps = numbers(2, 2, 3)
    model = node_model("AffineGrid", {"t": maps, "s": np.zeros(4, np.int64)}, ["y"], domain="", shapes={})
    given = ours(model)({"t": maps, "s": np.array([3, 1, 2, 5], np.int64)})["y"]
    assert_close({"y": given}, theirs(model)({"t": maps, "s": np.array([2, 1, 2, 5], np.int64)}))


@pytest.mark.parametrize("inverse", [0, 1])
def test_transform_of_symbolic_length_equals_that_of_known_length(inverse: int):
    x = numbers(2, 12, 2)
    results = []
    for length in (12, "length"):
        model = node_model("DFT", {"x": x}, ["y"], domain="", shapes={"x": [2, length, 2]}, inverse=inverse)
        results.append(ours(model)({"x": x}))
    signal = x[..., 0] + 1j * x[..., 1]
    expected = np.fft.ifft(signal) if inverse else np.fft.fft(signal)
    for result in results:
        assert_close(result, {"y": np.stack([expected.real, expected.imag], -1).astype(np.float32)})
