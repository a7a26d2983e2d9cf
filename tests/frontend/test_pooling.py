from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("operator", ["AveragePool", "MaxPool"])
def test_a_window_larger_than_the_input_covers_it_once(operator: str, include: int) -> None:
    """EfficientNet's exports pool 7 x 7 positions with a window of 1280 x 1280; it is no longer than the input."""
    count = f", count_include_pad = {include}" if operator == "AveragePool" else ""
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[1, 2, 5, 7] x) => (float[1, 2, 1, 1] y) {{
            y = {operator}<kernel_shape = [1000, 1000], strides = [1000, 1000], ceil_mode = 1{count}>(x)
        }}
    """)
    imported = import_model(model)
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 7), dtype=np.float32)
    wanted = x.mean((2, 3), keepdims=True) if operator == "AveragePool" else x.max((2, 3), keepdims=True)
    np.testing.assert_allclose(unoptimized(imported)({"x": x})["y"], wanted, rtol=1e-5, atol=1e-6)
    assert "pool_size=[5, 7]" in imported.module.script() or operator == "AveragePool"
