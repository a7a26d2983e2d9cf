from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from optimizer.compile import CompileOptions, compile_in_memory, find_target
from optimizer.frontend.importer import import_model
from optimizer.signature import entry_point
from passes.base import PassOutcome
from passes.fuse_attention import FuseAttention
from passes.pipeline import PassOptionError
from passes.rewrite_kv_cache import Cache, RewriteKvCache, caches_of

# One layer: two query heads over one head of keys and values, kept as exporters keep them.
_LAYER = """
    <ir_version: 8, opset_import: ["" : 17]>
    layer (float[batch,2,new,4] query, float[batch,1,new,4] key, float[batch,1,new,4] value,
           float[batch,1,past,4] past_key, float[batch,1,past,4] past_value)
        => (float[batch,2,new,4] output, float[batch,1,total,4] present_key, float[batch,1,total,4] present_value)
    {
        present_key = Concat <axis = 2> (past_key, key)
        present_value = Concat <axis = -2> (past_value, value)
        turned = Transpose <perm = [0, 1, 3, 2]> (present_key)
        scores = MatMul (query, turned)
        weights = Softmax <axis = -1> (scores)
        output = MatMul (weights, present_value)
    }
"""


def _rewritten(text: str) -> PassOutcome:
    return RewriteKvCache().run(import_model(parser.parse_model(text)).module)


def _calls(module: tvm.IRModule, operator: str) -> int:
    blocks = module["main"].body.blocks
    values = [binding.value for block in blocks for binding in block.bindings]
    return sum(isinstance(value, tvm.ir.Call) and value.op.name == operator for value in values)


def test_caches_become_buffers_that_are_appended_to() -> None:
    outcome = _rewritten(_LAYER)
    main = outcome.module["main"]
    assert [site.refusal for site in outcome.sites] == [None, None]
    assert caches_of(main) == (Cache(3, 1, 2), Cache(4, 2, 2))
    assert (_calls(outcome.module, "relax.concat"), _calls(outcome.module, "relax.call_tir_inplace")) == (0, 2)
    assert [str(parameter.ty.shape.values[2]) for parameter in main.params[3:5]] == ["capacity_0", "capacity_0"]
    assert len(main.ret_ty.fields) == 1


def test_caches_of_one_kind_share_one_function() -> None:
    functions = [v.name_hint for v in _rewritten(_LAYER).module.get_global_vars()]
    assert sum(name.startswith("append_to_cache") for name in functions) == 1


def test_a_module_without_caches_is_left_as_it_is() -> None:
    module = _rewritten(_LAYER).module
    again = RewriteKvCache().run(module)
    assert (again.sites, again.module) == ((), module)


_FORM = """
    <ir_version: 8, opset_import: ["" : 17]>
    form (float[batch,{past},4] past, float[batch,new,4] added) => ({outputs})
    {{
        {body}
    }}
"""
_OUTPUTS = "float[batch,total,4] present, float[batch,new,4] other"
_REFUSED = {
    "another reader": ("past", _OUTPUTS, "present = Concat <axis = 1> (past, added) other = Add (past, added)"),
    "not a symbol": ("8", _OUTPUTS, "present = Concat <axis = 1> (past, added) other = Neg (added)"),
    "more than one tensor": (
        "past",
        _OUTPUTS,
        "present = Concat <axis = 1> (past, added, added) other = Neg (added)",
    ),
    "does not return": (
        "past",
        "float[batch,total,4] twice, float[batch,new,4] other",
        "present = Concat <axis = 1> (past, added) twice = Add (present, present) other = Neg (added)",
    ),
    "nothing but the caller reads": (
        "past",
        _OUTPUTS,
        "present = Concat <axis = 1> (past, added) other = Neg (added)",
    ),
    "returns nothing else": ("past", "float[batch,total,4] present", "present = Concat <axis = 1> (past, added)"),
}


_SENTENCES = {
    "another reader": "the past has another reader, which would see the new tokens",
    "not a symbol": "the number of tokens in the past is not a symbol",
    "more than one tensor": "more than one tensor is put behind the past",
    "does not return": "the function does not return the result, or more than once",
    "nothing but the caller reads": "nothing but the caller reads the result",
    "returns nothing else": "the function returns nothing else",
}


@pytest.mark.parametrize("reason", _REFUSED)
def test_what_cannot_be_appended_to_is_refused_with_the_reason(reason: str) -> None:
    past, outputs, body = _REFUSED[reason]
    outcome = _rewritten(_FORM.format(past=past, outputs=outputs, body=body))
    (site,) = outcome.sites
    assert site.refusal == _SENTENCES[reason]
    assert caches_of(outcome.module["main"]) == ()


