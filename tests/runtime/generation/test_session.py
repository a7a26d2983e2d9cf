from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from optimizer.errors import OptionError
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel

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


def test_a_session_cut_back_goes_on_as_if_the_rest_was_never_read(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder)
    session.append(_TOKENS)
    session.rewind(4)
    np.testing.assert_allclose(session.append([5]), _logits(decoder, [[*_TOKENS[:4], 5]]), atol=_TOLERANCE)
    session.rewind(0)
    np.testing.assert_allclose(session.append(_TOKENS), _logits(decoder, [_TOKENS]), atol=_TOLERANCE)


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


def test_reading_nothing_and_cutting_to_more_than_there_is_are_errors(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder)
    with pytest.raises(OptionError, match="no tokens"):
        session.append([])
    with pytest.raises(OptionError, match="cannot be cut"):
        session.rewind(1)
