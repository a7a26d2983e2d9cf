"""Reductions and functions of rows."""

from __future__ import annotations

import itertools
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from schedules import column_strips, narrow_rows, row_folds, schedule_module, turned_rows
from tests.schedules.execution import TARGET, build, integers, normal, run, sum_tolerance

SIZES = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 64, 65, 131])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(shape=st.tuples(SIZES, SIZES), axis=st.sampled_from([0, 1]))
def test_sum_and_maximum_along_either_axis(shape: tuple[int, int], axis: int) -> None:
    x = normal(*shape)
    got, _ = run(lambda x: op.sum(op.multiply(x, x), axis=axis), [x])
    np.testing.assert_allclose(got, (x.astype("float64") ** 2).sum(axis), rtol=1e-5)
    got, _ = run(lambda x: op.max(x, axis=axis), [x])
    np.testing.assert_array_equal(got, x.max(axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_maximum_of_halves_along_either_axis(axis: int) -> None:
    x = normal(37, 65).astype(np.float16)
    got, _ = run(lambda x: op.max(x, axis=axis), [x])
    np.testing.assert_array_equal(got, x.max(axis))


@pytest.mark.parametrize("axis", [None, [0, 2], 1])
def test_sum_over_several_axes(axis: list[int] | int | None) -> None:
    x = normal(7, 11, 13)
    got, families = run(lambda x: op.sum(x, axis=axis), [x])
    axes = tuple(axis) if isinstance(axis, list) else axis
    np.testing.assert_allclose(got, x.astype("float64").sum(axes), rtol=1e-5, atol=sum_tolerance(1001, 1.0))
    assert families == {"reduction"}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.sampled_from([16, 53, 131]), st.sampled_from([64, 1021, 5003])),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_long_rows_reduced_in_strips_of_columns(shape: tuple[int, int, int], dtype: str) -> None:
    x = normal(*shape, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_strips, "applies", lambda *_: True)
        total, families = run(lambda x: op.multiply(op.sum(x, axis=1), relax.const(2, dtype)), [x])
        largest, _ = run(lambda x: op.max(x, axis=1), [x])
    wide = 2 * x.astype("float64").sum(1)
    np.testing.assert_allclose(
        total, wide, rtol=2 * float(np.finfo(dtype).eps), atol=2 * sum_tolerance(shape[1], 1.0, "float32")
    )
    np.testing.assert_array_equal(largest, x.max(1))
    assert "reduction" in families


def test_strips_of_columns_where_rows_exceed_the_caches() -> None:
    x = normal(48, 8192)
    got, _ = run(lambda x: op.mean(x, axis=0), [x])
    np.testing.assert_allclose(got, x.astype("float64").mean(0), rtol=1e-5, atol=sum_tolerance(48, 1.0))


def test_fp16_sum_is_rounded_once() -> None:
    x = normal(3, 1000, dtype="float16")
    got, _ = run(lambda x: op.sum(x, axis=1), [x])
    want = x.astype("float64").sum(1)
    np.testing.assert_allclose(got, want, rtol=2.0**-10, atol=sum_tolerance(1000, 1.0))


def test_positions_of_extrema() -> None:
    x = integers(9, 40, dtype="int32")
    got, _ = run(lambda x: op.argmax(x, axis=1), [x])
    np.testing.assert_array_equal(got, x.argmax(1))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=st.tuples(SIZES, SIZES), axis=st.sampled_from([0, 1]))
