"""Sessions whose caches hold fewer bits than the model computes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.package.entry_points import CachePages
from optimizer.runtime import cache_pages, load
from optimizer.runtime.cache_buffers import Held
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.kv_cache import KeyValueCache
from optimizer.runtime.model import CompiledModel
from optimizer.runtime.tensors import host_view
from tests.runtime.generation.operations import (
    OPERATIONS,
    Operation,
    require_logits_of_texts_at_once,
    sessions_after,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Logits = NDArray[np.floating]

_MODEL = Path(__file__).parents[3] / "examples" / "decoder" / "model.onnx"
# Of the largest logit. What rounding keys and values does to it goes through three layers: some units of the type's
# roundoff for floats; for codes a step of 1 / 255 or 1 / 15 of a range. Where a text was cut back, so that its newest
# tokens were codes, too, logits are up to 1.4 and 1.1 steps away (150 random texts). That is the rounding alone, as the
# test of rounded floats shows.
_ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}
_STEP = {"int8": 1 / 255, "int4": 1 / 15}
_TOLERANCE = {
    **{dtype: 8 * roundoff for dtype, roundoff in _ROUNDOFF.items()},
    **{dtype: 2 * step for dtype, step in _STEP.items()},
}
# Of a step. Sums in another order turn a code that lies between two, which moved a logit by 0.09 of a step at most.
_TURNED = 1 / 8
_VOCABULARY = 2048
_SCHEMES = {
    "fp16": "6 tensors in place as float16",
    "bf16": "6 tensors in place as bfloat16",
    "int8": "3 tensors in place as int8 by channel (pages of 32, the newest 32 or more float32); "
    "3 tensors in place as int8 by token (pages of 32, the newest 32 or more float32)",
    "int4": "3 tensors in place as int4 by channel (pages of 32, the newest 32 or more float32); "
    "3 tensors in place as int4 by token (pages of 32, the newest 32 or more float32)",
}


@pytest.fixture(scope="module", params=list(_TOLERANCE))
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CompiledModel]:
    """Return a type of cache and the bundled decoder with it."""
    package = tmp_path_factory.mktemp("decoder") / "decoder.opt"
    options = CompileOptions(find_target("host"), kv_cache_dtype=request.param)
    compile_model(_MODEL, package, options, certify=False)
    return request.param, load(package)


def _tokens(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, _VOCABULARY, length).tolist()


def _logits(model: CompiledModel, chunks: Sequence[Sequence[int]]) -> NDArray[np.floating]:
    session = DecoderSession(model)
    return [session.append(chunk) for chunk in chunks][-1]


def _require_close(actual: NDArray[np.floating], expected: NDArray[np.floating], dtype: str) -> None:
    np.testing.assert_allclose(actual, expected, atol=_TOLERANCE[dtype] * np.abs(expected).max())


def test_the_manifest_says_what_the_cache_holds(narrow: tuple[str, CompiledModel]) -> None:
    dtype, model = narrow
    assert model.manifest.kv_cache_scheme == _SCHEMES[dtype]


class _RoundedFloats:
    """A session with a cache of floats, of which it rounds the pages that one of codes has as codes."""

    def __init__(self, model: CompiledModel, narrow: CompiledModel) -> None:
        self._session = DecoderSession(model)
        caches = narrow.entry("main").signature.caches
        self._pages = {record.past: record.pages for record in caches if record.pages is not None}
        self._rounded = 0

    def append(self, tokens: Sequence[int]) -> Logits:
        length, cache = len(self._session.tokens), self._session._cache
        assert isinstance(cache, KeyValueCache)
        before, pages = self._rounded, next(iter(self._pages.values()))
        self._rounded = cache_pages.settled(length, before, pages)
        for name, own in self._pages.items():
            values = host_view(cache.buffers[name].tensors[0], "float32")[:, :, before : self._rounded]
            codes, scales = cache_pages.quantized(values.astype(np.float32), own)
            values[...] = cache_pages.dequantized(codes, scales, own)
        return self._session.append(tokens)

    def rewind(self, length: int) -> None:
        pages = next(iter(self._pages.values()))
        self._session.rewind(length)
        self._rounded = min(self._rounded, length // pages.tokens * pages.tokens)


@pytest.mark.parametrize(("read", "steps", "cut"), [(60, 40, 56), (70, 110, 56), (64, 64, 32), (60, 40, 0)])
def test_codes_are_what_rounding_the_pages_of_floats_gives(
    narrow: tuple[str, CompiledModel], decoder: CompiledModel, read: int, steps: int, cut: int
) -> None:
    dtype, model = narrow
    if dtype in _ROUNDOFF:
        pytest.skip("the cache holds floats")
    tokens = _tokens(read + steps)
    logits: list[Logits] = []
    for session in (DecoderSession(model), _RoundedFloats(decoder, model)):
        session.append(tokens[:read])
        for token in tokens[read:]:
            session.append([token])
        session.rewind(len(tokens) - cut)
        logits.append(session.append([0]))
    actual, expected = logits
    np.testing.assert_allclose(actual, expected, rtol=0, atol=_TURNED * _STEP[dtype] * np.abs(expected).max())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
@example(operations=[("rewind", 21, 0), ("fork", 0, 0), ("read", 60, 0), ("step", 40, 0), ("rewind", 56, 0)])
def test_whatever_is_done_sessions_give_the_logits_of_the_model_that_returns_its_cache(
    narrow: tuple[str, CompiledModel], returning_decoder: CompiledModel, operations: list[Operation]
) -> None:
    dtype, model = narrow
    sessions = sessions_after(DecoderSession(model), operations, _VOCABULARY)
    require_logits_of_texts_at_once(sessions, returning_decoder, _TOLERANCE[dtype])


def test_a_prompt_token_by_token_is_within_the_tolerance(
    narrow: tuple[str, CompiledModel], returning_decoder: CompiledModel
) -> None:
    dtype, model = narrow
    tokens = _tokens(180)
    _require_close(_logits(model, [[token] for token in tokens]), _logits(returning_decoder, [tokens]), dtype)


def test_a_prompt_in_chunks_takes_less_memory_where_caches_are_quantized(narrow: tuple[str, CompiledModel]) -> None:
    tokens = _tokens(250)
    sessions = [DecoderSession(narrow[1], capacity=512, most_at_once=most) for most in (250, 40)]
    first, second = (session.append(tokens) for session in sessions)
    _require_close(second, first, narrow[0])
    sizes = [session.cache_bytes for session in sessions]
    assert sizes[1] == sizes[0] if narrow[0] in _ROUNDOFF else sizes[1] < sizes[0]


def test_cutting_back_among_the_newest_tokens_loses_nothing(narrow: tuple[str, CompiledModel]) -> None:
    _, model = narrow
    tokens = _tokens(160)
    session = DecoderSession(model)
    session.append(tokens[:150])
    logits = session.append(tokens[150:])
    session.rewind(150)
    np.testing.assert_array_equal(session.append(tokens[150:]), logits)


def test_compiled_code_stores_what_was_read_to_half_a_step(
    narrow: tuple[str, CompiledModel], decoder: CompiledModel
) -> None:
    tokens, caches = np.arange(100)[None], []
    for model in (narrow[1], decoder):
        entry = model.entry("main")
        caches.append(entry.new_cache())
        for start, end in ((0, 97), (97, 100)):
            inputs = {
                "input_ids": tokens[:, start:end],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": tokens[:, start:end],
            }
            entry.append(inputs, caches[-1])
    cache, exact = caches
    assert cache.quantized == (0 if narrow[0] in _ROUNDOFF else 64)
    # The first layer's keys and values are the same in both; what follows differs by what was read before.
    for name in ("past_key_values.0.key", "past_key_values.0.value"):
        actual = cache.buffers[name].read(Held(100, cache.quantized)).astype(np.float32)
        expected = exact.buffers[name].read(Held(100, 0)).astype(np.float32)
        pages = cache.buffers[name].record.pages or CachePages(8, True, 1, 0)
        range_ = np.ptp(expected, axis=(2, 3), keepdims=True)
        roundoff = _ROUNDOFF.get(narrow[0])
        step = range_ / (2**pages.bits - 1) if roundoff is None else 2 * range_ * roundoff
        assert (np.abs(actual - expected) <= 0.51 * step).all()


def test_codes_take_less_memory_than_floats(narrow: tuple[str, CompiledModel], decoder: CompiledModel) -> None:
    sizes = [DecoderSession(model, capacity=8192).cache_bytes for model in (narrow[1], decoder)]
    # Of 32 bits: 16; 8 and, of head sizes of 32, 1 for scales; 4 and 1; and the newest 128 tokens as they are.
    most = {"fp16": 0.5, "bf16": 0.5, "int8": 9 / 32 + 1 / 64, "int4": 5 / 32 + 1 / 64}[narrow[0]]
    assert sizes[0] <= most * sizes[1]


def test_a_long_prompt_leaves_no_room_behind(narrow: tuple[str, CompiledModel]) -> None:
    session = DecoderSession(narrow[1], capacity=2048)
    reserved = session.cache_bytes
    session.append(_tokens(1500))
    session.append([1])
    session.append([2])
    assert session.cache_bytes == reserved
