from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te
from tvm.relax import op

import targets
from passes.blocked_operators import from_blocks
from schedules import schedule_module
from tests.schedules.execution import build, compiled, integers, normal, run

SIZES = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 65])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(shape=st.tuples(SIZES, SIZES, SIZES), kept=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_broadcast_sum(shape: tuple[int, ...], kept: tuple[bool, ...]) -> None:
    other = tuple(extent if keep else 1 for extent, keep in zip(shape, kept, strict=True))
    a, b = normal(*shape), normal(*other, seed=1)
    got, families = run(op.add, [a, b])
    np.testing.assert_array_equal(got, a + b)
    assert families == {"elementwise"}


@pytest.mark.parametrize("shape", [(301, 503), (70001,), (1, 1), ()])
def test_large_small_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    x = normal(*shape) if shape else np.array(1.5, np.float32)
    got, _ = run(lambda x: op.nn.relu(op.multiply(x, x)), [x])
    np.testing.assert_array_equal(got, x * x)


def test_symbolic_shapes() -> None:
    a, b = normal(5, 37), normal(37, seed=1)
    got, _ = run(op.multiply, [a, b], [("n", "m"), ("m",)])
    np.testing.assert_array_equal(got, a * b)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=st.tuples(SIZES, SIZES, SIZES), axes=st.permutations([0, 1, 2]))
