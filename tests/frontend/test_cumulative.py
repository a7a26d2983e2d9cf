"""Running sums and products of lines that lie apart or side by side, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.comparison import assert_same


@pytest.mark.parametrize("columns", [1, 7, 85])  # 85 = 64 + 16 + 5
@pytest.mark.parametrize(("exclusive", "reverse"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_running_sums_along_a_middle_axis(columns: int, exclusive: int, reverse: int) -> None:
    x = np.random.default_rng(columns).integers(-9, 9, (2, 13, columns)).astype(np.float32)
    inputs = {"x": x, "axis": np.array(1)}
    assert_same("CumSum", inputs, ["y"], domain="", constants=["axis"], exclusive=exclusive, reverse=reverse)


def test_running_sums_of_a_shape_known_at_run_time() -> None:
    x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    inputs = {"x": x, "axis": np.array(1)}
    assert_same("CumSum", inputs, ["y"], domain="", constants=["axis"], shapes={"x": ["n", "length", "columns"]})