def test_an_input_put_behind_something_else_is_no_cache() -> None:
    body = "other = Neg (added) present = Concat <axis = 1> (other, past)"
    assert _rewritten(_FORM.format(past="past", outputs=_OUTPUTS, body=body)).sites == ()


def _arrays(batch: int, past: int, new: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([batch, past, new])
    shapes = {
        "query": (batch, 2, new, 4),
        **dict.fromkeys(("key", "value"), (batch, 1, new, 4)),
        **dict.fromkeys(("past_key", "past_value"), (batch, 1, past, 4)),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def _both(text: str) -> tuple:
    """Return the model compiled to append in place, and to return its cache."""
    model: onnx.ModelProto = parser.parse_model(text)
    target = find_target("host")
    return tuple(compile_in_memory(model, CompileOptions(target, kv_cache=kind)) for kind in ("in-place", "returned"))


@pytest.fixture(scope="module")
def layers() -> tuple:
    return _both(_LAYER)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), past=st.integers(0, 40), new=st.integers(1, 20))
def test_appending_in_place_gives_what_concatenating_gives(layers: tuple, batch: int, past: int, new: int) -> None:
    inputs = _arrays(batch, past, new)
    in_place, returned = (layer(inputs) for layer in layers)
    assert in_place.keys() == returned.keys()
    for name, array in returned.items():
        np.testing.assert_array_equal(in_place[name], array)


_NARROW = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture(scope="module", params=list(_NARROW))
def narrow_layer(request: pytest.FixtureRequest) -> tuple:
    """Return the layer with caches of 16-bit floats, and their type."""
    options = CompileOptions(find_target("host"), kv_cache_dtype=request.param)
    return compile_in_memory(parser.parse_model(_LAYER), options), _NARROW[request.param]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), past=st.integers(0, 40), new=st.sampled_from([1, 2, 7, 16, 35]))
