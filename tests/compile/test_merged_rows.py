"""What is computed element by element before a function of rows, and what follows it, in one kernel with it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from optimizer.compile import CompileOptions, compile_in_memory, find_target

_FORMS = {
    "softmax of a sum": "a = Add(x, z)  y = Softmax(a)",
    "softmax of scaled columns": "a = Mul(x, v)  y = Softmax(a)",
    "normalized activation": "a = Tanh(x)  y = LayerNormalization(a, v, v)",
    "mean of exponentials": "a = Exp(x)  y = ReduceMean(a, last)",
    "distance to the largest": "a = ReduceMax(x, last)  y = Sub(x, a)",
    "unit rows": "a = Mul(x, x)  b = ReduceSum(a, last)  c = Sqrt(b)  y = Div(x, c)",
    "log softmax": "a = ReduceMax(x, last)  b = Sub(x, a)  c = Exp(b)  d = ReduceSum(c, last)  e = Log(d)"
    "  y = Sub(b, e)",
}
# Rows shorter and longer than a register, one element, few long rows; a symbolic number of rows and of columns.
_SHAPES = [(7, 33), (1, 1), (131, 3), (2, 40009)]


def _model(body: str, rows: int | str, columns: int | str, width: int) -> onnx.ModelProto:
    given = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        rows (float[{rows},{columns}] x, float[{rows},{columns}] z) => (float[r,c] y) {{ {body} }}"""
    )
    initializers = {"v": np.linspace(0.5, 2, width, dtype=np.float32), "last": np.array([-1])}
    given.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in initializers.items())
    return given


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("body", _FORMS.values(), ids=_FORMS)
def test_merged_rows_are_right(body: str, shape: tuple[int, int]) -> None:
    model = _model(body, *shape, shape[1])
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name in ("x", "z")}
    (result,) = compile_in_memory(model, CompileOptions(find_target("host")))(inputs).values()
    _check(model, inputs, result)


@pytest.mark.parametrize("body", _FORMS.values(), ids=_FORMS)
def test_merged_rows_of_any_number_are_right(body: str) -> None:
    model = _model(body, "rows", 33, 33)
    compiled = compile_in_memory(model, CompileOptions(find_target("host")))
    for rows in (1, 5, 64):
        inputs = {
            name: np.random.default_rng(rows).standard_normal((rows, 33), dtype=np.float32) for name in ("x", "z")
        }
        (result,) = compiled(inputs).values()
        _check(model, inputs, result)


def _check(model: onnx.ModelProto, inputs: dict[str, np.ndarray], result: np.ndarray) -> None:
    (expected,) = ReferenceEvaluator(model).run(None, inputs)
    # Sums in another order: their error grows with the root of the terms, at most 200 here; functions within 4 ULP.
    tolerance = 256 * float(np.finfo("float32").eps)
    expected = np.asarray(expected)
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
