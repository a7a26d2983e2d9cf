"""The first elements in order, whether few of them are kept or all are sorted."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("count", [1, 5, 130])
def test_top_elements_with_equal_and_unordered_ones(count: int, largest: int) -> None:
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n, 131, 2] x) => (float[n, {count}, 2] values, int64[n, {count}, 2] positions)
    <int64[1] k = {{{count}}}> {{ values, positions = TopK <axis = 1, largest = {largest}> (x, k) }}""")
    x = np.random.default_rng(0).integers(-20, 20, (3, 131, 2)).astype(np.float32)
    x[1, 7], x[2, 3:5], x[0, 9] = np.nan, np.inf, -np.inf
    values, positions = unoptimized(import_model(model))({"x": x}).values()
    # NaN counts as the greatest; of equal elements the first one comes first.
    keys = np.where(np.isnan(x), np.float32(1e9), x).clip(-1e8, 1e9)
    want = np.argsort(-keys if largest else keys, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, axis=1))
