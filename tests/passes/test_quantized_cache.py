from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import parser
from tvm import relax

from optimizer.compile import CompileOptions, compile_in_memory, compile_model, find_target
from optimizer.execution import Runner
from optimizer.frontend.importer import import_model
from optimizer.package.entry_points import CachePages
from optimizer.runtime import cache_pages
from passes.fuse_attention import FuseAttention
from passes.rewrite_kv_cache import RewriteKvCache, caches_of
from schedules.cache_pages import PAGE, READS_IN_PLACE, RECENT
from targets import ToolchainError, cuda_compiler
from tests.passes.test_rewrite_kv_cache import _GROUPED, _LAYER

Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]
_BITS = {"int8": 8, "int4": 4}


def test_keys_get_scales_by_channel_and_values_by_token_and_attention_is_fused() -> None:
    outcome = RewriteKvCache("int4").run(import_model(parser.parse_model(_LAYER)).module)
    layouts = [cache.pages for cache in caches_of(outcome.module["main"])]
    assert [(pages.bits, pages.by_channel) for pages in layouts if pages is not None] == [(4, True), (4, False)]
    types = [p.ty for p in outcome.module["main"].params if isinstance(p.ty, relax.TensorType)]
    held = ["uint8", "uint8", "float16", "float32", "float16", "float32"]
    assert [str(kind.dtype.dtype) for kind in types[3:]] == held
    fused = FuseAttention().run(outcome.module)
    assert [site.refusal for site in fused.sites] == [None]
    readers = [READS_IN_PLACE in (function.attrs or {}) for function in outcome.module.functions.values()]
    assert sum(readers) == 2
    assert not any(READS_IN_PLACE in (function.attrs or {}) for function in fused.module.functions.values())


def test_a_cache_that_is_no_operand_of_attention_keeps_its_floats() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        layer (float[batch,2,past,4] past, float[batch,2,new,4] added)
            => (float[batch,2,total,4] present, float[batch,2,total,4] other)
        { present = Concat <axis = 2> (past, added) other = Neg (present) }
    """
    outcome = RewriteKvCache("int8").run(import_model(parser.parse_model(text)).module)
    refusals = [site.refusal for site in outcome.sites]
    assert refusals == [None, "not quantized: it is read neither as keys nor as values alone"]
    assert [cache.pages for cache in caches_of(outcome.module["main"])] == [None]


@pytest.fixture(scope="module", params=list(_BITS))
def layer(request: pytest.FixtureRequest) -> tuple[Runner, Runner, int]:
    return *_compiled(_LAYER, request.param), _BITS[request.param]


@pytest.fixture(scope="module")
def grouped() -> tuple[Runner, Runner]:
    return _compiled(_GROUPED, "int4")


def _compiled(text: str, dtype: str) -> tuple[Runner, Runner]:
    """Return a model with a quantized cache, and as it is."""
    model, target = parser.parse_model(text), find_target("host")
    quantized = compile_in_memory(model, CompileOptions(target, kv_cache_dtype=dtype))
    return quantized, compile_in_memory(model, CompileOptions(target, kv_cache="returned"))


def _rounded(inputs: Arrays, bits: int) -> Arrays:
    """Return inputs with what a quantized cache holds of the past."""

    def rounded(values: NDArray[np.generic], by_channel: bool) -> NDArray[np.generic]:
        pages = CachePages(bits, by_channel, PAGE, RECENT)
        split = cache_pages.settled(values.shape[2], 0, pages)
        codes, scales = cache_pages.quantized(values[:, :, :split].astype(np.float32), pages)
        return np.concatenate([cache_pages.dequantized(codes, scales, pages), values[:, :, split:]], 2)

    return {**inputs, **{name: rounded(inputs[name], name == "past_key") for name in ("past_key", "past_value")}}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), past=st.integers(0, 150), new=st.sampled_from([1, 2, 7, 16, 35]))
def test_attention_reads_codes_and_recent_tokens(
    layer: tuple[Runner, Runner, int], batch: int, past: int, new: int
) -> None:
    quantized, returned, bits = layer
    rng = np.random.default_rng([batch, past, new])
    shapes = {
        "query": (batch, 2, new, 4),
        **dict.fromkeys(("key", "value"), (batch, 1, new, 4)),
        **dict.fromkeys(("past_key", "past_value"), (batch, 1, past, 4)),
    }
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    actual, expected = quantized(inputs), returned(_rounded(inputs, bits))
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-6)


def _grouped_inputs(rows: list[int], new: int, past: int) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(past)
    shapes = {
        "query": (len(rows), new, 16),
        **dict.fromkeys(("key", "value"), (len(rows), new, 8)),
        **dict.fromkeys(("past_key", "past_value"), (len(rows), 2, past, 4)),
    }
    mask = (np.arange(max(rows)) < np.array(rows)[:, None]).astype(np.int64)
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {**inputs, "mask": mask}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(new=st.integers(1, 12), past=st.integers(0, 100), shorter=st.integers(0, RECENT))
def test_rows_may_end_among_the_recent_tokens(
    grouped: tuple[Runner, Runner], new: int, past: int, shorter: int
) -> None:
    inputs = _grouped_inputs([new + past, max(new, new + past - shorter)], new, past)
    actual, expected = grouped[0](inputs), grouped[1](_rounded(inputs, 4))
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-6)


def test_a_row_that_ends_among_the_codes_becomes_nan_where_code_cannot_fail() -> None:
    model, inputs = parser.parse_model(_GROUPED), _grouped_inputs([101, 20], 1, 100)
    options = CompileOptions(
        find_target("host"), kv_cache="returned", passes="rewrite-kv-cache{dtype=int4,can_fail=false}"
    )
    output = compile_in_memory(model, options)(inputs)["output"]
    assert np.isnan(output[1]).all()
    assert np.isfinite(output[0]).all()


def test_a_row_that_ends_among_the_codes_is_an_error(grouped: tuple[Runner, Runner]) -> None:
    with pytest.raises(ValueError, match="shorter than the longest"):
        grouped[0](_grouped_inputs([101, 20], 1, 100))


def test_device_code_of_a_gpu_appends_to_pages(tmp_path: Path) -> None:
    try:
        cuda_compiler.compiler_version()
    except ToolchainError as error:
        pytest.skip(str(error))
    target = find_target("cuda", ["sm_90"])
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(_GROUPED.replace(",new,", ",count,")), path)  # "new" is a word of C++
    result = compile_model(path, tmp_path / "model.opt", CompileOptions(target, kv_cache_dtype="int4"), certify=False)
    assert "int4 by channel" in result.manifest.kv_cache_scheme
