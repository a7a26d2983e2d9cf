"""Slices written at computed positions, in whole vectors and not, some of them to one place."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frontend.comparison import node_model, ours


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    inner=st.sampled_from([(), (1,), (7,), (16,), (64,), (3, 32)]),
    depth=st.integers(1, 2),
    reduction=st.sampled_from(["none", "add", "max"]),
)
def test_slices_are_placed_in_order(inner: tuple[int, ...], depth: int, reduction: str) -> None:
    generator = np.random.default_rng(len(inner))
    data = generator.integers(-9, 9, (5, 3, *inner)).astype(np.float32)
    indices = generator.integers(-3, 3, (11, depth))
    updates = generator.integers(-9, 9, (11, *data.shape[depth:])).astype(np.float32)
    inputs = {"data": data, "indices": indices, "updates": updates}
    (got,) = ours(node_model("ScatterND", inputs, ["y"], domain="", reduction=reduction))(inputs).values()
    combine = {"none": lambda _, new: new, "add": np.add, "max": np.maximum}[reduction]
    want = data.copy()
    for place, update in zip(indices, updates, strict=True):
        want[tuple(place)] = combine(want[tuple(place)], update)
    np.testing.assert_array_equal(got, want)
