"""Paddings whose rows a schedule copies in vectors between both ends."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from optimizer.compile import CompileOptions, compile_in_memory, find_target
from tests.frontend.comparison import node_model


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
@pytest.mark.parametrize("width", [1, 5, 53])
def test_rows_are_continued_at_both_ends(mode: Literal["edge", "reflect", "wrap"], width: int) -> None:
    x = np.random.default_rng(width).standard_normal((3, 4, width), dtype=np.float32)
    low, high = min(3, width - 1), min(2, width - 1)
    pads = np.array([0, 1, low, 0, 2, high])
    model = node_model("Pad", {"x": x, "pads": pads}, ["y"], domain="", constants=["pads"], mode=mode)
    got = compile_in_memory(model, CompileOptions(find_target("host")))({"x": x})["y"]
    np.testing.assert_array_equal(got, np.pad(x, ((0, 0), (1, 2), (low, high)), mode))