def test_softmax(shape: tuple[int, int], axis: int) -> None:
    x = normal(*shape) * 10
    got, _ = run(lambda x: op.nn.softmax(x, axis=axis), [x])
    exponentials = np.exp(x.astype("float64") - x.max(axis, keepdims=True))
    # The difference from the maximum, up to 60 here, is rounded before it is exponentiated.
    np.testing.assert_allclose(got, exponentials / exponentials.sum(axis, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("count", "width"), [(64, 5), (131, 37), (127, 160)])
def test_softmax_of_rows_that_take_the_next_ones_maximum_along(count: int, width: int) -> None:
    x = normal(count, width) * np.arange(1, count + 1, dtype="float32")[:, None]
    x[-1, 0] = np.nan
    got, _ = run(lambda x: op.nn.softmax(x, axis=1), [x])
    exponentials = np.exp(x.astype("float64") - x.max(1, keepdims=True))
    want = exponentials / exponentials.sum(1, keepdims=True)
    # Differences of several hundred are rounded before they are exponentiated.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-30)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=st.tuples(st.sampled_from([1, 3]), SIZES, SIZES))
def test_softmax_of_neighbouring_rows(shape: tuple[int, int, int]) -> None:
    x = normal(*shape) * 10
    got, families = run(lambda x: op.nn.softmax(x, axis=1), [x])
    exponentials = np.exp(x.astype("float64") - x.max(1, keepdims=True))
    np.testing.assert_allclose(got, exponentials / exponentials.sum(1, keepdims=True), rtol=1e-5)
    assert 1 in shape or families == {"rowwise"}


@pytest.mark.parametrize("width", [1, 7, 31, 131])
def test_softmax_keeps_infinities_and_not_a_numbers(width: int) -> None:
    x = normal(6, width)
    x[0, -1], x[1], x[2, 0], x[3, -1], x[4, 0] = -np.inf, -np.inf, np.nan, np.inf, -200
    got, _ = run(lambda x: op.nn.softmax(x, axis=-1), [x])
    with np.errstate(invalid="ignore"):
        shifted = x.astype("float64") - np.maximum(x.max(-1, keepdims=True), np.finfo("float32").min)
        want = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    np.testing.assert_allclose(got[[0, 4, 5]], want[[0, 4, 5]], rtol=1e-5, atol=1e-37)
    assert np.isnan(got[1:4]).all()


def test_masked_softmax_over_symbolic_lengths() -> None:
    x, mask = normal(2, 3, 5, 37), np.where(integers(2, 1, 5, 37) > 0, 0, -np.inf).astype("float32")
    mask[..., 0] = 0
    got, families = run(
        lambda x, m: op.nn.softmax(op.add(x, m), axis=-1), [x, mask], [(2, 3, "s", "t"), (2, 1, "s", "t")]
    )
    exponentials = np.exp(x.astype("float64") + mask)
    np.testing.assert_allclose(got, exponentials / exponentials.sum(-1, keepdims=True), rtol=1e-5)
    assert "rowwise" in families


@pytest.mark.parametrize("width", [1, 5, 16, 40, 131])
def test_layer_norm_with_activation(width: int) -> None:
    x, scale, bias = normal(2, 5, width), normal(width, seed=1), normal(width, seed=2)
    got, families = run(
        lambda x, g, b: op.nn.relu(op.nn.layer_norm(x, g, b, axes=[-1])),
        [x, scale, bias],
        [("n", "s", width), (width,), (width,)],
    )
    wide = x.astype("float64")
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(got, np.maximum(want, 0), rtol=1e-5, atol=1e-5)
    assert width == 1 or families == {"rowwise"}


@pytest.mark.parametrize(("rows", "width"), [(131, 768), (1031, 48)])
def test_layer_norm_of_rows_that_follow_each_other_in_a_task(rows: int, width: int) -> None:
    x, scale, bias = normal(rows, width), normal(width, seed=1), normal(width, seed=2)
    got, families = run(lambda x, g, b: op.nn.layer_norm(x, g, b, axes=[-1]), [x, scale, bias])
    wide = x.astype("float64")
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert families == {"rowwise"}


@pytest.mark.parametrize(
    ("rows", "width", "dtype"), [(96, 131, "float32"), (33, 48, "float16"), (96, 37, "bfloat16"), (7, 64, "float32")]
)
def test_a_norm_does_not_depend_on_where_a_row_stands(rows: int, width: int, dtype: str) -> None:
    row, residual = normal(width).astype(dtype), normal(width, seed=1).astype(dtype)
    ones = np.ones(width, "float32")

    def norm(x: relax.Expr, r: relax.Expr, g: relax.Expr) -> relax.Expr:
        return op.astype(op.nn.layer_norm(op.astype(op.add(x, r), "float32"), g, g, axes=[-1]), dtype)

    repeated = [np.tile(each, (rows, 1)) for each in (row, residual)]
    got, families = run(norm, [*repeated, ones], [("rows", width), ("rows", width), (width,)] if rows < 8 else None)
    wide = (row + residual).astype("float64")
    want = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5) + 1
    tolerance = 8 * {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(got[0].astype("float64"), want, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(got, np.tile(got[0], (rows, 1)))
    assert "rowwise" in families


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rms_norm(dtype: str) -> None:
    x, scale = normal(3, 5, 72, dtype=dtype), normal(72, dtype=dtype, seed=1)
    got, families = run(lambda x, g: op.nn.rms_norm(x, g, axes=[-1]), [x, scale])
    wide = x.astype("float64")
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(got, want, rtol=4 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps)
    assert families == {"rowwise"}


def test_group_norm() -> None:
    x, scale, bias = normal(2, 8, 5, 7), normal(8, seed=1), normal(8, seed=2)
    got, _ = run(lambda x, g, b: op.nn.group_norm(x, g, b, num_groups=4, channel_axis=1, axes=[2, 3]), [x, scale, bias])
    wide = x.astype("float64").reshape(2, 4, -1)
    want = ((wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(got, want * scale[:, None, None] + bias[:, None, None], rtol=1e-5, atol=1e-5)


def test_bf16_softmax() -> None:
    x = (normal(4, 70) * 4).astype(ml_dtypes.bfloat16)
    got, families = run(lambda x: op.nn.softmax(x, axis=-1), [x])
    exponentials = np.exp(x.astype("float64") - x.astype("float64").max(-1, keepdims=True))
    want = exponentials / exponentials.sum(-1, keepdims=True)
    # Three roundings to 8 bits: of the difference (up to 32 here, so 2**-4 of it), the exponential and the quotient.
    np.testing.assert_allclose(got.astype("float64"), want, rtol=2.0**-4 + 2.0**-7)
    assert families == {"rowwise"}


@pytest.mark.parametrize("name", ["cosh", "sinh"])
def test_functions_without_a_vector_form(name: str) -> None:
    x = normal(3, 40)
    got, families = run(getattr(op, name), [x])
    np.testing.assert_allclose(got, getattr(np, name)(x.astype("float64")), rtol=1e-6)
    assert families == {"fallback"}


# Lanes are 8 or 16: odd and even widths, whole registers, more than one.
NARROW = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 24, 29, 31])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.sampled_from([32, 33, 47, 131, 1000]), width=NARROW)
def test_softmax_of_narrow_rows(rows: int, width: int) -> None:
    x = normal(rows, width) * 10
    x[0, -1], x[1, 0], x[2, 0], x[3] = -np.inf, np.nan, -200, 0
    shifted = x.astype("float64") - x.max(1, keepdims=True)
    total = np.exp(shifted).sum(1, keepdims=True)
    got, families = run(lambda x: op.nn.softmax(x, axis=-1), [x])
    np.testing.assert_allclose(got, np.exp(shifted) / total, rtol=1e-5, atol=float(np.finfo("float32").tiny))
    assert not _in_lanes(width) or "narrow-rows" in families
    got, families = run(lambda x: op.nn.log_softmax(x, axis=-1), [x])
    np.testing.assert_allclose(got, shifted - np.log(total), rtol=1e-5, atol=1e-5)
    assert not _in_lanes(width) or "narrow-rows" in families


def _in_lanes(width: int) -> bool:
    lanes = TARGET.vector_lanes(32)
    return lanes in narrow_rows.LANES and width < (2 * lanes if lanes < row_folds.FEWEST_LANES else lanes + 1)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([(32,), (33,), (3, 37), (1000,)]),
    width=st.sampled_from([17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129]),
    masked=st.booleans(),
)
def test_functions_of_rows_whose_sums_are_folded_together(rows: tuple[int, ...], width: int, masked: bool) -> None:
    x, scale, shift = normal(*rows, width) * 10, normal(width, seed=1), normal(width, seed=2)
    mask = np.where(integers(width) > 0, 0, -200).astype("float32") if masked else np.zeros(width, "float32")
    wide = (x + mask).astype("float64")
    shifted = wide - wide.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    got, families = run(lambda x: op.nn.softmax(op.add(x, relax.const(mask)), axis=-1), [x])
    np.testing.assert_allclose(got, np.exp(shifted) / total, rtol=2e-5, atol=float(np.finfo("float32").tiny))
    assert "rowwise" in families or _in_lanes(width)
    got, _ = run(lambda x: op.nn.log_softmax(op.add(x, relax.const(mask)), axis=-1), [x])
    np.testing.assert_allclose(got, shifted - np.log(total), rtol=1e-5, atol=2e-5)
    got, _ = run(lambda x: op.nn.layer_norm(x, relax.const(scale), relax.const(shift), axes=[-1]), [x])
    centered = x.astype("float64") - x.astype("float64").mean(-1, keepdims=True)
    want = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale + shift
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_rows_folded_together_keep_infinities_and_not_a_numbers() -> None:
    x = normal(40, 37)
    x[0, -1], x[1], x[2, 0], x[3, -1], x[4, 0] = -np.inf, -np.inf, np.nan, np.inf, -200
    got, _ = run(lambda x: op.nn.softmax(x, axis=-1), [x])
    with np.errstate(invalid="ignore"):
        shifted = x.astype("float64") - np.maximum(x.max(-1, keepdims=True), np.finfo("float32").min)
        want = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    np.testing.assert_allclose(got[[0, *range(4, 40)]], want[[0, *range(4, 40)]], rtol=1e-5, atol=1e-37)
    assert np.isnan(got[1:4]).all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(shape=st.tuples(st.sampled_from([1, 5]), st.sampled_from([7, 16]), NARROW))
