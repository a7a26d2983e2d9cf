"""Functions of one tensor, element by element, at special values."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.comparison import node_model, ours


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sign_of_special_values(dtype: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 6e-8, -6e-8, 3, -3], dtype)
    given = ours(node_model("Sign", {"x": x}, ["y"], domain=""))({"x": x})["y"]
    np.testing.assert_array_equal(given, np.sign(x), strict=True)
