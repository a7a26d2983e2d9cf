"""The first elements in order, whether few of them are kept or all are sorted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized
from tests.frontend.comparison import node_model, ours


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("count", [1, 5, 130])
def test_top_elements_with_equal_and_unordered_ones(count: int, largest: int) -> None:
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n, 131, 2] x) => (float[n, {count}, 2] values, int64[n, {count}, 2] positions)
    <int64[1] k = {{{count}}}> {{ values, positions = TopK <axis = 1, largest = {largest}> (x, k) }}""")
    x = np.random.default_rng(0).integers(-20, 20, (3, 131, 2)).astype(np.float32)
    x[1, 7], x[2, 3:5], x[0, 9] = np.nan, np.inf, -np.inf
    values, positions = unoptimized(import_model(model))({"x": x}).values()
    # NaN counts as the greatest; of equal elements the first one comes first.
    keys = np.where(np.isnan(x), np.float32(1e9), x).clip(-1e8, 1e9)
    want = np.argsort(-keys if largest else keys, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, axis=1))


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("length", [100, 300])
@pytest.mark.parametrize("dtype", ["float16", "float", "double", "int8", "int32", "int64", "uint8"])
def test_all_elements_of_short_and_long_lines_in_order(dtype: str, length: int, largest: int) -> None:
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    g ({dtype}[2, {length}] x) => ({dtype}[2, {length}] values, int64[2, {length}] positions)
    <int64[1] k = {{{length}}}> {{ values, positions = TopK <axis = 1, largest = {largest}> (x, k) }}""")
    kind = {"float": np.float32, "double": np.float64}.get(dtype) or np.dtype(dtype)
    x = np.random.default_rng(1).integers(0, 90, (2, length)).astype(kind)
    if not dtype.startswith("u"):
        x -= kind(45) if callable(kind) else kind.type(45)
    if np.issubdtype(kind, np.floating):
        x[0, ::7], x[1, 5], x[1, 6], x[1, 7:9] = -0.0, np.inf, -np.inf, np.nan
    elif np.dtype(kind).itemsize >= 4:
        x[0, 3], x[0, 4] = np.iinfo(kind).min, np.iinfo(kind).max
    values, positions = unoptimized(import_model(model))({"x": x}).values()
    ranks = np.unique(x, return_inverse=True)[1].reshape(x.shape)  # NaN last
    want = np.argsort(-ranks if largest else ranks, axis=1, kind="stable")
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, axis=1))


@pytest.mark.parametrize("largest", [0, 1])
def test_first_elements_of_lines_of_several_blocks(largest: int) -> None:
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[3, 101] x) => (float[3, 7] values, int64[3, 7] positions)
    <int64[1] k = {{7}}> {{ values, positions = TopK <axis = 1, largest = {largest}> (x, k) }}""")
    x = np.random.default_rng(2).standard_normal((3, 101)).astype(np.float32)
    x[1, 60], x[1, 100], x[2, 95:] = np.nan, np.nan, np.inf
    values, positions = unoptimized(import_model(model))({"x": x}).values()
    keys = np.where(np.isnan(x), np.float32(1e9), x.clip(-1e8, 1e8))
    want = np.argsort(-keys if largest else keys, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, axis=1))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    length=st.sampled_from([131, 2053, 4099, 9001]),
    count=st.sampled_from([65, 127, 601]),
    kind=st.sampled_from(["float32", "float16", "int32", "uint8"]),
    distinct=st.sampled_from([1, 3, 1000, 60_000]),
    largest=st.integers(0, 1),
    ascending=st.booleans(),
)
def test_many_first_elements_of_long_lines(
    length: int, count: int, kind: str, distinct: int, largest: int, ascending: bool
) -> None:
    count = min(count, length)
    x = np.random.default_rng(length).integers(0, distinct, (2, length)).astype(kind)
    if ascending:
        x.sort(axis=1)
    if kind.startswith("float"):
        x[0, ::7], x[1, 5], x[1, 6], x[1, 9::50] = -0.0, np.inf, -np.inf, np.nan
    inputs = {"x": x, "k": np.array([count])}
    model = node_model("TopK", inputs, ["v", "p"], domain="", constants=["k"], largest=largest)
    values, positions = ours(model)({"x": x}).values()
    ranks = np.unique(x, return_inverse=True)[1].reshape(x.shape)  # NaN last
    want = np.argsort(-ranks if largest else ranks, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, axis=1))


@pytest.mark.parametrize("operator", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_positions_of_extrema_among_equal_ones(operator: str, axis: int, last: int) -> None:
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n, 37, m] x) => (int64[a, b] y) {{
      y = {operator} <axis = {axis}, keepdims = 0, select_last_index = {last}> (x)
    }}""")
    x = np.random.default_rng(axis).integers(-5, 5, (3, 37, 19)).astype(np.float32)
    (got,) = unoptimized(import_model(model))({"x": x}).values()
    ranks = x if operator == "ArgMax" else -x
    want = x.shape[axis] - 1 - np.flip(ranks, axis).argmax(axis) if last else ranks.argmax(axis)
    np.testing.assert_array_equal(got, want)


def test_the_position_of_an_extremum_is_in_range_where_there_is_nan() -> None:
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[2, 40] x) => (int64[2, 1] y) { y = ArgMax <axis = 1> (x) }""")
    x = np.full((2, 40), np.nan, np.float32)
    (got,) = unoptimized(import_model(model))({"x": x}).values()
    assert got.min() >= 0
    assert got.max() < 40
