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


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(7, 127), (7, 128), (7, 200), (2, 5, 130), (4, 3)]),
    axis=st.integers(-3, 1),
    reduction=st.sampled_from(["none", "add", "max"]),
)
def test_elements_are_placed_in_order(shape: tuple[int, ...], axis: int, reduction: str) -> None:
    axis = max(axis, -len(shape))
    generator = np.random.default_rng(shape[-1])
    data = generator.integers(-9, 9, shape).astype(np.float32)
    count = tuple(11 if place == axis % len(shape) else extent for place, extent in enumerate(shape))
    indices = generator.integers(-shape[axis], shape[axis], count)
    updates = generator.integers(-9, 9, count).astype(np.float32)
    inputs = {"data": data, "indices": indices, "updates": updates}
    model = node_model("ScatterElements", inputs, ["y"], domain="", axis=axis, reduction=reduction)
    (got,) = ours(model)(inputs).values()
    combine = {"none": lambda _, new: new, "add": np.add, "max": np.maximum}[reduction]
    want = data.copy()
    for number in range(11):
        chosen, new = (np.take(each, [number], axis) for each in (indices, updates))
        old = np.take_along_axis(want, chosen % shape[axis], axis)
        np.put_along_axis(want, chosen % shape[axis], combine(old, new), axis)
    np.testing.assert_array_equal(got, want)
