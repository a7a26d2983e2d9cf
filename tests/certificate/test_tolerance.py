from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from optimizer.certificate.tolerance import arithmetic


def _model(text: str) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> g (float[4] x) => (float[4] y) {{ {text} }}')
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float16), "w"))
    return model


def test_half_precision_weights_that_are_widened_do_not_loosen_the_tolerance() -> None:
    stored = _model("wide = Cast<to = 1>(w)\n y = Mul(x, wide)")
    assert arithmetic(stored).unit_roundoff == 2.0**-24


def test_half_precision_arithmetic_loosens_the_tolerance() -> None:
    computed = _model("narrow = Cast<to = 10>(x)\n p = Mul(narrow, w)\n y = Cast<to = 1>(p)")
    assert arithmetic(computed).unit_roundoff == 2.0**-11


def test_positions_in_an_image_are_rounded_to_its_size() -> None:
    resized = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1, 1, height, 200] x) => (float[1, 1, h, w] y)'
        '<float[4] scales = {1.0, 1.0, 1.37, 1.37}> { half = Relu(x)\n y = Resize<mode = "linear">(half, , scales) }'
    )
    tolerances = [arithmetic(resized, shapes={"x": (1, 1, size, 200)}).tolerance("float32") for size in (100, 200, 400)]
    assert tolerances[0] == tolerances[1]
    assert tolerances[2] - tolerances[1] == pytest.approx(4 * 200 * 2.0**-24)
