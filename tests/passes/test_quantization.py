from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.quantization import methods
from passes.quantization.grouping import codes_of, errors_of, in_groups, inverse, range_scales, storable
from passes.quantization.methods import METHODS, quantize
from passes.quantization.scheme import PER_CHANNEL, SCALE_DTYPES, QuantizedMatrix, Scheme, SchemeError

SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([PER_CHANNEL, 16, 32, 64, 128]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(sorted(SCALE_DTYPES)),
)


def _matrix(rows: int, inputs: int, seed: int, spread: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, inputs)) * spread).astype(np.float32)


def _steps(matrix: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The width of a code's step for each element, for scales that span each group's range."""
    size = scheme.group_of(matrix.shape[1])
    groups = np.pad(matrix, [(0, 0), (0, -matrix.shape[1] % size)]).reshape(len(matrix), -1, size)
    if scheme.symmetric:
        step = np.abs(groups).max(-1) / scheme.middle
    else:
        step = (np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)) / (scheme.levels - 1)
    return np.repeat(step, size, -1)[:, : matrix.shape[1]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SCHEMES, st.integers(1, 9), st.integers(1, 150), st.integers(0, 99))
def test_round_to_nearest_is_off_by_at_most_a_step(scheme: Scheme, rows: int, inputs: int, seed: int) -> None:
    matrix = _matrix(rows, inputs, seed)
    result = quantize(matrix, scheme).dequantized()
    # Half a step of rounding and half of the zero point's; a symmetric range lacks the last step on one side. The
    # scale's own rounding moves the outermost code by levels times its unit roundoff.
    roundoff = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23}[scheme.scale_dtype]
    bound = _steps(matrix, scheme) * (1.0 + scheme.levels * roundoff)
    assert (np.abs(result - matrix) <= bound + 1e-6).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SCHEMES, st.sampled_from(sorted(METHODS)), st.integers(1, 5), st.integers(1, 100))
def test_codes_use_the_bits_of_the_scheme(scheme: Scheme, method: str, rows: int, inputs: int) -> None:
    if method == "hqq" and scheme.symmetric:
        return
    result = quantize(_matrix(rows, inputs, 5), scheme, method)
    assert result.codes.dtype == np.uint8
    assert result.codes.max() < scheme.levels
    assert result.scales.dtype == SCALE_DTYPES[scheme.scale_dtype]
    assert (result.zero_points is None) == scheme.symmetric


_PAIRS = [(method, symmetric) for method in sorted(METHODS) for symmetric in (True, False)]


# HQQ chooses zero points: it has no symmetric form.
@pytest.mark.parametrize(("method", "symmetric"), [pair for pair in _PAIRS if pair != ("hqq", True)])
def test_zeros_stay_zeros(method: str, symmetric: bool) -> None:
    matrix = np.zeros((3, 64), np.float32)
    assert not quantize(matrix, Scheme(symmetric=symmetric), method).dequantized().any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_minimum_error_has_no_larger_squared_error(group: int, symmetric: bool) -> None:
    matrix = _matrix(16, 384, 1)
    scheme = Scheme(group=group, symmetric=symmetric)
    plain, clipped = (quantize(matrix, scheme, method).dequantized() - matrix for method in ("rtn", "minimum-error"))
    per_group = [(error**2).reshape(-1, group).sum(-1) for error in (plain, clipped)]
    assert (per_group[1] <= per_group[0] * (1 + 1e-5)).all()
    # On normal weights clipping and refitting must pay, not only not hurt.
    assert per_group[1].sum() < 0.9 * per_group[0].sum()


def test_half_quadratic_lowers_the_norm_that_it_minimizes() -> None:
    matrix = _matrix(16, 384, 2) ** 3  # heavy tails
    scheme = Scheme(group=64, symmetric=False)
    plain, fitted = (np.abs(quantize(matrix, scheme, m).dequantized() - matrix) ** 0.7 for m in ("rtn", "hqq"))
    assert fitted.sum() < plain.sum()


def test_exactly_representable_weights_survive() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (8, 64))
    codes[:, ::32] = 0  # each group holds its extreme
    matrix = ((codes - 8) * 0.125).astype(np.float32)
    result = quantize(matrix, Scheme())
    assert np.array_equal(result.codes, codes)
    assert np.array_equal(result.dequantized(), matrix)


def test_rows_do_not_depend_on_each_other() -> None:
    matrix = _matrix(6, 96, 4)
    scheme = Scheme(symmetric=False)
    whole, part = quantize(matrix, scheme, "hqq"), quantize(matrix[2:4], scheme, "hqq")
    assert np.array_equal(whole.codes[2:4], part.codes)


def test_what_a_scheme_cannot_hold_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"^weights of 3 bits; choose 4 or 8$"):
        Scheme(bits=3)
    with pytest.raises(SchemeError, match=r"^groups of 20; choose one of 16, 32, 64, 128, or 0 for whole rows$"):
        Scheme(group=20)
    with pytest.raises(SchemeError, match=r"^a weight is not finite or too large for float16 scales; choose float32$"):
        quantize(np.full((1, 32), 1e6, np.float32), Scheme())
    with pytest.raises(SchemeError, match=r"^unknown method 'guess'; choose one of rtn, minimum-error, hqq$"):
        quantize(np.zeros((1, 32), np.float32), Scheme(), "guess")
    with pytest.raises(SchemeError, match=r"^HQQ chooses zero points; take a scheme that is not symmetric$"):
        quantize(np.zeros((1, 32), np.float32), Scheme(), "hqq")
    with pytest.raises(SchemeError, match=r"^scales of type float64; choose one of float16, bfloat16, float32$"):
        Scheme(scale_dtype="float64")


def test_a_scheme_says_what_it_is() -> None:
    assert str(Scheme()) == "int4, groups of 32, symmetric, float16 scales"
    assert (
        str(Scheme(8, 0, symmetric=False, scale_dtype="float32"))
        == "int8, whole rows, with zero points, float32 scales"
    )
    assert (Scheme(4).levels, Scheme(4).middle, Scheme(8).levels, Scheme(8).middle) == (16, 8, 256, 128)
    assert [Scheme(group=0).group_of(inputs) for inputs in (1, 32, 33, 64)] == [32, 32, 64, 64]
    assert Scheme(group=16).group_of(100) == 16


def _parts(rows: int = 2, groups: int = 3, **changed: object) -> QuantizedMatrix:
    parts = {
        "bits": 4,
        "group": 16,
        "inputs": 48,
        "codes": np.arange(rows * groups * 16, dtype=np.uint8).reshape(rows, -1) % 16,
        "scales": np.arange(1, 1 + rows * groups, dtype=np.float16).reshape(rows, groups),
        "zero_points": None,
    }
    return QuantizedMatrix(**{**parts, **changed})


def test_parts_of_a_matrix_fit_together() -> None:
    assert _parts().rows == 2
    for changed in ({"group": 32}, {"inputs": 49}, {"inputs": 0}, {"codes": np.zeros((3, 48), np.uint8)}):
        with pytest.raises(SchemeError, match=r"^codes \(\d, 48\) do not fit scales \(2, 3\) of groups \d\d$"):
            _parts(**changed)
    with pytest.raises(SchemeError, match=r"^zero points \(2, 2\) do not fit scales \(2, 3\)$"):
        _parts(zero_points=np.zeros((2, 2), np.uint8))
    assert _parts(inputs=1).dequantized().shape == (2, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantization_subtracts_the_zero_point_and_scales(bits: int) -> None:
    zeros = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    for matrix in (_parts(bits=bits), _parts(bits=bits, zero_points=zeros, inputs=40)):
        scales = np.repeat(matrix.scales.astype(np.float32), 16, 1)
        points = np.repeat(zeros.astype(np.float32), 16, 1) if matrix.zero_points is not None else 1 << (bits - 1)
        expected = ((matrix.codes.astype(np.float32) - points) * scales)[:, : matrix.inputs]
        np.testing.assert_array_equal(matrix.dequantized(), expected)


_GROUP = np.array([[[-4.0, 2.0, 1.0, 0.0]]], np.float32)


def test_a_symmetric_range_has_its_extreme_as_code_zero() -> None:
    scheme = Scheme(bits=4)
    for sign in (1, -1):
        scales, zeros = range_scales(sign * _GROUP, scheme)
        assert (scales.tolist(), zeros.tolist()) == ([[sign * 0.5]], [[8]])
        assert codes_of(sign * _GROUP, scales, zeros, scheme).tolist() == [[[0, 12, 10, 8]]]


def test_a_range_with_zero_points_is_cut_into_its_steps_and_holds_zero() -> None:
    scheme = Scheme(bits=4, symmetric=False, scale_dtype="float32")
    scales, zeros = range_scales(_GROUP, scheme)
    np.testing.assert_allclose(scales, [[6 / 15]], rtol=1e-6)
    assert zeros.tolist() == [[10]]
    assert codes_of(_GROUP, scales, zeros, scheme).tolist() == [[[0, 15, 12, 10]]]
    scales, zeros = range_scales(np.array([[[1.0, 3.0]]], np.float32), scheme)
    np.testing.assert_allclose(scales, [[3 / 15]], rtol=1e-6)
    assert zeros.tolist() == [[0]]
    scales, zeros = range_scales(np.array([[[-1.0, -3.0]]], np.float32), scheme)
    np.testing.assert_allclose(scales, [[3 / 15]], rtol=1e-6)
    assert zeros.tolist() == [[15]]


def test_codes_and_errors_are_of_the_nearest_step() -> None:
    scales, zeros = np.array([[0.5, 0.0]], np.float32), np.array([[3.0, 2.0]], np.float32)
    groups = np.array([[[-9.0, 0.7, 9.0], [1.0, -1.0, 0.0]]], np.float32)
    codes = codes_of(groups, scales, zeros, Scheme(bits=4))
    assert codes.tolist() == [[[0, 4, 15], [2, 2, 2]]]
    np.testing.assert_allclose(errors_of(groups, codes, scales, zeros), [[[-7.5, 0.2, 3.0], [1, -1, 0]]], atol=1e-6)
    assert inverse(scales).tolist() == [[2, 0]]


def test_groups_are_runs_of_a_row_filled_up_with_zeros() -> None:
    groups = in_groups(np.arange(40, dtype=np.float16).reshape(2, 20), Scheme(group=16))
    assert (groups.shape, groups.dtype) == ((2, 2, 16), np.float32)
    assert groups[1, 1].tolist() == [36, 37, 38, 39, *[0] * 12]
    assert storable(np.array([1.0 + 2.0**-12]), Scheme()).tolist() == [1.0]


@pytest.mark.parametrize(("symmetric", "share"), [(True, 0.2), (False, 0.8)])
def test_minimum_error_finds_the_scale_of_weights_that_have_one(symmetric: bool, share: float) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(4, 12, (4, 32))  # the range is not used up: rounding to nearest would stretch it
    matrix = ((codes - 8) * 0.25).astype(np.float32)
    matrix[:, 0] = 0.25 * 7.4  # an outlier that clipping gives up
    scheme = Scheme(symmetric=symmetric, scale_dtype="float32")
    errors = [
        ((quantize(matrix, scheme, method).dequantized() - matrix) ** 2).sum() for method in ("rtn", "minimum-error")
    ]
    assert errors[1] < share * errors[0]


def test_matrices_of_many_rows_are_quantized_in_parts() -> None:
    matrix = _matrix(3, 64, 8)
    whole = quantize(matrix, Scheme(symmetric=False), "minimum-error")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "CHUNK_ELEMENTS", 128)
        parts = quantize(matrix, Scheme(symmetric=False), "minimum-error")
    for name in ("codes", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_zero_points_are_codes_where_they_are_whole() -> None:
    scheme = Scheme(symmetric=False)
    plain, fitted = (quantize(_matrix(4, 64, 9), scheme, method).zero_points for method in ("rtn", "hqq"))
    assert plain is not None
    assert fitted is not None
    assert (plain.dtype, fitted.dtype) == (np.uint8, np.float16)
