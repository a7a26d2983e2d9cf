from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te, tirx
from tvm.relax import op

from schedules import tiling
from schedules.partial_sums import PART_TERMS
from schedules.tiling import BLOCKS_TO_TAKE_WHOLE
from tests.schedules.execution import TARGET, integers, normal, run, scheduled, sum_tolerance

SIZES = st.sampled_from([1, 2, 3, 7, 8, 13, 16, 17, 31, 32, 33, 49, 67])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(m=SIZES, n=SIZES, k=SIZES)
def test_matmul_of_any_size_with_bias_and_activation(m: int, n: int, k: int) -> None:
    a, b, bias = normal(m, k), normal(k, n, seed=1), normal(n, seed=2)
    got, _ = run(lambda x, w, c: op.nn.relu(op.add(op.matmul(x, w), c)), [a, b, bias])
    want = np.maximum(a.astype("float64") @ b + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(k, 1.0))


def test_many_blocks_of_rows_are_computed_whole() -> None:
    rows = 32 * BLOCKS_TO_TAKE_WHOLE + 5
    a, b = normal(rows, 3), normal(3, 131, seed=1)
    got, _ = run(op.matmul, [a, b])
    np.testing.assert_allclose(got, a.astype("float64") @ b, rtol=1e-6, atol=sum_tolerance(3, 1.0))


def test_blocks_that_ask_for_the_rows_of_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "BLOCKS_TO_TAKE_WHOLE", 2)
    terms = 67
    rows = TARGET.caches.level2 // (4 * terms) + 5  # more than the second-level cache holds
    a, b = normal(rows, terms), normal(terms, 71, seed=1)
    got, _ = run(op.matmul, [a, b])
    np.testing.assert_allclose(got, a.astype("float64") @ b, rtol=1e-6, atol=sum_tolerance(terms, 1.0))


@pytest.mark.parametrize(("rows", "terms"), [(4, 16384), (40, 16384), (9, 16411)])
def test_long_sums_are_added_in_parts(rows: int, terms: int) -> None:
    # In one chain the same rounding error at nearly every step adds up to 1.5e-4.
    a, b = np.full((rows, terms), 0.1, np.float32), np.ones((terms, 32), np.float32)
    got, families = run(op.matmul, [a, b])
    steps = PART_TERMS + terms / PART_TERMS + 16  # 16: equal parts that are whole requests for what is read next
    np.testing.assert_allclose(got, a.astype("float64") @ b, rtol=steps * 2.0**-24)
    assert families == {"matmul"}


@pytest.mark.parametrize("rows", [1, 5, 8, 33, 70])
def test_symbolic_rows_share_one_function(rows: int) -> None:
    weights, bias = normal(40, 51), normal(51)
    a = normal(rows, 40, seed=3)
    got, families = run(
        lambda x, w, c: op.nn.silu(op.add(op.matmul(x, w), c)), [a, weights, bias], [("m", 40), (40, 51), (51,)]
    )
    z = a.astype("float64") @ weights + bias
    np.testing.assert_allclose(got, z / (1 + np.exp(-z)), rtol=1e-5, atol=sum_tolerance(40, 1.0))
    assert families == {"matmul"}


@pytest.mark.parametrize(("m", "n", "k"), [(1, 9, 37), (5, 7, 32), (60, 19, 33), (3, 4, 5)])
def test_transposed_second_operand(m: int, n: int, k: int) -> None:
    a, b = normal(m, k), normal(n, k, seed=1)
    got, families = run_transposed(a, b, [(m, k), (n, k)])
    np.testing.assert_allclose(got, a.astype("float64") @ b.T, rtol=1e-6, atol=sum_tolerance(k, 1.0))
    assert families == {"matmul"}


@pytest.mark.parametrize(("m", "n"), [(1, 35), (4, 5), (50, 17)])
def test_transposed_second_operand_with_symbolic_sizes(m: int, n: int) -> None:
    a, b = normal(m, 24), normal(n, 24, seed=1)
    got, _ = run_transposed(a, b, [("m", 24), ("n", 24)])
    np.testing.assert_allclose(got, a.astype("float64") @ b.T, rtol=1e-6, atol=sum_tolerance(24, 1.0))


def run_transposed(a: np.ndarray, b: np.ndarray, shapes: list[tuple[int | str, ...]]) -> tuple[np.ndarray, set[str]]:
    builder = relax.BlockBuilder()
    symbols = {name: tirx.Var(name, "int64") for shape in shapes for name in shape if isinstance(name, str)}
    inputs = [
        relax.Var(f"x{i}", relax.TensorType([symbols.get(d, d) if isinstance(d, str) else d for d in shape], "float32"))
        for i, shape in enumerate(shapes)
    ]

    def product(x: te.Tensor, y: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, x.shape[1]), "k")
        return te.compute((x.shape[0], y.shape[0]), lambda i, j: te.sum(x[i, k] * y[j, k], axis=k))

    with builder.function("main"):
        with builder.dataflow():
            output = builder.emit_output(builder.call_te(product, *inputs))
        builder.emit_func_output(output, inputs)
    call, reports = scheduled(builder.get())
    return call(a, b), {report.family for report in reports}


def test_batches_broadcast_and_heads_are_written_in_place() -> None:
    a, b = normal(2, 3, 17, 19), normal(3, 19, 24, seed=1)
    got, _ = run(lambda x, y: op.permute_dims(op.reshape(op.matmul(x, y), (2, 3, 17, 4, 6)), [0, 1, 3, 2, 4]), [a, b])
    want = (a.astype("float64") @ b).reshape(2, 3, 17, 4, 6).transpose(0, 1, 3, 2, 4)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(19, 1.0))


def test_int8_products_accumulate_exactly_in_int32() -> None:
    a, b = integers(9, 133), integers(133, 35, seed=1)
    got, _ = run(lambda x, y: op.matmul(x, y, out_dtype="int32"), [a, b])
    np.testing.assert_array_equal(got, a.astype("int32") @ b.astype("int32"))


def test_fp16_products_accumulate_in_fp32() -> None:
    a, b = normal(9, 257, dtype="float16"), normal(257, 35, dtype="float16", seed=1)
    got, _ = run(op.matmul, [a, b])
    want = a.astype("float64") @ b.astype("float64")
    # One rounding to fp16 at the end, beside fp32's.
    np.testing.assert_allclose(got.astype("float64"), want, rtol=2.0**-11, atol=sum_tolerance(257, 1.0))


def test_matrix_times_vector() -> None:
    a, b = normal(33, 70), normal(70, seed=1)
    got, _ = run(op.matmul, [a, b])
    np.testing.assert_allclose(got, a.astype("float64") @ b, rtol=1e-6, atol=sum_tolerance(70, 1.0))


def test_products_of_symbolic_batches_read_their_own_matrices() -> None:
    left, right = normal(2, 3, 40, 16), normal(2, 3, 16, 70, seed=1)
    shapes = [("batch", 3, "rows", 16), ("batch", 3, 16, "columns")]
    actual, families = run(relax.op.matmul, [left, right], shapes)
    assert families == {"matmul"}
    np.testing.assert_allclose(actual, left @ right, rtol=0, atol=sum_tolerance(16, 1.0))