def test_transposition(shape: tuple[int, ...], axes: list[int]) -> None:
    x = normal(*shape)
    got, _ = run(lambda x: op.permute_dims(x, axes), [x])
    np.testing.assert_array_equal(got, x.transpose(axes))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 70),
    dtype=st.sampled_from(["float32", "int8", "float16", "int64"]),
)
def test_pairs_of_columns_brought_together_and_taken_apart(channels: int, height: int, width: int, dtype: str) -> None:
    def together(x: te.Tensor) -> te.Tensor:
        """Return depth to space with blocks of 2."""
        return te.compute(
            (channels, 2 * height, 2 * width),
            lambda c, h, w: x[h % 2 * (2 * channels) + w % 2 * channels + c, h // 2, w // 2],
        )

    def apart(x: te.Tensor) -> te.Tensor:
        """Return space to depth, which undoes it."""
        return te.compute(
            (4 * channels, height, width),
            lambda c, h, w: x[c % channels, h * 2 + c // (2 * channels), w * 2 + c // channels % 2],
        )

    x = integers(4 * channels, height, width, dtype=dtype)
    want = x.reshape(2, 2, channels, height, width).transpose(2, 3, 0, 4, 1).reshape(channels, 2 * height, 2 * width)
    got, families = run(lambda x: relax.BlockBuilder.current().call_te(together, x), [x])
    np.testing.assert_array_equal(got, want)
    assert width < 4 or families == {"transpose"}
    back, families = run(lambda x: relax.BlockBuilder.current().call_te(apart, x), [want])
    np.testing.assert_array_equal(back, x)
    assert width < 4 or families == {"transpose"}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(16, 7000),
    columns=st.sampled_from([4, 5, 8, 16]),
    dtype=st.sampled_from(["float32", "float16", "uint8", "int64"]),
    turned=st.booleans(),
)
def test_transposition_to_few_long_rows_and_back(rows: int, columns: int, dtype: str, turned: bool) -> None:
    x = integers(*((columns, rows) if turned else (rows, columns)), dtype=dtype)
    got, families = run(lambda x: op.permute_dims(x, [1, 0]), [x])
    np.testing.assert_array_equal(got, x.T)
    assert families == {"transpose"}


@pytest.mark.parametrize("dtype", ["float32", "int32", "float64", "float16", "uint8"])
def test_transposition_of_whole_and_cut_tiles(dtype: str) -> None:
    x = integers(3, 80, 49, dtype=dtype)
    got, _ = run(lambda x: op.add(op.permute_dims(x, [0, 2, 1]), relax.const(1, dtype)), [x])
    np.testing.assert_array_equal(got, x.transpose(0, 2, 1) + np.ones((), dtype))


def test_transposition_of_truth_values() -> None:
    x = integers(40, 33, dtype="bool")
    got, _ = run(lambda x: op.permute_dims(x, [1, 0]), [x])
    np.testing.assert_array_equal(got, x.T)


@pytest.mark.parametrize(("channels", "size"), [(48, (28, 28)), (48, (5, 7)), (16, (9, 9)), (40, (13, 16))])
def test_channels_out_of_blocks(channels: int, size: tuple[int, int]) -> None:
    x = normal(2, -(-channels // 16), *size, 16)
    got, families = run(
        lambda x: relax.BlockBuilder.current().call_te(lambda data: from_blocks(data, channels), x), [x]
    )
    np.testing.assert_array_equal(got, x.transpose(0, 1, 4, 2, 3).reshape(2, -1, *size)[:, :channels])
    assert channels % 16 or families == {"transpose"}


def test_concatenation_padding_and_slices() -> None:
    a, b = normal(3, 7), normal(3, 40, seed=1)
    got, _ = run(lambda a, b: op.nn.relu(op.concat([a, b], axis=1)), [a, b])
    np.testing.assert_array_equal(got, np.maximum(np.concatenate([a, b], 1), 0))
    got, _ = run(lambda a: op.nn.pad(a, (1, 2, 3, 4)), [a])
    np.testing.assert_array_equal(got, np.pad(a, [(1, 2), (3, 4)]))
    got, _ = run(lambda b: op.strided_slice(b, [1], [1], [39], [2]), [b])
    np.testing.assert_array_equal(got, b[:, 1:39:2])


def test_a_transposition_under_a_condition_is_not_read_ahead_of_it() -> None:
    a, b = normal(1, 64, 32), normal(1, 48, 8, 8, seed=1)

    def concatenated(a: relax.Expr, b: relax.Expr) -> relax.Expr:
        return op.concat([b, op.reshape(op.permute_dims(a, [0, 2, 1]), (1, 32, 8, 8))], axis=1)

    got, families = run(concatenated, [a, b])
    np.testing.assert_array_equal(got, np.concatenate([b, a.transpose(0, 2, 1).reshape(1, 32, 8, 8)], 1))
    # The tiles of a transposition are read whole, where the condition does not hold too: outside of the tensor.
    assert families == {"elementwise"}


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "int64", "uint8"])
def test_arithmetic_in_other_types(dtype: str) -> None:
    make = normal if dtype.startswith("float") else integers
    a, b = make(5, 71, dtype=dtype), make(71, dtype=dtype, seed=1)
    got, families = run(op.add, [a, b])
    np.testing.assert_array_equal(got, a + b)
    assert families == {"elementwise"}


def test_gather_of_rows() -> None:
    table, rows = normal(50, 16), integers(3, 5, dtype="int64") % 50
    got, _ = run(lambda t, i: op.take(t, i, axis=0, mode="clip"), [table, rows])
    np.testing.assert_array_equal(got, table[rows])


def test_scatter_keeps_its_order_of_updates() -> None:
    data, updates = normal(9, 4), normal(6, 4, seed=1)
    rows = np.array([[1], [3], [1], [8], [0], [3]], "int64")
    got, _ = run(lambda d, i, u: op.scatter_nd(d, i, u, reduction="add"), [data, rows, updates])
    want = data.copy()
    np.add.at(want, rows[:, 0], updates)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_sorting_is_left_as_it_is() -> None:
    x = normal(4, 30)
    got, _ = run(lambda x: op.cumsum(op.sort(x, axis=1), axis=1), [x])
    np.testing.assert_allclose(got, np.cumsum(np.sort(x, 1), 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_types_without_vector_conversions_are_converted_as_without_a_schedule(dtype: str) -> None:
    x = normal(5, 19)
    got, families = run(lambda x: op.astype(x, dtype), [x])
    plain = compiled(build(lambda x: op.astype(x, dtype), [x.shape], ["float32"]))
    np.testing.assert_array_equal(got.view("uint8"), plain(x).view("uint8"))
    assert families == {"fallback"}


@pytest.mark.parametrize(("rows", "columns"), [(64, 1024), (1024, 80), (47, 1023), (1025, 33), (16, 2048), (130, 1024)])
def test_transposition_of_rows_that_lie_pages_apart(rows: int, columns: int) -> None:
    x, y = normal(rows, columns), normal(columns, rows, seed=1)
    got = run(lambda x, y: op.add(op.permute_dims(x, [1, 0]), y), [x, y])[0]
    np.testing.assert_array_equal(got, x.T + y)


@pytest.mark.parametrize(
    ("name", "columns", "lanes"), [("exp", 64, 32), ("exp", 31, 16), ("exp", 15, 8), ("abs", 64, 16)]
)
def test_chains_of_elementary_functions_where_registers_are_few(name: str, columns: int, lanes: int) -> None:
    module = build(getattr(op, name), [(columns,)], ["float32"])
    (report,) = schedule_module(module, targets.get("x86-avx2"))[1]
    assert report.parameters["lanes"] == lanes


@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=st.tuples(st.integers(1, 9), st.integers(30, 140)))
def test_rows_of_chains_of_elementary_functions(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    module, _ = schedule_module(build(op.exp, [shape], ["float32"]), targets.get("x86-avx2"))
    np.testing.assert_allclose(compiled(module, targets.get("x86-avx2"))(x), np.exp(x), rtol=1e-6)
