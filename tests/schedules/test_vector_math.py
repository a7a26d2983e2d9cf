"""Accuracy of the vectorized elementary functions over the whole range of fp32."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax, te, tirx
from tvm.relax import op

from optimizer.frontend.converters import activation
from schedules.intrin import circular_functions, elementary_calls, register_tables, vector_math
from tests.schedules.execution import TARGET, normal, run

REFERENCES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "exp": (np.exp, 2),
    "log": (np.log, 0.9),
    "tanh": (np.tanh, 2.5),
    "erf": (np.vectorize(math.erf), 2.9),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 2.5),
}


def inputs() -> np.ndarray:
    """Return every 39989th bit pattern of both signs, the special values, and dense samples around 0."""
    positive = np.arange(0, 0x7F800000, 39989, dtype=np.uint32)
    special = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001, 0x7F7FFFFF], np.uint32)
    patterns = np.concatenate([positive, positive | np.uint32(0x80000000), special]).view(np.float32)
    return np.concatenate(
        [patterns, np.linspace(-110, 110, 40001, dtype="float32"), np.linspace(-5, 5, 40001, dtype="float32")]
    )


def log1p(tensor: te.Tensor) -> te.Tensor:
    """Return log(1 + x), which Relax has no operator for."""
    return te.compute(tensor.shape, lambda *index: tirx.log1p(tensor[index]))


def computed(function: Callable[[te.Tensor], te.Tensor], x: np.ndarray) -> np.ndarray:
    """Return what a tensor expression gives."""
    got, _ = run(lambda x: relax.BlockBuilder.current().call_te(function, x), [x])
    return got


# Each with its reference, the largest error in units in the last place, and what is allowed besides: where exponentials
# are no longer normal numbers, the error of one, 2**-149, is multiplied by x, which is above -104.
COMPOSED = {
    "log1p": (log1p, np.log1p, 2.5, 0.0),
    "softplus": (activation.softplus, lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), 3, 0.0),
    "mish": (activation.mish, lambda x: x * np.tanh(np.log1p(np.exp(np.minimum(x, 500)))), 4.5, 104 * 2.0**-149),
}


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", COMPOSED)
def test_error_of_functions_without_an_operator(name: str, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    function, reference, bound, besides = COMPOSED[name]
    if paired:
        in_pairs = elementary_calls.PAIRED[vector_math.log1p_of_unit]
        monkeypatch.setitem(elementary_calls.FUNCTIONS, elementary_calls.OF_UNIT, in_pairs)
        monkeypatch.setattr(register_tables, "has_tables", lambda _: False)  # targets with few registers have none
    else:
        monkeypatch.setattr(elementary_calls, "PAIRED", {})
    x = inputs()
    got = computed(function, x)
    with np.errstate(all="ignore"):
        want = reference(x.astype("float64"))
        rounded = want.astype("float32")
        unit = np.spacing(np.abs(rounded)).astype("float64")
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite])
    excess = np.abs(got[finite] - want[finite]) - besides * (x[finite] < -87)
    assert np.max(excess / unit[finite]) <= bound


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_error_of_circular_functions(name: str) -> None:
    quarters = (np.arange(-5300, 5300) * (math.pi / 2)).astype("float32")
    dense = np.linspace(-circular_functions.LIMIT, circular_functions.LIMIT, 100001, dtype="float32")
    mixed = np.random.default_rng(0).permutation(np.concatenate([quarters, inputs()]))
    zeros = np.full(64, -0.0, dtype="float32")  # vectors without a large number, which the C library would take
    x = np.concatenate([quarters, dense, inputs(), mixed, zeros])
    got, _ = run(getattr(op, name), [x])
    with np.errstate(all="ignore"):
        want = getattr(np, name)(x.astype("float64"))
    finite = np.isfinite(x)
    assert np.isnan(got[~finite]).all()
    unit = np.spacing(np.abs(want[finite]).astype("float32")).astype("float64")
    error = np.abs(got[finite] - want[finite]) / unit
    assert error.max() <= 2
    if name == "sin":
        np.testing.assert_array_equal(np.signbit(got[x == 0]), np.signbit(x[x == 0]))


def test_vectors_of_nested_circular_functions() -> None:
    x = np.concatenate([normal(100), normal(100) * np.float32(1e6)])
    got, _ = run(lambda x: op.multiply(op.sin(op.cos(x)), op.exp(op.cos(x))), [x])
    exact = np.cos(x.astype("float64"))
    np.testing.assert_allclose(got, np.sin(exact) * np.exp(exact), rtol=1e-5, atol=1e-7)


def exponentials_of_nonpositive(
    monkeypatch: pytest.MonkeyPatch, coefficients: tuple[float, ...], *, scaled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers that are at most 0, and their exponentials by a polynomial, where no table takes its place."""
    monkeypatch.setitem(
        elementary_calls.FUNCTIONS,
        "tirx.exp",
        lambda x: vector_math.nonpositive_by_polynomial(x, coefficients, scaled=scaled),
    )
    x = np.concatenate([-np.abs(inputs()), np.linspace(-20, 0, 40001, dtype="float32")])
    got, _ = run(op.exp, [x])
    return x, got


