from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from passes.convert_precision import ConvertPrecision
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.relax_modules import operators, run


def _product(dtype: str = "float32"):
    weights = np.random.default_rng(1).standard_normal((48, 16)).astype(dtype)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((5, 48), dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.matmul(x, relax.const(weights)))
        builder.emit_func_output(output)
    return builder.get(), weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_operands_are_rounded_once_and_sums_stay_fp32(dtype: str) -> None:
    module, weights = _product()
    outcome = ConvertPrecision(dtype).run(module)
    x = np.random.default_rng(2).standard_normal((5, 48)).astype("float32")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rounded = x.astype(kind).astype("float64") @ weights.astype(kind).astype("float64")
    np.testing.assert_allclose(run(outcome.module, x), rounded, rtol=1e-4, atol=48 * np.finfo("float32").eps * 8)
    assert operators(outcome.module) == ["relax.astype", "relax.matmul"]


def test_result_keeps_the_type_of_the_model() -> None:
    module, _ = _product("float16")
    outcome = ConvertPrecision("float32").run(module)
    x = np.random.default_rng(2).standard_normal((5, 48)).astype("float16")
    assert run(outcome.module, x).dtype == np.float16


def test_products_of_the_asked_type_are_refused() -> None:
    module, _ = _product()
    outcome = ConvertPrecision("float32").run(module)
    assert [site.refusal for site in outcome.sites] == ["both operands are float32 already"]


def test_an_unknown_type_is_refused() -> None:
    module, _ = _product()
    outcome = ConvertPrecision("int8").run(module)
    assert [site.refusal for site in outcome.sites] == ["int8 is not one of float32, float16, bfloat16"]


def test_only_operands_of_another_type_are_cast() -> None:
    def before(x, y):
        return relax.op.matmul(relax.op.astype(x, "float16"), y)

    module = graph(before, (5, 4), (4, 3), dtype=["float32", "float16"])
    assert operators(ConvertPrecision("float16").run(module).module) == ["relax.astype", "relax.matmul"]
    assert_kept(ConvertPrecision(), relax.op.matmul, (5, 4), (4, 3), dtype="int32")
    assert_kept(ConvertPrecision(), relax.op.matmul, (5, 4), (4, 3), dtype="float64")


def test_convolutions_keep_their_attributes() -> None:
    def before(x, w):
        return relax.op.nn.conv2d(x, w, strides=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2), groups=2)

    def after(x, w):
        x, w = relax.op.astype(x, "bfloat16"), relax.op.astype(w, "bfloat16")
        return relax.op.nn.conv2d(
            x, w, strides=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2), groups=2, out_dtype="float32"
        )

    assert_rewritten(ConvertPrecision(), before, after, *[("n", 4, 9, 9), (6, 2, 3, 3)])
