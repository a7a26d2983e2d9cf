"""Sessions of decoders of ONNX's own operators: caches that Attention appends to, and that TensorScatter writes to."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.errors import OptionError
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel
from tests.frontend.comparison import theirs
from tests.models.comparison import TOLERANCE, require_equal_texts
from tests.models.standard_decoder import FORMS, LONGEST, standard_decoder


@pytest.fixture(scope="module", params=FORMS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CompiledModel]:
    """Return a form of cache and the decoder that has it, compiled."""
    folder = tmp_path_factory.mktemp(request.param)
    onnx.save(standard_decoder(request.param), folder / "model.onnx")
    compile_model(folder / "model.onnx", folder / "model.opt", CompileOptions(find_target("host")), certify=False)
    return request.param, load(folder / "model.opt")


def _room(form: str) -> int:
    return {"scattered": 40, "masked": LONGEST}.get(form, 0)


def test_texts_are_those_of_onnxruntime(decoder: tuple[str, CompiledModel]) -> None:
    form, model = decoder
    assert model.manifest.kv_cache_scheme == "4 tensors in place as float32"
    require_equal_texts(model, theirs(standard_decoder(form)), tolerance=TOLERANCE, room=_room(form))


def test_chunks_forks_and_cuts_give_the_logits_of_a_prompt_at_once(decoder: tuple[str, CompiledModel]) -> None:
    form, model = decoder
    capacity = _room(form) or None
    tokens = np.random.default_rng(1).integers(0, 100, 17).tolist()
    whole = DecoderSession(model, capacity=capacity).append(tokens)
    session = DecoderSession(model, capacity=capacity, most_at_once=4)
    session.append(tokens[:9])
    other = session.fork()
    session.append([1, 2, 3])
    session.rewind(9)
    for each in (session, other):
        np.testing.assert_allclose(each.append(tokens[9:]), whole, rtol=0, atol=TOLERANCE * np.abs(whole).max())


def test_a_cache_that_does_not_grow_bounds_the_context(decoder: tuple[str, CompiledModel]) -> None:
    form, model = decoder
    if not _room(form):
        assert DecoderSession(model).capacity is None
    elif form == "masked":
        assert DecoderSession(model).capacity == DecoderSession(model, capacity=2 * LONGEST).capacity == LONGEST
        with pytest.raises(OptionError, match="context of 8"):
            DecoderSession(model, capacity=8).append(list(range(9)))
    else:
        with pytest.raises(OptionError, match="does not grow"):
            DecoderSession(model)
