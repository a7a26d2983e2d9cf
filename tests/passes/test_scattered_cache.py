"""Caches of opset 24 that TensorScatter writes to, beside those of opset 23's Attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx.reference import ReferenceEvaluator

from optimizer.compile import CompileOptions, compile_in_memory, compile_model, find_target
from optimizer.errors import OptionError
from optimizer.frontend.importer import import_model
from optimizer.runtime import load
from passes.base import PassOutcome
from passes.fuse_attention import FuseAttention
from passes.rewrite_kv_cache import RewriteKvCache, caches_of

# Two query heads over one head of keys and values; each row writes where it ends and reads as far as it reaches.
_LAYER = """
    <ir_version: 11, opset_import: ["" : 24]>
    layer (float[batch,2,new,4] query, float[batch,1,new,4] key, float[batch,1,new,4] value,
           float[batch,1,{room},4] key_cache, float[batch,1,{room},4] value_cache, int64[batch] starts)
        => (float[batch,new,2,4] output, float[batch,1,{room},4] keys, float[batch,1,{room},4] values)
    {{
        keys = TensorScatter <mode = "{mode}"> (key_cache, key, starts)
        values = TensorScatter <mode = "{mode}"> (value_cache, value, starts)
        axis = Constant <value = int64[1] {{2}}> ()
        added = Shape <start = 2, end = 3> (key)
        lengths = Add (starts, added)
        heads = Attention <is_causal = 1> (query, keys, values, , , , lengths)
        output = Transpose <perm = [0, 2, 1, 3]> (heads)
    }}
