"""Tensors of 16 bits that several operators read in fp32."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import parser

from optimizer.compile import CompileOptions, compile_in_memory, find_target
from optimizer.frontend.importer import import_model
from passes import pipeline
from tests.compile.fused_models import kernels_of

_TEXT = """<ir_version: 9, opset_import: ["" : 20]>
    g (float[7,33] x) => (float[7,33] y, float[7,1] m) <int64[1] last = {-1}> {
        e = Exp(x)  h = Cast<to=KIND>(e)  w = Cast<to=1>(h)
        a = Tanh(w)  y = Mul(a, w)  m = ReduceMean(w, last)
    }"""
_KINDS = {"float16": (10, np.float16), "bfloat16": (16, ml_dtypes.bfloat16)}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_rounded_tensor_is_stored_rounded(kind: str) -> None:
    model = parser.parse_model(_TEXT.replace("KIND", str(_KINDS[kind][0])))
    module = pipeline.run(import_model(model).module, pipeline.parse(pipeline.DEFAULT))[0]
    assert sorted(kernels_of(module)) == ["cast_mean", "cast_tanh_cast_multiply", "exp_cast"]


@pytest.mark.parametrize("kind", _KINDS)
def test_what_reads_a_rounded_tensor_computes_the_same(kind: str) -> None:
    number, dtype = _KINDS[kind]
    x = np.random.default_rng(0).standard_normal((7, 33), dtype=np.float32)
    result = compile_in_memory(
        parser.parse_model(_TEXT.replace("KIND", str(number))), CompileOptions(find_target("host"))
    )
    found = result({"x": x})
    wide = np.exp(x.astype("float64")).astype(np.float32).astype(dtype).astype("float64")
    # A value halfway between two of 16 bits may be rounded to the other one.
    tolerance = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(found["y"], np.tanh(wide) * wide, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found["m"], wide.mean(1, keepdims=True), rtol=tolerance)
