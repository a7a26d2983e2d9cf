"""Decoders as torch's exporters write them: every form of mask and of repeated heads ends in one fused attention."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from optimizer.compile import CompileOptions, compile_in_memory, find_target
from optimizer.frontend.importer import import_model
from passes.fuse_attention import FuseAttention
from passes.rewrite_kv_cache import RewriteKvCache, caches_of
from tests.frontend.comparison import theirs

# Heads of keys and values [b,1,t,4] repeated for two heads of queries.
_REPEATED = {
    "expand": """
        {0}u = Unsqueeze ({0}, two)
        {0}x = Expand ({0}u, twice)
        {0}r = Reshape ({0}x, joined)
    """,
    "tile": "{0}r = Tile ({0}, copies)",
    "concat": "{0}r = Concat <axis = 1> ({0}, {0})",
}
_MASKS = {
    "int64": "m = Cast <to = 1> (mask)\n n = Sub (onef, m)\n bias = Mul (n, lowest)",
    "bool": "bias = Where (mask, zerof, lowest)",
    "float": "bias = Identity (mask)",
}
# Of a sliding window of three tokens, which Mistral's and Gemma's exports write as arithmetic of positions.
_WINDOW = """
    distance = Sub (row, column)
    far = GreaterOrEqual (distance, three)
    later = Less (distance, zero)
    hidden = Or (far, later)
    window = Where (hidden, lowest, zerof)
    both = Add (bias4, window)
"""
_MODEL = """
    <ir_version: 8, opset_import: ["" : 17]>
    layer (float[b,2,n,4] q, float[b,1,n,4] k, float[b,1,n,4] v, float[b,1,p,4] past_key, float[b,1,p,4] past_value,
           {kind}[b,t] mask, int64[n,1] row, int64[1,t] column)
        => (float[b,n,2,4] output, float[b,1,t,4] key, float[b,1,t,4] value)
    <int64[1] two = {{2}}, int64[5] twice = {{1,1,2,1,1}}, int64[4] joined = {{0,2,-1,4}},
     int64[4] copies = {{1,2,1,1}},
     float onef = {{1.0}}, float zerof = {{0.0}}, float lowest = {{-3.4e38}}, int64 three = {{3}}, int64 zero = {{0}},
     int64[2] axes = {{1,2}}, float scale = {{0.5}}>
    {{
        key = Concat <axis = 2> (past_key, k)
        value = Concat <axis = 2> (past_value, v)
        {repeated}
        turned = Transpose <perm = [0, 1, 3, 2]> (keyr)
        raw = MatMul (q, turned)
        scores = Mul (raw, scale)
        {mask}
        bias4 = Unsqueeze (bias, axes)
        {window}
        masked = Add (scores, both)
        weights = Softmax <axis = -1> (masked)
        heads = MatMul (weights, valuer)
        output = Transpose <perm = [0, 2, 1, 3]> (heads)
    }}
"""
_FORMS = [("expand", "int64", True), ("tile", "bool", False), ("concat", "float", True)]


@pytest.mark.parametrize(("repeat", "kind", "has_window"), _FORMS, ids=str)
def test_the_cache_is_appended_to_and_attention_is_one_function(repeat: str, kind: str, has_window: bool) -> None:
    repeated = "\n".join(_REPEATED[repeat].format(name) for name in ("key", "value"))
    window = _WINDOW if has_window else "both = Identity (bias4)"
    model = parser.parse_model(_MODEL.format(kind=kind, repeated=repeated, mask=_MASKS[kind], window=window))
    outcome = RewriteKvCache().run(import_model(model).module)
    assert len(caches_of(outcome.module["main"])) == 2
    assert [site.refusal for site in FuseAttention().run(outcome.module).sites] == [None]

    rng = np.random.default_rng(3)
    shapes = {"q": (2, 2, 3, 4), **dict.fromkeys("kv", (2, 1, 3, 4))}
    shapes |= dict.fromkeys(("past_key", "past_value"), (2, 1, 5, 4))
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    seen = np.ones((2, 8), np.int64)
    seen[0, 0] = 0
    wide = {"int64": seen, "bool": seen.astype(bool), "float": np.where(seen, 0, -9).astype(np.float32)}
    inputs |= {"mask": wide[kind], "row": np.arange(5, 8)[:, None], "column": np.arange(8)[None]}
    actual, expected = compile_in_memory(model, CompileOptions(find_target("host")))(inputs), theirs(model)(inputs)
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-6)