"""
_ROOM = {"symbol": "room", "number": "24"}


def _rewritten(text: str, dtype: str = "model") -> PassOutcome:
    return RewriteKvCache(dtype).run(import_model(parser.parse_model(text)).module)


def _arrays(batch: int, new: int, starts: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([batch, new])
    shapes = {
        "query": (batch, 2, new, 4),
        **dict.fromkeys(("key", "value"), (batch, 1, new, 4)),
        **dict.fromkeys(("key_cache", "value_cache"), (batch, 1, 24, 4)),
    }
    return {**{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}, "starts": starts}


@pytest.mark.parametrize("room", _ROOM.values(), ids=_ROOM)
def test_caches_that_are_scattered_to_become_buffers_and_attention_is_fused(room: str) -> None:
    outcome = _rewritten(_LAYER.format(room=room, mode="linear"))
    main = outcome.module["main"]
    assert [site.refusal for site in outcome.sites] == [None, None]
    assert [(cache.parameter, cache.output, cache.axis) for cache in caches_of(main)] == [(3, 1, 2), (4, 2, 2)]
    assert {str(parameter.ty.shape.values[2]) for parameter in main.params[3:5]} == {"capacity_0"}
    fused = FuseAttention().run(outcome.module).sites
    assert [site.refusal for site in fused] == [None]


def test_a_cache_that_is_read_before_it_is_written_to_is_refused() -> None:
    text = _LAYER.format(room="room", mode="linear").replace("float[batch,1,room,4] values)", "float[b,h,r,c] values)")
    text = text.replace("keys, float[b", "keys, float[x,y,z,w] before, float[b")
    text = text.replace("axis =", "before = Neg (key_cache)\n axis =")
    first, second = _rewritten(text).sites
    assert first.refusal is not None
    assert "another reader" in first.refusal
    assert second.refusal is None


def test_codes_are_refused_for_tokens_that_are_written_anywhere() -> None:
    outcome = _rewritten(_LAYER.format(room="room", mode="linear"), "int8")
    refusals = [site.refusal for site in outcome.sites if site.refusal is not None]
    assert len(refusals) == 2
    assert all("written anywhere" in refusal for refusal in refusals)
    assert [cache.pages for cache in caches_of(outcome.module["main"])] == [None, None]


@pytest.fixture(scope="module", params=[("room", "linear"), ("24", "linear"), ("24", "circular")], ids="-".join)
def layer(request: pytest.FixtureRequest) -> tuple:
    """Return the layer compiled, its reference, and whether it writes in a circle."""
    room, mode = request.param
    model = parser.parse_model(_LAYER.format(room=room, mode=mode))
    return compile_in_memory(model, CompileOptions(find_target("host"))), ReferenceEvaluator(model), mode == "circular"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), new=st.sampled_from([1, 2, 7, 13]))
def test_each_row_is_written_where_it_ends(layer: tuple, data: st.DataObject, batch: int, new: int) -> None:
    compiled, reference, is_circular = layer
    last = 23 if is_circular else 24 - new
    starts = np.array(data.draw(st.lists(st.integers(0, last), min_size=batch, max_size=batch)), np.int64)
    inputs = _arrays(batch, new, starts)
    expected = dict(zip(reference.output_names, reference.run(None, inputs), strict=True))
    actual = compiled(inputs)
    for name in ("keys", "values"):
        np.testing.assert_array_equal(actual[name], expected[name])
    np.testing.assert_allclose(actual["output"], expected["output"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", _ROOM.values(), ids=_ROOM)
def test_steps_write_to_one_buffer_in_place(room: str, tmp_path: Path) -> None:
    model = parser.parse_model(_LAYER.format(room=room, mode="linear"))
    source = tmp_path / "layer.onnx"
    source.write_bytes(model.SerializeToString())
    compile_model(source, tmp_path / "layer.opt", CompileOptions(find_target("host")), certify=False)
    entry = load(tmp_path / "layer.opt").entry("main")
    cache, reference = entry.new_cache(capacity=24, sizes={"batch": 2}), ReferenceEvaluator(model)
    held = dict.fromkeys(("key_cache", "value_cache"), np.zeros((2, 1, 24, 4), np.float32))
    address = cache.buffers["key_cache"].tensors[0].data_ptr()
    for new, starts in ((7, [0, 0]), (1, [7, 4]), (5, [8, 5])):
        given = _arrays(2, new, np.array(starts))
        inputs = {name: array for name, array in given.items() if name not in held}
        output, *present = reference.run(None, {**inputs, **held})
        held = dict(zip(held, present, strict=True))
        actual = entry.append(inputs, cache)["output"].numpy()
        np.testing.assert_allclose(actual, output, rtol=1e-5, atol=1e-6)
    assert cache.buffers["key_cache"].tensors[0].data_ptr() == address
    if room != "room":
        with pytest.raises(OptionError, match="24 tokens"):
            entry.new_cache(capacity=32)
    else:
        with pytest.raises(OptionError, match="capacity"):
            entry.new_cache()


_STANDARD = """
    <ir_version: 11, opset_import: ["" : 23]>
    layer (float[batch,2,new,4] query, float[batch,1,new,4] key, float[batch,1,new,4] value,
           float[batch,1,past,4] past_key, float[batch,1,past,4] past_value, {type}[new,total] mask)
        => (float[batch,new,2,4] output, float[batch,1,total,4] keys, float[batch,1,total,4] values)
    {{
        heads, keys, values = Attention {attributes} (query, key, value, mask, past_key, past_value)
        output = Transpose <perm = [0, 2, 1, 3]> (heads)
    }}
"""


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_cache_of_the_attention_operator_is_appended_to_and_attention_fused(kind: str) -> None:
    model = parser.parse_model(_STANDARD.format(type=kind, attributes="<softcap = 3.0>"))
    outcome = RewriteKvCache().run(import_model(model).module)
    assert [site.refusal for site in outcome.sites] == [None, None]
    fused = FuseAttention().run(outcome.module).sites
    assert [site.refusal for site in fused] == [None]
    inputs = _arrays(2, 3, np.zeros(0))
    past = {f"past_{name}": inputs.pop(f"{name}_cache")[:, :, :5] for name in ("key", "value")}
    mask = np.tril(np.ones((3, 8), bool), 5)
    inputs = {**inputs, **past, "mask": mask if kind == "bool" else np.where(mask, 0, -9).astype(np.float32)}
    del inputs["starts"]
    expected = ReferenceEvaluator(model).run(None, inputs)
    actual = compile_in_memory(model, CompileOptions(find_target("host")))(inputs)
    for name, array in zip(("output", "keys", "values"), expected, strict=True):
        np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-6)
