from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from passes.simplify_algebra import IDENTITIES, SimplifyAlgebra
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.relax_modules import operators, run

_SPECIAL = np.array([[0.0, -0.0, np.inf, -np.inf], [np.nan, 1.5, -3.0, 1e-42]], "float32")


def _c(value: float | np.ndarray, dtype: str = "float32") -> relax.Expr:
    return relax.const(np.asarray(value, dtype), dtype)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: op.multiply(x, _c(1.0)), lambda x: x),
        (lambda x: op.multiply(_c(1.0), x), lambda x: x),
        (lambda x: op.divide(x, _c([1.0])), lambda x: x),
        (lambda x: op.power(x, _c(1.0)), lambda x: x),
        (lambda x: op.subtract(x, _c(0.0)), lambda x: x),
        (lambda x: op.add(x, _c(-0.0)), lambda x: x),
        (lambda x: op.add(op.exp(x), _c(0.0)), op.exp),
        (lambda x: op.multiply(x, _c(-1.0)), op.negative),
        (lambda x: op.subtract(x, op.negative(op.exp(x))), lambda x: op.add(x, op.exp(x))),
        (lambda x: op.power(x, _c(2.0)), lambda x: op.multiply(x, x)),
        (lambda x: op.power(x, _c(3.0)), lambda x: op.multiply(op.multiply(x, x), x)),
        (lambda x: op.power(x, _c(-1.0)), lambda x: op.divide(_c(1.0), x)),
        (lambda x: op.divide(_c(1.0), op.sqrt(x)), op.rsqrt),
        (lambda x: op.divide(x, _c(8.0)), lambda x: op.multiply(x, op.divide(_c(1.0), _c(8.0)))),
        (lambda x: op.negative(op.negative(x)), lambda x: x),
        (lambda x: op.nn.relu(op.nn.relu(op.nn.relu(x))), op.nn.relu),
        (lambda x: op.maximum(x, x), lambda x: x),
        (lambda x: op.where(op.isnan(x), x, x), lambda x: x),
    ],
)
def test_identities_of_floats(before, after) -> None:
    assert_rewritten(SimplifyAlgebra(), before, after, ("n", 4))


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        (lambda x: op.add(x, _c(0, "int64")), lambda x: x, "int64"),
        (
            lambda x: op.add(op.add(x, _c(2, "uint8")), _c(255, "uint8")),
            lambda x: op.add(x, op.add(_c(2, "uint8"), _c(255, "uint8"))),
            "uint8",
        ),
        (lambda x: op.power(x, _c(2, "int32")), lambda x: op.multiply(x, x), "int32"),
        (lambda x: op.logical_and(_c(True, "bool"), x), lambda x: x, "bool"),
        (lambda x: op.logical_or(x, _c(False, "bool")), lambda x: x, "bool"),
        (lambda x: op.logical_not(op.logical_not(x)), lambda x: x, "bool"),
    ],
)
def test_identities_of_integers_and_booleans(before, after, dtype: str) -> None:
    assert_rewritten(SimplifyAlgebra(), before, after, (3, 4), dtype=dtype)


@pytest.mark.parametrize(
    ("divisor", "fires"),
    [
        (2.0**14, True),
        (2.0**15, False),
        (2.0**-14, True),
        (2.0**-15, False),
        (-4.0, True),
        (1.5, False),
        (float("inf"), False),
        (float("nan"), False),
    ],
)
def test_quotients_by_powers_of_two_become_products(divisor: float, fires: bool) -> None:
    module = SimplifyAlgebra().run(graph(lambda x: op.divide(x, _c(divisor)), (2, 4))).module
    assert ("relax.multiply" in operators(module)) is fires


