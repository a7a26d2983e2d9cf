"""Functions of one tensor, element by element, at special values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.frontend.comparison import node_model, ours


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sign_of_special_values(dtype: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 6e-8, -6e-8, 3, -3], dtype)
    given = ours(node_model("Sign", {"x": x}, ["y"], domain=""))({"x": x})["y"]
    np.testing.assert_array_equal(given, np.sign(x), strict=True)


def _quotient(x: int, divisor: int) -> int:
    """C's division, towards zero; 0 by 0."""
    towards_zero = abs(x) // max(abs(divisor), 1)
    return 0 if divisor == 0 else towards_zero if (x < 0) == (divisor < 0) else -towards_zero


def _remainder(x: int, divisor: int) -> int:
    return x % divisor if divisor else 0


@pytest.mark.parametrize("constants", [(), ("b",)], ids=["divisor given", "divisor constant"])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint32"])
@pytest.mark.parametrize(("operator", "function"), [("Div", _quotient), ("Mod", _remainder)])
def test_integers_that_no_machine_divides(
    operator: str, function: Callable[[int, int], int], dtype: str, constants: tuple[str, ...]
) -> None:
    limits = np.iinfo(dtype)
    x = np.array([[limits.min], [7], [limits.max]], dtype)
    divisors = np.array([0, 1, 3, limits.max, -1 if limits.min else 2], dtype)
    exact = np.array([[function(int(a), int(b)) for b in divisors] for a in x[:, 0]], object)
    wrapped = (exact & (2 ** (8 * x.itemsize) - 1)).astype(f"uint{8 * x.itemsize}").view(dtype)
    model = node_model(operator, {"a": x, "b": divisors}, ["y"], domain="", constants=constants)
    given = ours(model)({"a": x} if constants else {"a": x, "b": divisors})["y"]
    np.testing.assert_array_equal(given, wrapped, strict=True)
