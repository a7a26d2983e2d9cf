from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.package.entry_points import CachePages
from optimizer.runtime.cache_pages import dequantized, quantized, rows, settled

_LAYOUTS = st.builds(CachePages, st.sampled_from([4, 8]), st.booleans(), st.just(32), st.just(32))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pages=_LAYOUTS, tokens=st.integers(0, 3), channels=st.integers(1, 17), offset=st.sampled_from([0.0, 50.0, -7.0]))
def test_a_code_is_off_by_at_most_half_a_step(pages: CachePages, tokens: int, channels: int, offset: float) -> None:
    rng = np.random.default_rng([tokens, channels])
    values = (rng.standard_normal((2, 3, tokens * 32, channels)) + offset).astype(np.float32)
    codes, scales = quantized(values, pages)
    assert (codes.shape[2], scales.shape[2]) == rows(tokens * 32, pages)
    grouped = values.reshape(2, 3, -1, 32, channels) if pages.by_channel else values
    step = np.ptp(grouped, axis=3, keepdims=True) / (2**pages.bits - 1) if values.size else np.zeros(1)
    # The scale and the minimum are rounded to fp16: 2**-11 of what they are.
    slack = 2.0**-11 * (np.abs(values).max(initial=0) + 2**pages.bits * step)
    error = np.abs(dequantized(codes, scales, pages) - values).reshape(grouped.shape)
    assert (error <= step / 2 + slack).all()


def test_equal_numbers_and_numbers_beyond_fp16_stay_finite() -> None:
    values = np.full((1, 1, 32, 4), 3.5, np.float32)
    values[..., 3] = 1e30
    for by_channel in (True, False):
        pages = CachePages(4, by_channel, 32, 32)
        assert np.isfinite(dequantized(*quantized(values, pages), pages)).all()
    by_channel = CachePages(4, True, 32, 32)
    np.testing.assert_array_equal(dequantized(*quantized(values, by_channel), by_channel)[..., :3], values[..., :3])


@pytest.mark.parametrize(("length", "quantized_before", "after"), [(0, 0, 0), (63, 0, 0), (64, 0, 32), (200, 64, 160)])
def test_whole_pages_are_quantized_and_the_newest_tokens_kept(length: int, quantized_before: int, after: int) -> None:
    assert settled(length, quantized_before, CachePages(8, True, 32, 32)) == after
