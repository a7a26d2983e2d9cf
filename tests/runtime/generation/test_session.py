from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from optimizer.errors import InputMismatchError, InsufficientMemoryError, OptionError
from optimizer.runtime import kv_cache
from optimizer.runtime.cache_memory import CacheMemory
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.generation.token_steps import CHECKED_AT_ONCE
from optimizer.runtime.kv_cache import SMALLEST_CAPACITY
from optimizer.runtime.model import CompiledModel
from optimizer.runtime.tensors import host_view
from tests.frontend.comparison import theirs
from tests.runtime.generation.operations import (
    OPERATIONS,
    Operation,
    require_logits_of_texts_at_once,
    sessions_after,
)

_MODEL = Path(__file__).parents[3] / "examples" / "decoder" / "model.onnx"
_TOKENS = [465, 1027, 88, 312, 7, 1500, 41, 99, 640, 23, 871]
# Logits of this model are of magnitude 10; sums of 256 to 512 products in another order differ by some units of 1e-6.
_TOLERANCE = 2e-4


def _logits(model: CompiledModel, chunks: Sequence[Sequence[int]]) -> np.ndarray:
    session = DecoderSession(model)
    return [session.append(chunk) for chunk in chunks][-1]


@pytest.mark.parametrize("sizes", [[1] * 11, [5, 6], [10, 1], [1, 10], [3, 3, 3, 2]])
def test_a_prompt_in_chunks_gives_the_logits_of_a_prompt_at_once(decoder: CompiledModel, sizes: list[int]) -> None:
    ends = np.cumsum(sizes)
    chunks = [_TOKENS[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    np.testing.assert_allclose(_logits(decoder, chunks), _logits(decoder, [_TOKENS]), atol=_TOLERANCE)


def test_a_prompt_longer_than_one_call_reads_gives_the_same_logits(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder, most_at_once=4)
    np.testing.assert_allclose(session.append(_TOKENS), _logits(decoder, [_TOKENS]), atol=_TOLERANCE)


def test_a_session_cut_back_goes_on_as_if_the_rest_was_never_read(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder)
    session.append(_TOKENS)
    session.rewind(4)
    np.testing.assert_allclose(session.append([5]), _logits(decoder, [[*_TOKENS[:4], 5]]), atol=_TOLERANCE)
    session.rewind(0)
    np.testing.assert_allclose(session.append(_TOKENS), _logits(decoder, [_TOKENS]), atol=_TOLERANCE)


def test_a_fork_takes_memory_once(decoder: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = DecoderSession(decoder, capacity=40)
    session.append([3, 1, 4])
    taken: list[int] = []

    def count(size: int) -> CacheMemory:
        taken.append(size)
        return CacheMemory(size)

    monkeypatch.setattr(kv_cache, "CacheMemory", count)
    other = session.fork()
    assert len(taken) == 1
    np.testing.assert_array_equal(other.append([5]), session.append([5]))


def test_forks_do_not_disturb_each_other(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder)
    session.append(_TOKENS[:6])
    other = session.fork()
    other.append([3])
    np.testing.assert_allclose(session.append(_TOKENS[6:]), _logits(decoder, [_TOKENS]), atol=_TOLERANCE)
    assert other.tokens == [*_TOKENS[:6], 3]


def test_a_full_context_is_an_error_and_leaves_the_session_as_it_was(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder, capacity=8)
    session.append(_TOKENS[:6])
    with pytest.raises(OptionError, match="context of 8"):
        session.append(_TOKENS[6:])
    assert session.tokens == _TOKENS[:6]
    session.append(_TOKENS[6:8])


def test_token_by_token_gives_the_logits_of_the_text_at_once_while_buffers_grow(decoder: CompiledModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 2048, 2 * CHECKED_AT_ONCE + SMALLEST_CAPACITY).tolist()
    session = DecoderSession(decoder)
    logits = [session.append([token]) for token in tokens]
    np.testing.assert_allclose(logits[-1], _logits(decoder, [tokens]), atol=_TOLERANCE)
    np.testing.assert_allclose(logits[100], _logits(decoder, [tokens[:101]]), atol=_TOLERANCE)
    assert session.tokens == tokens


def test_token_by_token_a_full_context_is_an_error_of_the_first_token_beyond_it(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder, capacity=8)
    for token in _TOKENS[:8]:
        session.append([token])
    with pytest.raises(OptionError, match="context of 8"):
        session.append(_TOKENS[8:9])
    session.rewind(7)
    np.testing.assert_allclose(session.append([5]), _logits(decoder, [[*_TOKENS[:7], 5]]), atol=_TOLERANCE)


def test_reading_nothing_and_cutting_to_more_than_there_is_are_errors(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder)
    with pytest.raises(OptionError, match="no tokens"):
        session.append([])
    with pytest.raises(OptionError, match="-1 is no token"):
        session.append([3, -1])
    vocabulary = session.append([3]).size
    with pytest.raises(OptionError, match=f"none with the number {vocabulary}"):
        session.append([3, vocabulary])
    assert session.tokens == [3]
    session.reset()
    with pytest.raises(OptionError, match="cannot be cut"):
        session.rewind(1)
    with pytest.raises(OptionError, match="a context of 0 tokens"):
        DecoderSession(decoder, capacity=0)
    with pytest.raises(OptionError, match="0 tokens at a time"):
        DecoderSession(decoder, most_at_once=0)


def test_a_context_beyond_memory_is_refused_by_its_size(decoder: CompiledModel) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"too little memory for [0-9]+ bytes; reserve fewer tokens"):
        DecoderSession(decoder, capacity=1 << 44)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_whatever_is_done_sessions_give_the_logits_of_the_model_that_returns_its_cache(
    decoder: CompiledModel, returning_decoder: CompiledModel, operations: list[Operation]
) -> None:
    sessions = sessions_after(DecoderSession(decoder), operations, 2048)
    require_logits_of_texts_at_once(sessions, returning_decoder, _TOLERANCE / 10)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_sessions_that_return_their_cache_give_the_same_logits_whatever_is_done(
    returning_decoder: CompiledModel, operations: list[Operation]
) -> None:
    sessions = sessions_after(DecoderSession(returning_decoder), operations, 2048)
    require_logits_of_texts_at_once(sessions, returning_decoder, _TOLERANCE / 10)


def test_sessions_of_a_model_that_returns_its_cache_work_alike(returning_decoder: CompiledModel) -> None:
    session = DecoderSession(returning_decoder, capacity=12)
    session.append(_TOKENS)
    session.rewind(4)
    other = session.fork()
    other.append([3])
    np.testing.assert_allclose(session.append([5]), _logits(returning_decoder, [[*_TOKENS[:4], 5]]), atol=_TOLERANCE)
    with pytest.raises(OptionError, match="context of 12"):
        session.append(_TOKENS)
    assert session.cache_bytes == 5 * 3 * 2 * 2 * 32 * 4


def test_a_session_without_a_bound_grows(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder)
    reserved = session.cache_bytes
    tokens = np.random.default_rng(0).integers(0, 2048, 300).tolist()
    session.append(tokens[:250])
    logits = session.append(tokens[250:])
    assert session.cache_bytes > reserved
    np.testing.assert_allclose(logits, _logits(decoder, [tokens]), atol=_TOLERANCE)


def test_a_step_reads_nothing_beyond_the_tokens_in_use(decoder: CompiledModel) -> None:
    entry = decoder.entry("main")
    cache = entry.new_cache(capacity=64)
    for record in entry.signature.caches:
        host_view(cache.buffers[record.past].tensors[0], record.dtype)[...] = np.nan
    for start, end in ((0, 3), (3, 4), (4, 20)):
        tokens = np.arange(start, end)[None]
        inputs = {"input_ids": tokens, "attention_mask": np.ones((1, end), np.int64), "position_ids": tokens}
        logits = entry.append(inputs, cache)["logits"].numpy()
        assert np.isfinite(logits).all()


def test_a_call_leaves_the_given_past_alone_and_returns_the_present(decoder: CompiledModel) -> None:
    rng = np.random.default_rng(0)
    past = {s.name: rng.standard_normal((1, 2, 5, 32), np.float32) for s in decoder.manifest.entry_points[0].inputs[3:]}
    given = {name: array.copy() for name, array in past.items()}
    tokens = np.arange(5, 9)[None]
    outputs = decoder(
        {"input_ids": tokens, "attention_mask": np.ones((1, 9), np.int64), "position_ids": tokens, **given}
    )
    for name, array in past.items():
        np.testing.assert_array_equal(given[name], array)
        present = outputs[name.replace("past_key_values", "present")]
        assert present.shape == (1, 2, 9, 32)
        np.testing.assert_array_equal(present[:, :, :5], array)


@pytest.mark.parametrize("token", [2048, -2049])
def test_a_call_with_tokens_beyond_the_embedding_is_an_error(decoder: CompiledModel, token: int) -> None:
    past = {s.name: np.zeros((1, 2, 0, 32), np.float32) for s in decoder.manifest.entry_points[0].inputs[3:]}
    tokens, ones = np.array([[5, token]]), np.ones((1, 2), np.int64)
    with pytest.raises(InputMismatchError, match=f"'input_ids' holds {token}, and chooses one of 2048 elements"):
        decoder({"input_ids": tokens, "attention_mask": ones, "position_ids": ones, **past})


def test_rows_left_out_are_not_returned_and_change_no_other(decoder: CompiledModel) -> None:
    entry = decoder.entry("main")

    def logits(skipped: int) -> np.ndarray:
        tokens, mask = np.array([_TOKENS]), np.ones((1, 11), np.int64)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": np.arange(11)[None]}
        return host_view(entry.append(inputs, entry.new_cache(capacity=16), skipped)["logits"], "float32")

    whole, last = logits(0), logits(8)
    assert entry.signature.shortened == ("logits",)
    assert last.shape == (1, 3, whole.shape[2])
    np.testing.assert_allclose(last, whole[:, 8:], atol=_TOLERANCE)


def test_a_session_that_is_reset_begins_anew_in_the_same_memory(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder, capacity=32)
    first = session.append(_TOKENS)
    address = [buffers.tensors[0].data_ptr() for buffers in session._cache.buffers.values()]
    session.reset()
    assert session.tokens == []
    np.testing.assert_array_equal(session.append(_TOKENS), first)
    assert [buffers.tensors[0].data_ptr() for buffers in session._cache.buffers.values()] == address


def test_greedy_tokens_are_onnxruntimes_over_64_steps(decoder: CompiledModel) -> None:
    reference = theirs(onnx.load(_MODEL))
    past = {spec.name: np.zeros((1, 2, 0, 32), np.float32) for spec in decoder.entry("main").signature.inputs[3:]}
    session, tokens = DecoderSession(decoder), list(_TOKENS)
    logits = session.append(tokens)
    for _ in range(64):
        token = int(logits.argmax())
        whole = {"input_ids": np.array([tokens]), "position_ids": np.arange(len(tokens))[None]}
        expected = reference({**whole, "attention_mask": np.ones((1, len(tokens)), np.int64), **past})["logits"]
        assert token == expected[0, -1].argmax()
        tokens.append(token)
        logits = session.append([token])