BY_TABLES, BY_POLYNOMIALS = "by tables", "by polynomials"
WAYS = [BY_POLYNOMIALS, *([BY_TABLES] if register_tables.has_tables(TARGET) else [])]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way after the other, of those that this machine has, in which functions of whole vectors are computed."""
    if request.param == BY_POLYNOMIALS:
        monkeypatch.setattr(register_tables, "has_tables", lambda _: False)
    return request.param


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in REFERENCES
        for way in WAYS
        if way == BY_POLYNOMIALS or f"tirx.{name}" in elementary_calls.LOOKED_UP
    ],
    indirect=["way"],
)
@pytest.mark.usefixtures("way")
def test_error_in_units_in_the_last_place(name: str) -> None:
    reference, bound = REFERENCES[name]
    x = inputs()
    got, _ = run(getattr(op, name), [x])
    with np.errstate(all="ignore"):
        want = reference(x.astype("float64"))
        rounded = want.astype("float32")
    if name == "sigmoid":  # 1 / infinity, where the exact value is denormal
        rounded = np.where((x < -88) & np.isfinite(x), 0, rounded)
        want = np.where((x < -88) & np.isfinite(x), got, want)
        assert np.all(got[(x < -88) & np.isfinite(x)] < 2.0**-125)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite])
    unit = np.spacing(np.abs(want[finite]).astype("float32")).astype("float64")
    assert np.max(np.abs(got[finite] - want[finite]) / unit) <= bound
    if name in ("tanh", "erf", "sigmoid"):
        assert np.abs(got[finite]).max() <= 1


@pytest.mark.parametrize("scaled", [False, *([True] if vector_math.scales(TARGET) else [])])
def test_exponential_of_what_is_not_positive(monkeypatch: pytest.MonkeyPatch, way: str, scaled: bool) -> None:
    monkeypatch.setitem(elementary_calls.LOOKED_UP, "tirx.exp", register_tables.exp_of_nonpositive)
    x, got = exponentials_of_nonpositive(monkeypatch, vector_math.EXP_SHORT, scaled=scaled)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    assert got[x < vector_math.SMALLEST_EXPONENT].max() <= (2.0**-126 if way == BY_TABLES else 0)
    assert not got[x < -104].any()
    regular = x >= vector_math.SMALLEST_EXPONENT
    want = np.exp(x[regular].astype("float64"))
    bound = 2 * 2.0**-23 + 2e-9 * np.abs(x[regular]) / np.log(2)
    assert np.max(np.abs(got[regular] - want) / want / bound) <= 1
    assert got[x == 0].min() == got[x == 0].max() == 1


def test_exponentials_to_round_are_exact_enough_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(elementary_calls.LOOKED_UP, "tirx.exp")
    x, got = exponentials_of_nonpositive(monkeypatch, vector_math.EXP_TO_ROUND, scaled=False)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    assert not got[x < vector_math.SMALLEST_EXPONENT].any()
    regular = x >= vector_math.SMALLEST_EXPONENT
    want = np.exp(x[regular].astype("float64"))
    np.testing.assert_allclose(got[regular], want, rtol=2.0**-12.9)


@pytest.mark.skipif(not register_tables.has_tables(TARGET), reason="the target has no tables in registers")
def test_gelu_to_round_is_exact_enough_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(elementary_calls.LOOKED_UP, "tirx.erf", register_tables.gelu_to_round)
    every = np.arange(1 << 16, dtype=np.uint32) << 16  # all numbers of bfloat16
    x = np.concatenate([inputs(), np.linspace(-6, 6, 40001, dtype="float32"), every.view(np.float32)])
    x = x[: len(x) // 16 * 16]
    got, _ = run(op.erf, [x])
    assert np.array_equal(np.isnan(got), np.isnan(x))
    assert np.all(got[x == np.inf] == np.inf)
    assert not got[x < -6].any()
    x, got = x[np.isfinite(x)], got[np.isfinite(x)].astype("float64")
    exact = np.clip(x, -10, None).astype("float64")
    want = exact * np.vectorize(math.erfc)(-exact / math.sqrt(2)) / 2
    error = np.abs(got - want)
    assert np.max((error - np.abs(want) * 2.0**-12.5)[x >= -2]) <= 2.0**-149
    assert np.max((error - np.abs(want) * 2.0**-11.1)[x >= -3]) <= 2.0**-149
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(want), 2.0**-126))) - 7)
    assert np.max((error / unit)[(x >= -4) & (x <= 0)]) <= 0.33
    assert error[x < -4].max() < 4.2e-7
    assert np.array_equal(got[x >= 6], x[x >= 6])


def test_fp16_is_rounded_once() -> None:
    x = normal(300, dtype="float16")
    got, _ = run(op.exp, [x])
    np.testing.assert_array_max_ulp(got, np.exp(x.astype("float64")).astype("float16"), maxulp=1)


def test_small_whole_powers_are_products() -> None:
    x = normal(70)
    got, _ = run(lambda x: op.power(x, relax.const(2.0)), [x])
    np.testing.assert_array_equal(got, x * x)