def test_a_narrow_cache_computes_with_what_it_holds(
    layers: tuple, narrow_layer: tuple, batch: int, past: int, new: int
) -> None:
    narrow, dtype = narrow_layer
    inputs = _arrays(batch, past, new)
    rounded = {name: array.astype(dtype).astype(np.float32) for name, array in inputs.items() if name != "query"}
    expected = layers[1]({**inputs, **rounded})
    actual = narrow(inputs)
    np.testing.assert_array_equal(actual["present_key"], expected["present_key"])
    # The same numbers, summed in the same order but for blocks.
    np.testing.assert_allclose(actual["output"], expected["output"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "held"), [("model", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_buffers_hold_the_type_that_is_asked_for_and_attention_is_fused(dtype: str, held: str) -> None:
    outcome = RewriteKvCache(dtype).run(import_model(parser.parse_model(_LAYER)).module)
    assert {str(parameter.ty.dtype.dtype) for parameter in outcome.module["main"].params[3:5]} == {held}
    (site,) = FuseAttention().run(outcome.module).sites
    assert site.refusal is None


def test_an_unknown_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(PassOptionError, match="fp16"):
        RewriteKvCache("fp8")


_CAST = """
    <ir_version: 8, opset_import: ["" : 17]>
    layer (float16[batch,past,4] past, float[batch,new,4] added)
        => (float16[batch,total,4] present, float[batch,total] sums)
    {
        axis = Constant <value = int64[1] {2}> ()
        wide = Cast <to = 1> (past)
        all = Concat <axis = 1> (wide, added)
        present = Cast <to = 10> (all)
        sums = ReduceSum <keepdims = 0> (all, axis)
    }
"""


def test_a_cache_of_16_bits_in_a_model_that_computes_in_32_is_kept_as_it_is_given() -> None:
    outcome = _rewritten(_CAST)
    (cache,) = caches_of(outcome.module["main"])
    assert (cache.output, str(outcome.module["main"].params[0].ty.dtype.dtype)) == (0, "float16")


# As onnxruntime-genai's builder writes it: each row's number of tokens is the sum of its mask.
_GROUPED = """
    <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
    decoder (float[batch,new,16] query, float[batch,new,8] key, float[batch,new,8] value, int64[batch,total] mask,
             float[batch,2,past,4] past_key, float[batch,2,past,4] past_value)
        => (float[batch,new,16] output, float[batch,2,t,4] present_key, float[batch,2,t,4] present_value)
    {
        one = Constant <value = int64[1] {1}> ()
        tokens = ReduceSum (mask, one)
        before = Sub (tokens, one)
        last = Cast <to = 6> (before)
        sizes = Shape (mask)
        axis = Constant <value = int64 {1}> ()
        size = Gather <axis = 0> (sizes, axis)
        length = Cast <to = 6> (size)
        output, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2>
            (query, key, value, past_key, past_value, last, length)
    }
"""


def test_the_cache_of_group_query_attention_knows_its_total_from_the_inputs() -> None:
    model = import_model(parser.parse_model(_GROUPED))
    outcome = RewriteKvCache().run(model.module)
    assert [site.refusal for site in outcome.sites] == [None, None]
    entry = entry_point(model, outcome.module)
    assert [(cache.length, cache.total) for cache in entry.caches] == [("past", "max(total, past)")] * 2
    assert _calls(outcome.module, "relax.tensor_to_shape") == 0


@pytest.fixture(scope="module", params=["", ", local_window_size = 5"])
def grouped(request: pytest.FixtureRequest) -> tuple:
    return _both(_GROUPED.replace("kv_num_heads = 2", f"kv_num_heads = 2{request.param}"))


def test_a_window_of_one_token_is_a_ring_too() -> None:
    text = _GROUPED.replace("kv_num_heads = 2", "kv_num_heads = 2, local_window_size = 1")
    module = _rewritten(text).module
    assert [cache.window for cache in caches_of(module["main"])] == [1, 1]
    assert any(name.name_hint.startswith("read_ring") for name in module.get_global_vars())


def test_a_window_that_something_else_reads_beyond_is_no_ring() -> None:
    text = _GROUPED.replace("kv_num_heads = 2", "kv_num_heads = 2, local_window_size = 5")
    (first, second) = caches_of(_rewritten(text).module["main"])
    assert (first.window, second.window) == (5, 5)
    read = text.replace("float[batch,2,t,4] present_value)", "float[batch,2,t,4] present_value, float[b,h,r,c] more)")
    read = read.rstrip()[:-1] + "    more = Neg (present_value)\n    }"
    (first, second) = caches_of(_rewritten(read).module["main"])
    assert (first.window, second.window) == (5, 0)


def test_attention_reads_a_window_of_each_row_in_its_ring() -> None:
    text = _GROUPED.replace("kv_num_heads = 2", "kv_num_heads = 2, local_window_size = 5")
    outcome = FuseAttention().run(_rewritten(text).module)
    assert [site.refusal for site in outcome.sites] == [None]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 2), new=st.integers(1, 12), past=st.integers(0, 30))
def test_rows_of_different_lengths_are_appended_to_where_they_end(
    grouped: tuple, data: st.DataObject, batch: int, new: int, past: int
) -> None:
    rows = data.draw(st.lists(st.integers(new, new + past), min_size=batch, max_size=batch))
    mask = (np.arange(max(rows)) < np.array(rows)[:, None]).astype(np.int64)
    rng = np.random.default_rng(past)
    shapes = {
        "query": (batch, new, 16),
        **dict.fromkeys(("key", "value"), (batch, new, 8)),
        **dict.fromkeys(("past_key", "past_value"), (batch, 2, past, 4)),
    }
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    in_place, returned = (model({**inputs, "mask": mask}) for model in grouped)
    for name, array in returned.items():
        np.testing.assert_array_equal(in_place[name], array)


# A cache of the model's own codes, two in a byte, with a scale for each head and channel.
_CODED = (
    _GROUPED.replace("float[batch,2,past,4]", "uint8[batch,2,past,2]")
    .replace("float[batch,2,t,4]", "uint8[batch,2,t,2]")
    .replace("int64[batch,total] mask,", "int64[batch,total] mask, float[1,2,1,4] scale,")
    .replace("past_value, last, length)", "past_value, last, length, , , , , , scale, scale)")
    .replace(
        "kv_num_heads = 2>",
        'kv_num_heads = 2, kv_cache_bit_width = 4, k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL">',
    )
)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_codes_of_the_model_itself_are_appended_to_as_they_are(dtype: str) -> None:
    outcome = RewriteKvCache(dtype).run(import_model(parser.parse_model(_CODED)).module)
    main = outcome.module["main"]
    buffers = [main.params[cache.parameter].ty for cache in caches_of(main)]
    assert [str(buffer.dtype.dtype) for buffer in buffers] == ["uint8", "uint8"]
    assert [cache.pages for cache in caches_of(main)] == [None, None]
    refusals = [site.refusal for site in outcome.sites if site.refusal]
    assert (
        refusals
        == [f"not {'quantized' if dtype == 'int8' else 'stored as fp16'}: the model stores codes of its own"] * 2
    )