def test_normalization_and_sums_of_narrow_rows_on_several_axes(shape: tuple[int, int, int]) -> None:
    x, scale, shift = normal(*shape), normal(shape[-1], seed=1), normal(shape[-1], seed=2)
    wide = x.astype("float64")

    def layer_norm(x: relax.Var) -> relax.Expr:
        return op.nn.layer_norm(x, relax.const(scale), relax.const(shift), axes=[-1], epsilon=1e-2)

    got, families = run(layer_norm, [x])
    centered = wide - wide.mean(-1, keepdims=True)
    want = centered / np.sqrt(wide.var(-1, keepdims=True) + 1e-2) * scale + shift
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    many = shape[0] * shape[1] >= narrow_rows.FEWEST_BLOCKS * TARGET.vector_lanes(32)
    assert not (many and shape[-1] < TARGET.vector_lanes(32) and _in_lanes(shape[-1])) or families == {"narrow-rows"}
    got, _ = run(lambda x: op.multiply(op.sum(x, axis=-1), relax.const(2.0)), [x])
    np.testing.assert_allclose(got, 2 * wide.sum(-1), rtol=1e-5, atol=2 * sum_tolerance(shape[-1], 1.0))
    got, _ = run(lambda x: op.max(x, axis=-1, keepdims=True), [x])
    np.testing.assert_array_equal(got, x.max(-1, keepdims=True))


