"""Bits of what is stored as bfloat16, beside ml_dtypes' rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from tests.schedules.execution import TARGET, normal, run, sum_tolerance

SPECIAL = [
    *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000),  # zeros and infinities
    *(0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),  # NaN
    *(0x00000001, 0x80000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF),  # no normal numbers
    *(0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001),  # halfway, to either side, and around it
    *(0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF),  # the largest, some of which round to infinity
]


def inputs() -> np.ndarray:
    patterns = np.arange(0, 1 << 32, 3999971, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([np.array(SPECIAL, np.uint32), patterns]).view(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 3)], ids=["vectors", "scalars", "threes"])
def test_bits_are_those_of_rounding_to_nearest_even(shape: tuple[int, ...]) -> None:
    x = inputs()
    x = x[: len(x) // 3 * 3].reshape(shape)
    got, _ = run(lambda x: op.astype(x, "bfloat16"), [x])
    np.testing.assert_array_equal(got.view(np.uint16), bits(x))


@pytest.mark.parametrize("value", [1.00390625, 1.01171875, -3.0, np.nan, np.inf, 1e-45])
def test_bits_of_a_scalar(value: float) -> None:
    x = np.array(value, np.float32)
    got, _ = run(lambda x: op.astype(x, "bfloat16"), [x])
    np.testing.assert_array_equal(got.view(np.uint16), bits(x))


@pytest.mark.parametrize("function", [op.erf, op.nn.silu, op.tanh, op.exp], ids=["erf", "silu", "tanh", "exp"])
@pytest.mark.parametrize("shape", [(70,), (5, 3, 1), ()], ids=str)
def test_a_function_of_fp32_is_rounded_once(
    function: Callable[[relax.Expr], relax.Expr], shape: tuple[int, ...]
) -> None:
    x = np.asarray(normal(*shape) * 4, np.float32)
    exact, _ = run(function, [x])
    got, _ = run(lambda x: op.astype(function(x), "bfloat16"), [x])
    np.testing.assert_array_equal(got.view(np.uint16), bits(exact))


@pytest.mark.skipif("avx512_bf16" not in TARGET.features, reason="the target has no instruction that rounds")
def test_gelu_keeps_its_digits_where_it_is_close_to_zero() -> None:
    x = np.linspace(-3, 5.4, 1024, dtype="float32")
    got, _ = run(lambda x: op.astype(op.nn.gelu(x), "bfloat16"), [x])
    want = x * np.vectorize(math.erfc)(-x.astype("float64") / math.sqrt(2)) / 2
    np.testing.assert_allclose(got.astype("float64"), want, rtol=2.0**-8 + 2.0**-11)


def test_elements_that_are_repeated_along_rows_keep_their_bits() -> None:
    x = inputs()[:64].reshape(-1, 1)
    got, _ = run(lambda x: op.astype(op.broadcast_to(x, (64, 33)), "bfloat16"), [x])
    np.testing.assert_array_equal(got.view(np.uint16), np.repeat(bits(x), 33, 1))
    moved, _ = run(lambda x: op.broadcast_to(x, (64, 33)), [got[:, :1].copy()])
    np.testing.assert_array_equal(moved.view(np.uint16), got.view(np.uint16))


def test_what_is_read_as_bfloat16_is_widened_exactly() -> None:
    x = bits(inputs()[:900]).view(ml_dtypes.bfloat16).reshape(3, 300)
    got, _ = run(lambda x: op.astype(op.permute_dims(op.astype(x, "float32"), [1, 0]), "bfloat16"), [x])
    np.testing.assert_array_equal(got.view(np.uint16), x.T.view(np.uint16))
    wide, _ = run(lambda x: op.astype(x, "float32"), [x])
    np.testing.assert_array_equal(wide, x.astype(np.float32))


def test_a_function_of_a_convolution_of_bfloat16() -> None:
    data, weights = bits(normal(1, 6, 20)).view(ml_dtypes.bfloat16), bits(normal(5, 6, 3)).view(ml_dtypes.bfloat16)

    def convolution(x: relax.Expr, w: relax.Expr) -> relax.Expr:
        return op.nn.gelu(op.nn.conv1d(x, w, padding=1, out_dtype="float32"))

    got, _ = run(convolution, [data, weights])
    want, _ = run(convolution, [data.astype(np.float32), weights.astype(np.float32)])
    np.testing.assert_allclose(got, want, atol=sum_tolerance(18, 1))
