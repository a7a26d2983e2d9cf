from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.quantization import error_feedback
from passes.quantization.activation_scaling import scale_columns
from passes.quantization.error_feedback import fit_to_inputs, output_error
from passes.quantization.methods import quantize
from passes.quantization.scheme import PER_CHANNEL, SCALE_DTYPES, Scheme

SCHEMES = st.builds(
    Scheme,
    bits=st.just(4),
    group=st.sampled_from([PER_CHANNEL, 16, 32, 128]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(sorted(SCALE_DTYPES)),
)


def _case(rows: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the second moments of inputs that depend on each other."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((3 * inputs + 8, inputs)) @ (random.standard_normal((inputs, inputs)) + np.eye(inputs))
    return random.standard_normal((rows, inputs)).astype(np.float32), (x.T @ x).astype(np.float32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SCHEMES, st.integers(12, 20), st.integers(17, 130), st.integers(0, 99))
def test_fitted_weights_are_better_than_rounded_ones(scheme: Scheme, rows: int, inputs: int, seed: int) -> None:
    """Of a single short row the nearest codes may be the better ones, since a code is not chosen with all others."""
    matrix, moments = _case(rows, inputs, seed)
    plain, fitted = quantize(matrix, scheme), fit_to_inputs(matrix, moments, scheme, damping=0.01)
    assert fitted.codes.max() < scheme.levels
    errors = [output_error(matrix, each.dequantized(), moments) for each in (plain, fitted)]
    assert errors[1] < errors[0]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(SCHEMES, st.integers(1, 5), st.integers(1, 100), st.integers(0, 99))
def test_descent_adds_no_error(scheme: Scheme, rows: int, inputs: int, seed: int) -> None:
    matrix, moments = _case(rows, inputs, seed)
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(inputs, dtype=np.float32)
    errors = [
        output_error(matrix, fit_to_inputs(matrix, moments, scheme, damping=0.01, sweeps=sweeps).dequantized(), damped)
        for sweeps in (0, 1, 3)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-3) + 1e-3
    assert errors[2] <= errors[1] * (1 + 1e-3) + 1e-3


def test_feedback_is_that_of_algorithm_1() -> None:
    matrix, moments = _case(5, 48, 1)
    scheme = Scheme(group=16, scale_dtype="float32")
    fitted = fit_to_inputs(matrix, moments, scheme, damping=0.01, sweeps=0)
    # The algorithm column by column, with the inverse of H itself.
    second = moments.astype(np.float64) + 0.01 * np.diag(moments).mean() * np.eye(48)
    upper = np.linalg.cholesky(np.linalg.inv(second)).T
    left = matrix.astype(np.float64)
    scales = np.repeat(fitted.scales.astype(np.float64), 16, 1)
    for column in range(48):
        codes = np.clip(np.rint(left[:, column] / scales[:, column]) + 8, 0, 15)
        error = (left[:, column] - (codes - 8) * scales[:, column]) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
        assert np.mean(codes == fitted.codes[:, column]) > 0.7  # ties fall either way in float32


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_columns_give_the_codes_of_columns_one_by_one(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    matrix, moments = _case(6, 96, 5)
    scheme = Scheme(group=16, symmetric=symmetric, scale_dtype="float32")
    blocks = [96, 32, 16]
    fitted = []
    for block in blocks:
        monkeypatch.setattr(error_feedback, "BLOCK", block)
        fitted.append(fit_to_inputs(matrix, moments, scheme, sweeps=2))
    for other in fitted[1:]:  # ties fall either way in float32
        assert np.mean(other.codes == fitted[0].codes) > 0.98
        assert output_error(matrix, other.dequantized(), moments) == pytest.approx(
            output_error(matrix, fitted[0].dequantized(), moments), rel=1e-2
        )


def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest_codes() -> None:
    matrix = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    fitted = fit_to_inputs(matrix, np.eye(64, dtype=np.float32), Scheme(), sweeps=0)
    np.testing.assert_array_equal(fitted.codes, quantize(matrix, Scheme(), "minimum-error").codes)


def test_inputs_that_are_never_seen_do_no_harm() -> None:
    matrix = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    for moments in (np.zeros((64, 64), np.float32), np.diag([1.0] * 8 + [0.0] * 56).astype(np.float32)):
        error = fit_to_inputs(matrix, moments, Scheme()).dequantized() - matrix
        assert np.abs(error).max() < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_scaled_columns_lower_the_error_of_outputs(symmetric: bool) -> None:
    random = np.random.default_rng(4)
    matrices = [random.standard_normal((rows, 64)).astype(np.float32) for rows in (6, 9)]
    x = random.standard_normal((200, 64)) * np.where(np.arange(64) % 16 == 0, 20, 1)
    moments = (x.T @ x).astype(np.float32)
    scheme = Scheme(symmetric=symmetric)
    fitted = scale_columns(matrices, moments, scheme)
    assert all(np.array_equal(each.input_scales, fitted[0].input_scales) for each in fitted)
    factors = fitted[0].input_scales
    assert factors is not None
    assert factors.max() * factors.min() == pytest.approx(1, rel=1e-5)  # so that fp16 holds them
    for matrix, each in zip(matrices, fitted, strict=True):
        assert each.input_scales is not None
        scaled = output_error(matrix, each.matrix.dequantized() * each.input_scales, moments)
        assert scaled < output_error(matrix, quantize(matrix, scheme, "minimum-error").dequantized(), moments)
