"""Normalizations and quantization against onnxruntime, where the backend suite does not look."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.comparison import assert_same, node_model, ours


def numbers(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def check(
    operator: str, inputs: dict[str, np.ndarray], *, outputs: tuple[str, ...] = ("y",), **options: object
) -> None:
    assert_same(operator, inputs, outputs, domain="", **options)


def test_deviation_far_from_a_large_mean():
    """E[x^2] - E[x]^2 would have no digit right here."""
    x = numbers(2, 4, 6, 6) + np.float32(3000)
    scale, bias = numbers(4), numbers(4)
    x64 = x.astype(np.float64)
    centered = x64 - x64.mean((2, 3), keepdims=True)
    expected = centered / np.sqrt(x64.var((2, 3), keepdims=True) + 1e-5)
    expected = expected * scale.reshape(1, 4, 1, 1) + bias.reshape(1, 4, 1, 1)
    model = node_model("InstanceNormalization", {"x": x, "s": scale, "b": bias}, ["y"], domain="")
    # The inputs themselves are rounded to 2e-4; the mean is exact to about as much.
    np.testing.assert_allclose(ours(model)({"x": x, "s": scale, "b": bias})["y"], expected, atol=2e-3)


def test_statistics_of_a_symbolic_layer():
    inputs = {"x": numbers(2, 3, 8), "s": numbers(8), "b": numbers(8)}
    shapes = {"x": ["batch", "tokens", 8]}
    check("LayerNormalization", inputs, outputs=("y", "mean", "inverse"), shapes=shapes, opset=17)
    check("LayerNormalization", {"x": inputs["x"], "s": inputs["s"]}, shapes=shapes, opset=17)


def test_scale_and_bias_of_groups_and_of_channels():
    x = numbers(2, 6, 4, 3)
    shapes = {"x": ["batch", 6, "h", "w"]}
    check("GroupNormalization", {"x": x, "s": numbers(6), "b": numbers(6)}, num_groups=3, shapes=shapes, opset=21)


def test_running_statistics_of_a_training_batch():
    inputs = {"x": numbers(4, 3, 5), "s": numbers(3), "b": numbers(3), "m": numbers(3), "v": np.abs(numbers(3))}
    check("BatchNormalization", inputs, outputs=("y", "mean", "variance"), training_mode=1, momentum=0.7, opset=15)


def test_frozen_statistics_in_an_old_opset():
    inputs = {"x": numbers(4, 3, 5), "s": numbers(3), "b": numbers(3), "m": numbers(3), "v": np.abs(numbers(3))}
    check("BatchNormalization", inputs, constants=["s", "b", "m", "v"], opset=9)


@pytest.mark.parametrize("size", [3, 5])
def test_local_response(size: int):
    check("LRN", {"x": numbers(1, 7, 3, 3)}, size=size, alpha=0.3, beta=0.6, bias=1.5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_quantization_saturates_and_rounds_half_to_even(dtype: type):
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, 300.25]], np.float32)
    check("QuantizeLinear", {"x": x, "s": np.array(1, np.float32), "z": np.array(3, dtype)}, shapes={"x": ["n", 8]})


def test_quantized_convolution_per_channel():
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.integers(0, 255, (1, 3, 6, 6)).astype(np.uint8),
        "xs": np.array(0.02, np.float32),
        "xz": np.array(121, np.uint8),
        # Beyond 64 onnxruntime's sums of pairs saturate on x86 without VNNI.
        "w": rng.integers(-64, 65, (4, 3, 3, 3)).astype(np.int8),
        "ws": np.array([0.01, 0.02, 0.005, 0.03], np.float32),
        "wz": np.zeros(4, np.int8),
        "ys": np.array(0.05, np.float32),
        "yz": np.array(130, np.uint8),
        "b": rng.integers(-500, 500, 4).astype(np.int32),
    }
    constants = [name for name in inputs if name != "x"]
    check(
        "QLinearConv", inputs, constants=constants, shapes={"x": ["n", 3, "h", "w"]}, pads=[1, 1, 1, 1], strides=[2, 1]
    )


def test_integer_product_with_a_zero_point_per_column():
    rng = np.random.default_rng(0)
    inputs = {
        "a": rng.integers(0, 255, (2, 5, 7)).astype(np.uint8),
        "b": rng.integers(-128, 127, (7, 4)).astype(np.int8),
        "az": np.array(7, np.uint8),
        "bz": np.array([1, -2, 3, 0], np.int8),
    }
    check("MatMulInteger", inputs, constants=["b", "bz"], shapes={"a": ["n", "m", 7]}, opset=10)
