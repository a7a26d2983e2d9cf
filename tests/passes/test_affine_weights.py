from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from passes.affine_weights import AffineValue, affine_value, as_matrix
from passes.base import Dataflow, Refusal
from passes.quantization.scheme import QuantizedMatrix
from tests.passes.graph import graph
from tests.passes.properties.relax_interpreter import Interpreter

K, N = 64, 3


def _const(array: np.ndarray) -> relax.Expr:
    return relax.const(array, array.dtype.name)


def _codes(low: int, high: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.resize(np.arange(low, high), shape).astype(dtype)


def _scales(*shape: int) -> np.ndarray:
    return np.linspace(0.5, 1.5, int(np.prod(shape)), dtype="float32").reshape(shape)


def _dequantized(
    codes: np.ndarray, zeros: np.ndarray | None = None, scales: np.ndarray | None = None, dtype: str = "float32"
) -> relax.Expr:
    value = op.astype(_const(codes), dtype)
    if zeros is not None:
        value = op.subtract(value, op.astype(_const(zeros), dtype))
    return value if scales is None else op.multiply(value, _const(scales.astype(dtype)))


def _value(body) -> tuple[AffineValue | None, np.ndarray]:
    """Return what is read off an expression of constants, and its value."""
    module = graph(lambda _: body(), (1,))
    function = module["main"]
    (expected,) = Interpreter(module).run([np.zeros(1, "float32")])
    return affine_value(function.body.body, Dataflow(function)), expected


_UNSIGNED = _codes(0, 16, (K, N), "uint8")
_GROUPED = _codes(-8, 8, (K // 16, 16, N), "int8")
_AFFINE = {
    "integers": lambda: op.astype(_const(_UNSIGNED), "float32"),
    "scaled": lambda: _dequantized(_UNSIGNED, None, _scales(K, 1)),
    "shifted and scaled": lambda: _dequantized(_UNSIGNED, np.full((1, N), 8, "uint8"), _scales(N)),
    "by one number": lambda: _dequantized(_UNSIGNED, np.array(3, "uint8"), np.array(0.25, "float32")),
    "in groups": lambda: op.reshape(_dequantized(_GROUPED, None, _scales(K // 16, 1, N)), (K, N)),
    "transposed": lambda: op.permute_dims(_dequantized(_UNSIGNED.T.copy(), np.full((N, 1), 7, "uint8"), _scales(N, 1))),
    "transposed by axes": lambda: op.permute_dims(_dequantized(_GROUPED, None, _scales(N)), [0, 2, 1]),
    "sliced": lambda: op.strided_slice(_dequantized(_UNSIGNED, None, _scales(K, 1)), [0], [0], [60]),
    "sliced with a stride of 1": lambda: op.strided_slice(_dequantized(_UNSIGNED), [0, 1], [0, 0], [50, 2], [1, 1]),
    "a single zero point, reshaped": lambda: op.reshape(_dequantized(_GROUPED, np.array([[[2]]], "int8")), (K, N)),
}


@pytest.mark.parametrize("body", _AFFINE.values(), ids=_AFFINE)
def test_the_value_read_off_is_the_value_computed(body) -> None:
    value, expected = _value(body)
    assert value is not None
    computed = (value.integers.astype("float32") - value.zero_points) * value.scales
    np.testing.assert_array_equal(np.broadcast_to(computed, value.integers.shape), expected)
    assert value.zero_points.ndim == value.scales.ndim == value.integers.ndim


@pytest.mark.parametrize(
    "body",
    [
        lambda: op.astype(_const(_codes(0, 9, (K, N), "int32")), "float32"),  # not of 8 bits
        lambda: op.astype(_const(np.array(3, "int8")), "float32"),  # no axes
        lambda: op.astype(op.astype(_const(_UNSIGNED), "int32"), "float32"),
        lambda: op.exp(_dequantized(_UNSIGNED)),
        lambda: op.subtract(_dequantized(_UNSIGNED, None, _scales(N)), relax.const(1.0)),  # after the scale
        lambda: op.subtract(_dequantized(_UNSIGNED, np.full(N, 2, "uint8")), relax.const(1.0)),  # twice
        lambda: op.multiply(_dequantized(_UNSIGNED, None, _scales(N)), relax.const(2.0)),
        lambda: op.multiply(op.astype(_const(_UNSIGNED[:1]), "float32"), _const(_scales(K, 1))),  # enlarged
        lambda: op.multiply(_dequantized(_UNSIGNED), _const(_scales(1, K, N))),
        lambda: op.multiply(_dequantized(_UNSIGNED), op.exp(relax.const(1.0))),  # not constant yet
        lambda: op.strided_slice(_dequantized(_UNSIGNED), [0], [1], [60]),
        lambda: op.strided_slice(_dequantized(_UNSIGNED), [0], [0], [60], [2]),
    ],
)
def test_anything_else_is_not_read(body) -> None:
    assert _value(body)[0] is None


def _matrix(integers: np.ndarray, zeros: np.ndarray | float = 0.0, scales: np.ndarray | float = 1.0) -> QuantizedMatrix:
    parts = [
        np.reshape(np.asarray(part, "float32"), (1,) * (2 - np.ndim(part)) + np.shape(part)) for part in (zeros, scales)
    ]
    return as_matrix(AffineValue(integers, *parts))


def _per_group(values: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(values, group, 0)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "bits"),
    [
        (0, 16, "uint8", 4),
        (0, 17, "uint8", 8),
        (-8, 8, "int8", 4),
        (-9, 8, "int8", 8),
        (-8, 9, "int8", 8),
        (0, 256, "uint8", 8),
    ],
)
def test_the_fewest_bits_that_hold_the_integers_are_taken(low: int, high: int, dtype: str, bits: int) -> None:
    integers = _codes(low, high, (512, 1), dtype)
    matrix = _matrix(integers, scales=0.5)
    assert matrix.bits == bits
    np.testing.assert_array_equal(matrix.dequantized(), integers.T * np.float32(0.5))


@pytest.mark.parametrize("group", [16, 32, 64])
def test_groups_are_the_runs_over_which_scales_and_zero_points_stay(group: int) -> None:
    integers = _codes(0, 16, (128, 2), "uint8")
    scales = _per_group(_scales(128 // group, 2), group)
    zeros = _per_group(_codes(0, 16, (128 // group, 2), "uint8").astype("float32"), group)
    for matrix in (_matrix(integers, zeros, scales), _matrix(integers, zeros, 0.5), _matrix(integers, 3.0, scales)):
        assert matrix.group == group
        assert matrix.inputs == 128
    expected = ((integers - zeros) * scales).T
    np.testing.assert_array_equal(_matrix(integers, zeros, scales).dequantized(), expected)


def test_rows_of_one_scale_are_one_group_filled_up() -> None:
    matrix = _matrix(_codes(0, 16, (70, 2), "uint8"), 8.0, 0.5)
    assert (matrix.group, matrix.inputs, matrix.codes.shape) == (96, 70, (2, 96))
    assert not matrix.codes[:, 70:].any()
    assert matrix.zero_points is None  # the middle of the range


def test_scales_that_change_too_often_are_refused() -> None:
    scales = _per_group(_scales(8, 1), 8)
    with pytest.raises(Refusal, match=r"^its scales change every 8 elements of K, no multiple of 16$"):
        _matrix(_codes(0, 16, (64, 2), "uint8"), scales=scales)


def test_zero_points_are_shifted_with_the_integers() -> None:
    signed = _matrix(_codes(-8, 8, (32, 1), "int8"), -3.0)
    assert signed.zero_points is not None
    assert signed.zero_points.tolist() == [[5]]
    assert signed.zero_points.dtype == np.uint8
    assert _matrix(_codes(-8, 8, (32, 1), "int8"), 0.0).zero_points is None
    fraction = _matrix(_codes(0, 16, (32, 1), "uint8"), 2.5)
    assert fraction.zero_points is not None
    assert (fraction.zero_points.tolist(), fraction.zero_points.dtype) == ([[2.5]], np.float16)
    for beyond in (-1.0, 256.0):
        zeros = _matrix(_codes(0, 16, (32, 1), "uint8"), beyond).zero_points
        assert zeros is not None
        assert zeros.tolist() == [[beyond]]
    for edge in (0.0, 255.0):
        zeros = _matrix(_codes(0, 16, (32, 1), "uint8"), edge).zero_points
        assert zeros is not None
        assert zeros.dtype == np.uint8


@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.5, np.float16), (2.0**-100, ml_dtypes.bfloat16), (1e5, np.float32), (1 / 3, np.float32)]
)
def test_scales_are_of_the_narrowest_type_that_holds_them(scale: float, dtype: type) -> None:
    matrix = _matrix(_codes(0, 16, (32, 1), "uint8"), scales=np.float32(scale))
    assert matrix.scales.dtype == dtype
    assert matrix.scales.astype("float32").item() == np.float32(scale)
