"""Convolutions and poolings against onnxruntime, where the backend suite does not look."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.comparison import assert_same


def numbers(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def check(
    operator: str, inputs: dict[str, np.ndarray], *, outputs: tuple[str, ...] = ("y",), **options: object
) -> None:
    assert_same(operator, inputs, outputs, domain="", **options)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolution_of_a_symbolic_image(auto_pad: str):
    inputs = {"x": numbers(2, 4, 9, 8), "w": numbers(6, 2, 3, 2), "b": numbers(6)}
    shapes = {"x": ["batch", 4, "height", "width"]}
    pads = {"pads": [1, 0, 2, 1]} if auto_pad == "NOTSET" else {}
    check("Conv", inputs, constants=["w", "b"], shapes=shapes, auto_pad=auto_pad, group=2, strides=[2, 3], **pads)


@pytest.mark.parametrize("rank", [1, 3])
def test_dilated_convolution_over_one_and_three_axes(rank: int):
    inputs = {"x": numbers(1, 2, *[7] * rank), "w": numbers(3, 2, *[2] * rank), "b": numbers(3)}
    check("Conv", inputs, dilations=[2] * rank, pads=[1, 2, 0][:rank] * 2)


def test_transposed_convolution_that_tvm_does_not_cover():
    inputs = {"x": numbers(1, 4, 5, 5), "w": numbers(4, 3, 2, 2), "b": numbers(6)}
    # Padding as wide as the kernel, and groups.
    check("ConvTranspose", inputs, strides=[3, 3], pads=[2, 2, 0, 0], output_padding=[2, 1], group=2)
    check("ConvTranspose", inputs, shapes={"x": [1, 4, "h", "w"]}, auto_pad="SAME_LOWER", strides=[2, 2], group=2)


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("include", [0, 1])
def test_average_over_dilated_windows_of_a_symbolic_image(ceil_mode: int, include: int):
    options = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 0], "ceil_mode": ceil_mode}
    inputs, shapes = {"x": numbers(1, 2, 8, 7)}, {"x": [1, 2, "h", "w"]}
    check("AveragePool", inputs, shapes=shapes, count_include_pad=include, **options)
    check("AveragePool", inputs, count_include_pad=include, dilations=[2, 2], **options)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("outputs", [("y",), ("y", "indices")])
def test_maximum_and_its_place(symbolic: bool, outputs: tuple[str, ...]):
    shapes = {"x": ["n", 3, "h", "w"]} if symbolic else None
    options = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1, "dilations": [1, 2]}
    check("MaxPool", {"x": numbers(2, 3, 8, 9)}, outputs=outputs, shapes=shapes, **options)


def test_maximum_of_negative_bytes():
    check("MaxPool", {"x": np.arange(-60, -28, dtype=np.int8).reshape(1, 2, 4, 4)}, kernel_shape=[2, 2], opset=12)


@pytest.mark.parametrize("operator", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pooling(operator: str):
    check(operator, {"x": numbers(2, 3, 4, 5)}, shapes={"x": ["n", 3, "h", "w"]})


def test_region_pooling():
    regions = np.array([[0, 0, 0, 7, 7], [1, 2.4, 1.6, 5.2, 9], [0, 6, 6, 30, 30]], np.float32)
    check("MaxRoiPool", {"x": numbers(2, 2, 8, 8), "r": regions}, pooled_shape=[3, 2], spatial_scale=0.7)
