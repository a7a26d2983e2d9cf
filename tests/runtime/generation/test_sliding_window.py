"""Sessions of a model whose first layer sees a sliding window: its cache holds the window alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.errors import OptionError
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel
from tests.frontend.comparison import theirs
from tests.runtime.generation.operations import (
    OPERATIONS,
    Operation,
    require_logits_of_texts_at_once,
    sessions_after,
)

_MODEL = Path(__file__).parents[2] / "models" / "builder" / "gemma2.onnx"
_VOCABULARY = 128
_POSITIONS = 512
# Float sums of two layers in another order, of the largest logit.
_TOLERANCE = 1000 * 2.0**-24
# Rounded keys and values of one layer or two: some units of the type's roundoff, or steps of a range. Of random texts
# half differ by more than one unit or three quarters of a step, one in a hundred by 4 or 2.5.
_NARROW = {"fp16": 16 * 2.0**-11, "bf16": 16 * 2.0**-8, "int8": 5 / 255, "int4": 5 / 15}


def _model() -> onnx.ModelProto:
    """Return the model with positions for texts that go around its ring: it comes with 64, without numbers beyond."""
    model = onnx.load(_MODEL)
    tables = {table.name: table for table in model.graph.initializer if table.name in ("cos_cache", "sin_cache")}
    step = np.arctan2(*(numpy_helper.to_array(tables[name])[1] for name in ("sin_cache", "cos_cache")))
    angles = np.outer(np.arange(_POSITIONS), step)
    for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        tables[name].CopyFrom(numpy_helper.from_array(function(angles).astype(np.float32), name))
    return model


def _compiled(folder: Path, kv_cache: str, dtype: str = "model") -> CompiledModel:
    onnx.save(_model(), folder / "model.onnx")
    options = CompileOptions(find_target("host"), activations="float", kv_cache=kv_cache, kv_cache_dtype=dtype)
    compile_model(folder / "model.onnx", folder / f"{kv_cache}-{dtype}.opt", options, certify=False)
    return load(folder / f"{kv_cache}-{dtype}.opt")


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return _compiled(tmp_path_factory.mktemp("gemma2"), "in-place")


@pytest.fixture(scope="module")
def returning(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return _compiled(tmp_path_factory.mktemp("gemma2"), "returned")


@pytest.fixture(scope="module")
def newest_only() -> onnx.ModelProto:
    """Return the model with the caches that the builder gives it by default, of the newest tokens alone.

    Its products are in floats, as those of the packages here.
    """
    model = _model()
    for node in model.graph.node:
        for attribute in [each for each in node.attribute if each.name == "accuracy_level"]:
            node.attribute.remove(attribute)
    windowed = [
        node
        for node in model.graph.node
        if any(each.name == "local_window_size" and each.i > 0 for each in node.attribute)
    ]
    names = {name for node in windowed for name in (*node.input[3:5], *node.output[1:3])}
    for node in windowed:
        node.attribute.append(onnx.helper.make_attribute("sliding_window_cache", 1))
    for value in (*model.graph.input, *model.graph.output):
        if value.name in names:
            dimension = value.type.tensor_type.shape.dim[2]
            dimension.dim_param = dimension.dim_param.replace("sequence", "sliding")
    return model


@pytest.fixture(scope="module")
def newest(newest_only: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    folder = tmp_path_factory.mktemp("newest")
    onnx.save(newest_only, folder / "model.onnx")
    options = CompileOptions(find_target("host"), activations="float")
    compile_model(folder / "model.onnx", folder / "model.opt", options)
    return load(folder / "model.opt")


def _tokens(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, _VOCABULARY, length).tolist()


def _require_equal(model: CompiledModel, session: DecoderSession, rest: list[int]) -> None:
    """Require that a session goes on as one of `model` that reads everything at once."""
    whole = DecoderSession(model).append([*session.tokens, *rest])
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(session.append(rest), whole, rtol=0, atol=_TOLERANCE * np.abs(whole).max())


def test_the_manifest_says_that_caches_are_rings(ring: CompiledModel) -> None:
    scheme = "2 tensors in place as float32 in a ring for a window of 8; 2 tensors in place as float32"
    assert ring.manifest.kv_cache_scheme == scheme


@settings(max_examples=12, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_whatever_is_done_sessions_give_the_logits_of_the_whole_cache(
    ring: CompiledModel, returning: CompiledModel, operations: list[Operation]
) -> None:
    sessions = sessions_after(DecoderSession(ring, capacity=512), operations, _VOCABULARY)
    require_logits_of_texts_at_once(sessions, returning, _TOLERANCE)


@pytest.fixture(scope="module", params=list(_NARROW))
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CompiledModel]:
    """Return a type of cache and the model with it, whose second layer sees all tokens."""
    return request.param, _compiled(tmp_path_factory.mktemp("gemma2"), "in-place", request.param)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_rings_beside_caches_of_fewer_bits_give_the_logits_of_the_whole_cache(
    narrow: tuple[str, CompiledModel], returning: CompiledModel, operations: list[Operation]
) -> None:
    dtype, model = narrow
    sessions = sessions_after(DecoderSession(model, capacity=512), operations, _VOCABULARY)
    require_logits_of_texts_at_once(sessions, returning, _NARROW[dtype])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8), back=st.integers(0, 4))
def test_caches_of_the_newest_tokens_alone_are_the_same_rings(
    newest: CompiledModel, ring: CompiledModel, cuts: list[int], back: int
) -> None:
    assert newest.manifest.kv_cache_scheme == ring.manifest.kv_cache_scheme
    tokens, session = _tokens(sum(cuts) + 1), DecoderSession(newest, capacity=512)
    for count in cuts:
        session.append(tokens[len(session.tokens) :][:count])
    other = session.fork()
    session.rewind(max(0, len(session.tokens) - back))
    _require_equal(ring, session, tokens[len(session.tokens) :])
    _require_equal(ring, other, tokens[-1:])


@pytest.mark.parametrize("room", [8, 11])
def test_sessions_give_what_onnxruntime_gives_with_caches_of_the_newest_tokens(
    newest_only: onnx.ModelProto, newest: CompiledModel, room: int
) -> None:
    run, tokens, session = theirs(newest_only), _tokens(40), DecoderSession(newest)
    specs = {spec.name: spec for spec in newest.entry("main").signature.inputs}
    rooms = {name: room if "sliding" in str(spec.shape[2]) else 0 for name, spec in specs.items() if "past" in name}
    past = {name: np.zeros((1, 2, tokens_held, 16), np.float32) for name, tokens_held in rooms.items()}
    for start, end in ((0, 5), (5, 17), (17, 18), (18, 19), (19, 40)):
        ids, mask = np.array([tokens[start:end]]), np.ones((1, end), np.int64)
        outputs = run({"input_ids": ids, "attention_mask": mask, **past})
        expected = outputs["logits"][0, -1]
        actual = session.append(tokens[start:end])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=_TOLERANCE * np.abs(expected).max())
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}


def test_a_call_takes_a_window_that_has_room_for_all_tokens(newest: CompiledModel, ring: CompiledModel) -> None:
    def call(model: CompiledModel, room: int) -> dict[str, np.ndarray]:
        inputs = {"input_ids": np.array([_tokens(9)]), "attention_mask": np.ones((1, 12), np.int64)}
        rng = np.random.default_rng(0)
        for spec in model.entry("main").signature.inputs[2:]:
            past = rng.standard_normal((1, 2, 3, 16), np.float32)
            more = room - 3 if "sliding" in str(spec.shape[2]) else 0
            inputs[spec.name] = np.pad(past, ((0, 0), (0, 0), (0, more), (0, 0)))
        return model(inputs)

    actual, expected = call(newest, 14), call(ring, 3)
    np.testing.assert_allclose(actual["logits"], expected["logits"], rtol=0, atol=_TOLERANCE * 10)
    assert actual["present.0.key"].shape == (1, 2, 14, 16)
    np.testing.assert_allclose(actual["present.0.key"][:, :, :12], expected["present.0.key"], rtol=0, atol=1e-5)
    with pytest.raises(OptionError, match="has room for 11 tokens of a sliding window, and the call makes them 12"):
        call(newest, 11)


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


def test_a_window_stays_floats_where_caches_are_quantized(narrow: tuple[str, CompiledModel]) -> None:
    dtype, model = narrow
    held = {"fp16": "float16", "bf16": "bfloat16"}.get(dtype, "float32")
    second = f"2 tensors in place as {held}" if held != "float32" else f"1 tensors in place as {dtype} by channel"
    expected = f"2 tensors in place as {held} in a ring for a window of 8; {second}"
    assert model.manifest.kv_cache_scheme.startswith(expected)