def test_narrow_rows_with_an_element_and_a_row_of_other_inputs() -> None:
    x, y, z = normal(77, 7), normal(77, 1), normal(77, 7, seed=1)

    def function(x: relax.Var, y: relax.Var, z: relax.Var) -> relax.Expr:
        return op.add(op.nn.softmax(op.multiply(x, y), axis=-1), z)

    got, families = run(function, [x, y, z])
    exponentials = np.exp((x * y).astype("float64"))
    np.testing.assert_allclose(got, exponentials / exponentials.sum(1, keepdims=True) + z, rtol=1e-5, atol=1e-6)
    assert not _in_lanes(7) or "narrow-rows" in families


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("width", range(1, 32))
def test_steps_between_rows_and_columns_have_two_sources(width: int, lanes: int) -> None:
    if width % (2 * lanes) == 0:
        return
    steps = turned_rows.states(width, lanes)
    for before, after in [*itertools.pairwise(steps), *itertools.pairwise(steps[::-1])]:
        where = {element: number for number, held in enumerate(before) for element in held}
        assert sorted(where) == list(range(width * lanes))
        assert all(len({where[element] for element in held}) <= 2 for held in after)
    assert steps[-1] == tuple(tuple(row * width + column for row in range(lanes)) for column in range(width))


@pytest.mark.parametrize(
    ("name", "rows", "vectors"), [("x86-avx2", 512, 1), ("x86-avx2", 16384, 2), ("x86-avx512", 512, 2)]
)
def test_vectors_of_exponentials_where_registers_are_few(name: str, rows: int, vectors: int) -> None:
    module = build(lambda x: op.nn.softmax(x, -1), [(rows, 1024)], ["float32"])
    (report,) = schedule_module(module, targets.get(name))[1]
    assert report.parameters["vectors"] == vectors


@pytest.mark.parametrize(("columns", "level"), [(1024, 1), (32000, 2)])
def test_next_rows_are_asked_for_into_a_cache_that_holds_two(columns: int, level: int) -> None:
    def variance(x: relax.Expr) -> relax.Expr:
        return op.sum(op.square(op.subtract(x, op.mean(x, axis=-1, keepdims=True))), axis=-1)

    module = build(variance, [(2**22 // columns, columns)], ["float32"])
    code = schedule_module(module, targets.get("x86-avx512"))[0].script()
    localities = {int(each) for each in re.findall(r"T.prefetch\(.*, 0, (\d), 1\)", code)}
    assert localities == {4 - level}
