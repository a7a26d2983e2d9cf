"""What a long text's rows took is given back before steps of one token, and nothing that is still in use."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from optimizer.runtime import unused_memory
from optimizer.runtime.generation import DecoderSession, session
from optimizer.runtime.model import CompiledModel
from optimizer.runtime.unused_memory import give_back_unused

_MOST = 120


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def test_memory_of_a_long_text_is_given_back(decoder: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "give_back_unused", lambda: None)
    text = DecoderSession(decoder, most_at_once=_MOST)
    logits = text.append([3] * (session.LONG_TEXT_CALLS * _MOST))
    kept, before = logits.copy(), _resident_bytes()
    give_back_unused()
    assert before - _resident_bytes() > 1 << 20
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.parametrize(("length", "times"), [(1, 0), (4, 0), (15, 0), (16, 1), (19, 1)])
def test_only_texts_of_many_calls_give_back(
    decoder: CompiledModel, monkeypatch: pytest.MonkeyPatch, length: int, times: int
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(session, "give_back_unused", lambda: calls.append(None))
    DecoderSession(decoder, most_at_once=4).append([3] * length)
    assert len(calls) == times


def test_a_c_library_that_keeps_its_pages_is_left_alone(
    decoder: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [3, 1, 4, 1] * session.LONG_TEXT_CALLS
    expected = DecoderSession(decoder, most_at_once=4).append(tokens)
    monkeypatch.setattr(unused_memory, "_trim", lambda: None)
    np.testing.assert_array_equal(DecoderSession(decoder, most_at_once=4).append(tokens), expected)
