"""Sessions of a model whose first layer sees a sliding window: its cache holds the window alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.errors import OptionError
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel

_MODEL = Path(__file__).parents[2] / "models" / "builder" / "gemma2.onnx"
_VOCABULARY = 128
# Float sums of two layers in another order, of the largest logit.
_TOLERANCE = 1000 * 2.0**-24


def _compiled(folder: Path, kv_cache: str, dtype: str = "model") -> CompiledModel:
    options = CompileOptions(find_target("host"), activations="float", kv_cache=kv_cache, kv_cache_dtype=dtype)
    compile_model(_MODEL, folder / f"{kv_cache}-{dtype}.opt", options, certify=False)
    return load(folder / f"{kv_cache}-{dtype}.opt")


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return _compiled(tmp_path_factory.mktemp("gemma2"), "in-place")


@pytest.fixture(scope="module")
def returning(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return _compiled(tmp_path_factory.mktemp("gemma2"), "returned")


def _tokens(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, _VOCABULARY, length).tolist()


def _require_equal(model: CompiledModel, session: DecoderSession, rest: list[int]) -> None:
    """Require that a session goes on as one of `model` that reads everything at once."""
    whole = DecoderSession(model).append([*session.tokens, *rest])
    np.testing.assert_allclose(session.append(rest), whole, rtol=0, atol=_TOLERANCE * np.abs(whole).max())


def test_the_manifest_says_that_caches_are_rings(ring: CompiledModel) -> None:
    scheme = "2 tensors in place as float32 in a ring for a window of 8; 2 tensors in place as float32"
    assert ring.manifest.kv_cache_scheme == scheme


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), length=st.integers(1, 400))
def test_every_chunking_gives_the_logits_of_the_whole_cache(
    ring: CompiledModel, returning: CompiledModel, data: st.DataObject, length: int
) -> None:
    tokens = _tokens(length)
    session = DecoderSession(ring, capacity=512)
    for cut in sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=8))) if length > 1 else []:
        session.append(tokens[len(session.tokens) : cut])
    _require_equal(returning, session, tokens[len(session.tokens) :])


def test_steps_go_around_the_ring(ring: CompiledModel, returning: CompiledModel) -> None:
    session, tokens = DecoderSession(ring), _tokens(300)
    for token in tokens[:-1]:
        session.append([token])
    _require_equal(returning, session, tokens[-1:])


def test_memory_does_not_grow_with_the_context(ring: CompiledModel) -> None:
    sizes = [DecoderSession(ring, capacity=capacity).cache_bytes for capacity in (1 << 10, 1 << 20)]
    whole = 2 * 2 * 16 * 4  # keys and values of the second layer: two heads of 16 channels
    assert sizes[1] - sizes[0] == whole * ((1 << 20) - (1 << 10))


def test_a_session_can_be_cut_back_as_far_as_the_ring_reaches(ring: CompiledModel, returning: CompiledModel) -> None:
    session, tokens = DecoderSession(ring), _tokens(300)
    for start in range(0, 300, 50):
        session.append(tokens[start : start + 50])
    with pytest.raises(OptionError, match=r"cut back to 171 or more, or to 0"):
        session.rewind(170)
    other = session.fork()
    session.rewind(171)
    _require_equal(returning, session, tokens[171:])
    other.rewind(0)
    _require_equal(returning, other, tokens[:40])


def test_a_window_stays_floats_where_caches_are_quantized(tmp_path: Path) -> None:
    scheme = _compiled(tmp_path, "in-place", "int8").manifest.kv_cache_scheme
    assert scheme.startswith("2 tensors in place as float32 in a ring for a window of 8; 1 tensors in place as int8")
