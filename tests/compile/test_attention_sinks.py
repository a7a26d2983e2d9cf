"""The logit of each head that joins the softmax and has no value, as GPT-OSS has it: from ONNX to one kernel."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.compile import CompileOptions, compile_in_memory, find_target
from tests.compile.fused_models import kernels_of, model, rewritten
from tests.frontend.comparison import theirs

_CONSTANTS = {
    "sinks": np.array([-1, 0.5, 2, 30], "float32"), "columns": np.array([1, -1, 1, 1]), "last": np.array([-1]),
    "scale": np.float32(0.5), "from": np.array([0]), "groups": np.array([2]), "heads": np.array([0, 4, -1, 4]),
    "copies": np.array([1, 1, 2, 1, 1]), "one": np.array([1]), "three": np.array([3]), "flat": np.array([0, 0, 16]),
}  # fmt: skip
# Two heads of keys and values for four of queries; the softmax is that of scores and sinks less their maximum.
_WRITTEN_OUT = """g (float[b,4,s,4] q, float[b,2,t,4] k, float[b,2,t,4] v) => (float[b,s,16] y) {
    ke = Unsqueeze(k, groups)  kt = Tile(ke, copies)  kr = Reshape(kt, heads)
    ve = Unsqueeze(v, groups)  vt = Tile(ve, copies)  vr = Reshape(vt, heads)
    turned = Transpose<perm=[0,1,3,2]>(kr)
    products = MatMul(q, turned)
    scores = Mul(products, scale)
    shape = Shape(q)
    batch = Slice(shape, from, one)
    rows = Slice(shape, groups, three)
    full = Concat<axis=0>(batch, one, rows, one)
    column = Reshape(sinks, columns)
    wide = Expand(column, full)
    joined = Concat<axis=-1>(scores, wide)
    most = ReduceMax(joined, last)
    shifted = Sub(joined, most)
    all = Softmax<axis=-1>(shifted)
    weights = Slice(all, from, last, last)
    result = MatMul(weights, vr)
    back = Transpose<perm=[0,2,1,3]>(result)
    y = Reshape(back, flat)
}"""
_GROUPED = """g (float[b,s,16] q, float[b,s,8] k, float[b,s,8] v, int32[b] lasts) => (float[b,s,16] y) {{
    shape = Shape<start=1, end=2>(q)
    length = Cast<to=6>(shape)
    y = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2 {}>
        (q, k, v, , , lasts, length, , , , , {})
}}"""


@pytest.mark.parametrize(
    "text",
    [_WRITTEN_OUT, _GROUPED.format("", "sinks"), _GROUPED.format(", smooth_softmax=1", "").replace(", , , , , )", ")")],
    ids=["written out", "head_sink", "smooth_softmax"],
)
def test_attention_with_sinks_is_one_kernel(text: str) -> None:
    given = model(text, _CONSTANTS)
    kernels = kernels_of(rewritten(given))
    assert [name for name in kernels if "softmax" in name or "matmul" in name] == []
    assert [name for name in kernels if "attention" in name] == ["attention"]


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (20, 20)])
def test_written_out_sinks_agree_with_onnxruntime(queries: int, keys: int) -> None:
    random = np.random.default_rng(keys)
    shapes = {"q": (2, 4, queries, 4), "k": (2, 2, keys, 4), "v": (2, 2, keys, 4)}
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    given = model(_WRITTEN_OUT, _CONSTANTS)
    actual = compile_in_memory(given, CompileOptions(find_target("host")))(inputs)
    np.testing.assert_allclose(actual["y"], theirs(given)(inputs)["y"], rtol=1e-5, atol=1e-6)
