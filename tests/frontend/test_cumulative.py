"""Running sums and products of lines that lie apart or side by side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.frontend.importer import import_model
from tests.frontend.comparison import assert_same, node_model, ours


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_running_sums_along_each_of_four_axes(axis: int) -> None:
    x = np.random.default_rng(axis).integers(-9, 9, (2, 3, 5, 7)).astype(np.int64)
    model = node_model("CumSum", {"x": x, "axis": np.array(axis)}, ["y"], domain="", constants=["axis"])
    (got,) = ours(model)({"x": x}).values()
    np.testing.assert_array_equal(got, np.cumsum(x, axis))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    before=st.sampled_from([1, 2, 5]),
    length=st.sampled_from([1, 2, 13]),
    after=st.sampled_from([1, 7, 16, 85, 257, 523]),
    exclusive=st.integers(0, 1),
    reverse=st.integers(0, 1),
)
def test_running_sums_along_a_middle_axis(before: int, length: int, after: int, exclusive: int, reverse: int) -> None:
    x = np.random.default_rng(after).integers(-9, 9, (before, length, after)).astype(np.float32)
    inputs = {"x": x, "axis": np.array(1)}
    model = node_model("CumSum", inputs, ["y"], domain="", constants=["axis"], exclusive=exclusive, reverse=reverse)
    (got,) = ours(model)({"x": x}).values()
    sums = np.flip(np.cumsum(np.flip(x, 1), 1), 1) if reverse else np.cumsum(x, 1)
    np.testing.assert_array_equal(got, sums - x if exclusive else sums)


@pytest.mark.parametrize(("shape", "axis"), [((3, 5), 0), ((5, 3), 0), ((2, 3, 4, 5), 2)])
def test_running_sums_from_the_end_of_an_axis_that_is_not_the_second(shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(axis).integers(-9, 9, shape).astype(np.float32)
    model = node_model("CumSum", {"x": x, "axis": np.array(axis)}, ["y"], domain="", constants=["axis"], reverse=1)
    (got,) = ours(model)({"x": x}).values()
    np.testing.assert_array_equal(got, np.flip(np.cumsum(np.flip(x, axis), axis), axis))


def test_running_sums_of_a_shape_known_at_run_time() -> None:
    x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    inputs = {"x": x, "axis": np.array(1)}
    assert_same("CumSum", inputs, ["y"], domain="", constants=["axis"], shapes={"x": ["n", "length", "columns"]})


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    count=st.sampled_from([(1,), (15,), (16,), (17,), (31,), (64,), (3, 7), (2, 1, 11)]),
    length=st.sampled_from([1, 2, 3, 4, 5, 13, 64]),
    exclusive=st.integers(0, 1),
    reverse=st.integers(0, 1),
)
def test_running_sums_of_contiguous_lines(count: tuple[int, ...], length: int, exclusive: int, reverse: int) -> None:
    x = np.random.default_rng(length).integers(-9, 9, (*count, length)).astype(np.float32)
    inputs = {"x": x, "axis": np.array(-1)}
    model = node_model("CumSum", inputs, ["y"], domain="", constants=["axis"], exclusive=exclusive, reverse=reverse)
    (got,) = ours(model)({"x": x}).values()
    sums = np.flip(np.cumsum(np.flip(x, -1), -1), -1) if reverse else np.cumsum(x, -1)
    np.testing.assert_array_equal(got, sums - x if exclusive else sums)


@pytest.mark.parametrize(("rows", "asks"), [(2048, True), (64, False)], ids=["beyond a core's caches", "within"])
def test_rows_of_strips_are_asked_for_where_they_are_far(rows: int, *, asks: bool) -> None:
    inputs = {"x": np.zeros((rows, 256), np.float32), "axis": np.array(0)}
    module = import_model(node_model("CumSum", inputs, ["y"], domain="", constants=["axis"])).module
    assert ("T.prefetch" in module.script()) == asks
