"""Poolings of plain images against numpy, over drawn windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.relax import op

from tests.schedules.execution import integers, normal, run, sum_tolerance

# With so many channels whole planes are tasks, with few of them rows are.
FEW, MANY = 3, 40
MAXIMUM = {1: op.nn.max_pool1d, 2: op.nn.max_pool2d, 3: op.nn.max_pool3d}


def windows(x: np.ndarray, kernel: tuple[int, ...], stride: int, pad: int, dilation: int, padding: float) -> np.ndarray:
    """Return each output's window, flattened into the last axis."""
    spatial = len(kernel)
    x = np.pad(x, [(0, 0), (0, 0), *[(pad, pad)] * spatial], constant_values=padding)
    taps = []
    sizes = [(n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    for tap in np.ndindex(*kernel):
        places = zip(tap, sizes, strict=True)
        slices = [slice(t * dilation, t * dilation + (size - 1) * stride + 1, stride) for t, size in places]
        taps.append(x[(slice(None), slice(None), *slices)])
    return np.stack(taps, axis=-1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.lists(st.sampled_from([7, 13, 16, 31, 33, 57]), min_size=1, max_size=3),
    kernel=st.sampled_from([2, 3, 5]),
    stride=st.sampled_from([1, 2, 3, 5]),
    pad=st.integers(0, 1),
    dilation=st.sampled_from([1, 2]),
)
def test_maxima_of_drawn_windows(size: list[int], kernel: int, stride: int, pad: int, dilation: int) -> None:
    if len(size) == 3:
        size = [min(extent, 16) for extent in size]
    if min(size) + 2 * pad < (kernel - 1) * dilation + 2:
        kernel, dilation = 2, 1
    x = normal(2, FEW, *size)
    rank = len(size)
    taps, steps = (kernel,) * rank, (stride,) * rank
    got, _ = run(lambda x: MAXIMUM[rank](x, taps, steps, (pad,) * (2 * rank), (dilation,) * rank), [x])
    np.testing.assert_array_equal(got, windows(x, taps, stride, pad, dilation, -np.inf).max(axis=-1))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    size=st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 13, 14, 17, 31, 40]), min_size=1, max_size=2),
    columns=st.sampled_from([2, 3, 7, 8, 13, 14, 16, 17, 37, 64, 131, 200, 331]),
    kernel=st.sampled_from([1, 2, 3, 5, 13]),
    stride=st.integers(1, 4),
    pad=st.integers(0, 6),
    dilation=st.sampled_from([1, 1, 2]),
    dtype=st.sampled_from(["float32", "float32", "int8", "uint8", "float16"]),
)
def test_maxima_of_whole_planes(
    size: list[int], columns: int, kernel: int, stride: int, pad: int, dilation: int, dtype: str
) -> None:
    size = [*size[1:], columns]
    taps = tuple(min(kernel, extent) for extent in size)
    pads = tuple(min(pad, tap // 2) for tap in taps)
    reach = tuple(dilation * (tap - 1) + 1 for tap in taps)
    if any(span > extent + 2 * own for span, extent, own in zip(reach, size, pads, strict=True)):
        dilation, reach = 1, taps
    x, rank = integers(1, MANY, *size, dtype=dtype), len(size)
    steps, both = (stride,) * rank, [(0, 0), (0, 0), *((own, own) for own in pads)]
    got, _ = run(lambda x: MAXIMUM[rank](x, taps, steps, pads * 2, (dilation,) * rank), [x])
    least = np.iinfo(dtype).min if "int" in dtype else -np.inf
    padded = np.pad(x, both, constant_values=least)
    views = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, 2 + rank)))
    among = (slice(None), slice(None), *[slice(None, None, stride)] * rank, *[slice(None, None, dilation)] * rank)
    np.testing.assert_array_equal(got, views[among].max(axis=tuple(range(-rank, 0))))


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("channels", [FEW, MANY])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((37, 50), 3, 2), ((9, 5), 2, 1), ((17, 40), 5, 3), ((8, 8), 3, 1), ((5, 16), 3, 1)]
)
def test_averages_count_what_is_asked_for(
    include: bool, channels: int, size: tuple[int, int], kernel: int, stride: int
) -> None:
    x, taps = normal(1, channels, *size), (kernel, kernel)
    got, families = run(
        lambda x: op.nn.avg_pool2d(x, taps, (stride, stride), (1, 1, 1, 1), count_include_pad=include), [x]
    )
    of_padding = windows(np.ones_like(x), taps, stride, 1, 1, 1.0 if include else 0.0).sum(axis=-1)
    want = windows(x, taps, stride, 1, 1, 0.0).sum(axis=-1, dtype=np.float64) / of_padding
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(kernel**2, 1.0))
    assert families == {"pooling"}


def test_windows_longer_than_what_is_written_out() -> None:
    x = normal(1, 3, 23, 41)
    got, families = run(lambda x: op.nn.max_pool2d(x, (17, 19), (1, 2), (8, 9, 8, 9)), [x])
    padded = np.pad(x, [(0, 0), (0, 0), (8, 8), (9, 9)], constant_values=-np.inf)
    want = np.lib.stride_tricks.sliding_window_view(padded, (17, 19), (2, 3))[:, :, :, ::2].max(axis=(-1, -2))
    np.testing.assert_array_equal(got, want)
    assert families == {"pooling"}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float16"])
def test_maxima_of_narrow_types(dtype: str) -> None:
    x = integers(1, MANY, 21, 70, dtype=dtype) if "int" in dtype else normal(1, MANY, 21, 70).astype(dtype)
    got, _ = run(lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)), [x])
    lowest = np.iinfo(dtype).min if "int" in dtype else -np.inf
    np.testing.assert_array_equal(got, windows(x, (3, 3), 2, 1, 1, lowest).max(axis=-1))


def test_symbolic_batch() -> None:
    x = normal(3, 2, 19, 23)
    got, families = run(lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)), [x], [("n", 2, 19, 23)])
    np.testing.assert_array_equal(got, windows(x, (3, 3), 2, 1, 1, -np.inf).max(axis=-1))
    assert families == {"pooling"}