@pytest.mark.parametrize(
    ("dividend", "divisor", "fires"),
    [
        ((5, 4), (5, 1), True),
        ((5, 4), (4,), True),
        ((5, 4), (5, 4), False),
        ((4,), (4,), False),
        ((1, 4), (1, 4), False),
        ((5, 1), (5, 4), False),
        (("n", 4), ("n", 1), True),
    ],
)
def test_roots_are_inverted_where_there_are_fewer_of_them(dividend, divisor, fires: bool) -> None:
    module = graph(lambda x, y: op.divide(x, op.sqrt(y)), dividend, divisor)
    assert ("relax.rsqrt" in operators(SimplifyAlgebra().run(module).module)) is fires


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        (
            lambda x: op.multiply(op.multiply(x, _c(3, "int32")), _c(5, "int32")),
            lambda x: op.multiply(x, op.multiply(_c(3, "int32"), _c(5, "int32"))),
            "int32",
        ),
        (lambda x: op.add(x, op.negative(op.abs(x))), lambda x: op.subtract(x, op.abs(x)), "float32"),
        (lambda x: op.add(op.abs(x), _c(0.0)), op.abs, "float32"),
        (lambda x: op.add(op.sigmoid(x), _c(0.0)), op.sigmoid, "float32"),
        (lambda x: op.add(op.nn.softmax(x), _c(0.0)), op.nn.softmax, "float32"),
        (lambda x: op.abs(op.abs(x)), op.abs, "float32"),
        (lambda x: op.abs(op.negative(x)), op.abs, "float32"),
        (lambda x: op.floor(op.floor(x)), op.floor, "float32"),
        (lambda x: op.ceil(op.ceil(x)), op.ceil, "float32"),
        (lambda x: op.round(op.round(x)), op.round, "float32"),
        (lambda x: op.sign(op.sign(x)), op.sign, "float32"),
        (lambda x: op.minimum(x, x), lambda x: x, "float32"),
        (
            lambda x: op.where(op.logical_not(op.isnan(x)), x, op.abs(x)),
            lambda x: op.where(op.isnan(x), op.abs(x), x),
            "float32",
        ),
        (lambda x: op.logical_and(x, x), lambda x: x, "bool"),
        (lambda x: op.logical_or(x, x), lambda x: x, "bool"),
    ],
)
def test_further_identities(before, after, dtype: str) -> None:
    assert_rewritten(SimplifyAlgebra(), before, after, (3, 4), dtype=dtype)


def test_only_scalars_are_gathered() -> None:
    several = _c(np.array([1, 2, 3, 4]), "int32")
    assert_kept(
        SimplifyAlgebra(), lambda x: op.multiply(op.multiply(x, several), _c(5, "int32")), (3, 4), dtype="int32"
    )


def test_root_per_row_is_taken_before_the_quotient_per_element() -> None:
    assert_rewritten(
        SimplifyAlgebra(),
        lambda x, y: op.divide(x, op.sqrt(y)),
        lambda x, y: op.multiply(x, op.rsqrt(y)),
        *[(5, 4), (5, 1)],
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda x: op.add(x, _c(0.0)),  # -0.0 + 0 is 0
        lambda x: op.subtract(x, _c(-0.0)),
        lambda x: op.multiply(x, _c(0.0)),  # NaN and infinities stay
        lambda x: op.subtract(x, x),
        lambda x: op.divide(x, _c(3.0)),  # 1/3 is rounded
        lambda x: op.multiply(op.multiply(x, _c(1e30)), _c(1e-30)),  # overflows between
        lambda x: op.power(x, _c(0.5)),  # of -0.0 it is 0, and of -inf it is inf
        lambda x: op.divide(_c(2.0), op.sqrt(x)),
        lambda x: op.power(x, _c(np.array([2.0, 3.0, 2.0, 2.0]))),
        lambda x: op.divide(x, _c(0.0)),
    ],
)
def test_what_only_holds_for_some_values_is_kept(body) -> None:
    assert_kept(SimplifyAlgebra(), body, (2, 4))


def test_operand_that_widens_the_result_is_kept_and_says_so() -> None:
    outcome = assert_kept(SimplifyAlgebra(), lambda x: op.multiply(x, _c(np.ones((3, 1, 1)))), (2, 4))
    assert [site.refusal for site in outcome.sites] == ["x * 1 -> x: the result is broadcast to another shape"]


def test_large_constants_are_not_searched() -> None:
    assert_kept(SimplifyAlgebra(), lambda x: op.multiply(x, _c(np.ones(1 << 17))), (1 << 17,))


_FLOAT_BODIES = {
    "scale": lambda x: op.multiply(op.divide(x, _c(0.25)), _c(1.0)),
    "powers": lambda x: op.add(op.power(x, _c(2.0)), op.power(x, _c(3.0))),
    "signs": lambda x: op.subtract(op.multiply(x, _c(-1.0)), op.negative(op.abs(op.negative(x)))),
    "zeros": lambda x: op.divide(_c(1.0), op.subtract(op.add(x, _c(-0.0)), _c(0.0))),
    "roots": lambda x: op.divide(x, op.sqrt(op.sum(op.multiply(x, x), [1], keepdims=True))),
}


@pytest.mark.parametrize("body", _FLOAT_BODIES.values(), ids=_FLOAT_BODIES)
def test_special_values_come_out_the_same(body) -> None:
    module = graph(body, (2, 4))
    before, after = run(module, _SPECIAL), run(SimplifyAlgebra().run(module).module, _SPECIAL)
    np.testing.assert_allclose(after, before, rtol=4 * np.finfo("float32").eps, atol=1e-44)
    finite = ~np.isnan(before)
    assert (np.signbit(after) == np.signbit(before))[finite].all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(IDENTITIES))
def test_every_identity_has_both_sides_over_the_same_names(identity) -> None:
    assert identity.right.names() <= identity.left.names()
