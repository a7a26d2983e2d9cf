from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.rotary_embedding import rotary_embedding
from tests.passes.graph import graph
from tests.passes.relax_modules import run


def _reference(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """Multiply pairs, as complex numbers, with those of their angles."""
    pairs = x.reshape(*x.shape[:-1], -1, 2) if interleaved else np.moveaxis(x.reshape(*x.shape[:-1], 2, -1), -2, -1)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cosines + 1j * sines)
    parts = np.stack([turned.real, turned.imag], -1)
    return (parts if interleaved else np.moveaxis(parts, -1, -2)).reshape(x.shape)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 3),
    rows=st.sampled_from([1, 2, 7]),
    half=st.sampled_from([1, 2, 5, 16, 32]),
    interleaved=st.booleans(),
    doubled=st.booleans(),
    symbolic=st.booleans(),
)
def test_pairs_are_turned_as_complex_numbers(
    heads: int, rows: int, half: int, interleaved: bool, doubled: bool, symbolic: bool
) -> None:
    random = np.random.default_rng(half)
    x = random.standard_normal((2, heads, rows, 2 * half)).astype("float32")
    angle = random.uniform(0, 6, (1, rows, half)).astype("float32")
    cosines, sines = np.cos(angle), np.sin(angle)
    expected = _reference(x.astype("float64"), cosines, sines, interleaved=interleaved)
    if doubled:
        cosines, sines = (
            np.repeat(part, 2, -1) if interleaved else np.concatenate([part, part], -1) for part in (cosines, sines)
        )
    length = "s" if symbolic else rows
    module = graph(
        lambda x, c, s: rotary_embedding(x, c, s, interleaved=interleaved),
        (2, heads, length, 2 * half),
        *[(1, length, cosines.shape[-1])] * 2,
    )
    np.testing.assert_allclose(run(module, x, cosines, sines), expected, rtol=0, atol=2**-21 * np.abs(x).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_result_has_the_type_of_the_data(dtype: str) -> None:
    module = graph(lambda x, c: rotary_embedding(x, c, c), (3, 4), (3, 2), dtype=dtype)
    assert str(module["main"].ret_ty.dtype.dtype) == dtype
