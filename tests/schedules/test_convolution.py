from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.relax import op

from tests.schedules.execution import integers, normal, run, sum_tolerance


def convolve(
    x: np.ndarray, w: np.ndarray, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> np.ndarray:
    """Return the convolution over any number of spatial dimensions, in float64 (int64 for integers)."""
    wide = "int64" if np.issubdtype(x.dtype, np.integer) else "float64"
    spatial = x.ndim - 2
    x = np.pad(x.astype(wide), [(0, 0), (0, 0), *[(padding, padding)] * spatial])
    taps = w.shape[2:]
    out = [(size - dilation * (tap - 1) - 1) // stride + 1 for size, tap in zip(x.shape[2:], taps, strict=True)]
    per_group, channels = w.shape[0] // groups, w.shape[1]
    result = np.zeros((x.shape[0], w.shape[0], *out), wide)
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        source = x[:, group * channels : (group + 1) * channels]
        for tap in np.ndindex(*taps):
            window = [
                slice(t * dilation, t * dilation + (o - 1) * stride + 1, stride) for t, o in zip(tap, out, strict=True)
            ]
            product = np.tensordot(w[(rows, slice(None), *tap)].astype(wide), source[(..., *window)], axes=(1, 1))
            result[:, rows] += np.moveaxis(product, 1, 0)
    return result


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(5, 19), st.integers(5, 19)),
    channels=st.sampled_from([(1, 1), (3, 5), (4, 8), (5, 17)]),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.integers(0, 2),
    dilation=st.sampled_from([1, 2]),
)
def test_convolution_with_bias_and_activation(
    size: tuple[int, int], channels: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int
) -> None:
    dilation = 1 if kernel == 5 else dilation
    x, w = normal(2, channels[0], *size), normal(channels[1], channels[0], kernel, kernel, seed=1)
    bias = normal(1, channels[1], 1, 1, seed=2)
    got, _ = run(
        lambda x, w, b: op.nn.relu(op.add(op.nn.conv2d(x, w, strides=stride, padding=padding, dilation=dilation), b)),
        [x, w, bias],
    )
    want = np.maximum(convolve(x, w, stride, padding, dilation) + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(channels[0] * kernel**2, 1.0))


@pytest.mark.parametrize(
    ("channels", "out", "groups", "stride"), [(8, 12, 2, 1), (16, 32, 4, 2), (7, 7, 7, 1), (8, 8, 8, 2), (6, 12, 6, 1)]
)
def test_groups_and_depthwise(channels: int, out: int, groups: int, stride: int) -> None:
    x, w = normal(1, channels, 11, 9), normal(out, channels // groups, 3, 3, seed=1)
    got, families = run(lambda x, w: op.nn.conv2d(x, w, strides=stride, padding=1, groups=groups), [x, w])
    np.testing.assert_allclose(
        got, convolve(x, w, stride, 1, groups=groups), rtol=1e-6, atol=sum_tolerance(9 * channels // groups, 1.0)
    )
    assert families == {"convolution"}


def test_pointwise_convolution_with_residual_is_a_matmul() -> None:
    x, w, residual = normal(2, 17, 7, 7), normal(19, 17, 1, 1, seed=1), normal(2, 19, 7, 7, seed=2)
    got, families = run(lambda x, w, r: op.add(op.nn.conv2d(x, w), r), [x, w, residual])
    np.testing.assert_allclose(got, convolve(x, w) + residual, rtol=1e-6, atol=sum_tolerance(17, 1.0))
    assert families == {"matmul"}


def test_symbolic_batch_and_image_size() -> None:
    x, w = normal(2, 3, 9, 12), normal(5, 3, 3, 3, seed=1)
    got, _ = run(lambda x, w: op.nn.conv2d(x, w, padding=1, strides=2), [x, w], [("n", 3, "h", "w"), (5, 3, 3, 3)])
    np.testing.assert_allclose(got, convolve(x, w, 2, 1), rtol=1e-6, atol=sum_tolerance(27, 1.0))


def test_int8_convolution_accumulates_exactly_in_int32() -> None:
    x, w = integers(1, 5, 9, 8), integers(6, 5, 3, 3, seed=1)
    got, _ = run(lambda x, w: op.nn.conv2d(x, w, padding=1, out_dtype="int32"), [x, w])
    np.testing.assert_array_equal(got, convolve(x, w, 1, 1))


def test_fp16_convolution_accumulates_in_fp32() -> None:
    x, w = normal(1, 16, 9, 8, dtype="float16"), normal(6, 16, 3, 3, dtype="float16", seed=1)
    got, _ = run(lambda x, w: op.nn.conv2d(x, w, padding=1), [x, w])
    np.testing.assert_allclose(got, convolve(x, w, 1, 1), rtol=2.0**-11, atol=sum_tolerance(144, 1.0))


def test_one_and_three_spatial_dimensions() -> None:
    x, w = normal(2, 5, 19), normal(7, 5, 3, seed=1)
    got, _ = run(lambda x, w: op.nn.conv1d(x, w, strides=2, padding=1), [x, w])
    np.testing.assert_allclose(got, convolve(x, w, 2, 1), rtol=1e-6, atol=sum_tolerance(15, 1.0))
    x, w = normal(1, 3, 5, 6, 7), normal(4, 3, 3, 3, 3, seed=1)
    got, _ = run(lambda x, w: op.nn.conv3d(x, w, padding=1), [x, w])
    np.testing.assert_allclose(got, convolve(x, w, 1, 1), rtol=1e-6, atol=sum_tolerance(81, 1.0))


def test_transposed_convolution() -> None:
    x, w = normal(1, 4, 5, 6), normal(4, 3, 3, 3, seed=1)
    got, families = run(lambda x, w: op.nn.conv2d_transpose(x, w, strides=2, padding=1), [x, w])
    dilated = np.zeros((1, 4, 9, 11))
    dilated[:, :, ::2, ::2] = x
    want = convolve(dilated, w[:, :, ::-1, ::-1].transpose(1, 0, 2, 3), 1, 1)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(36, 1.0))
    assert families == {"convolution"}
