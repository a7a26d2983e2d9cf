"""The bundled decoder keeps the interface of a decoder export, and generates text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime runs the model here; install the extra `verify`")

from onnxruntime import InferenceSession

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "decoder"
LAYERS, KEY_VALUE_HEADS, HEAD_SIZE, VOCABULARY_SIZE = 3, 2, 32, 2048
CACHE = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
# Logits reach about 20; fp32 sums in another order differ by some 1e-6 of that, and five layers pass it on.
TOLERANCE = 1e-4

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def session() -> InferenceSession:
    return InferenceSession(str(FOLDER / "model.onnx"), providers=["CPUExecutionProvider"])


def run(session: InferenceSession, input_ids: list[list[int]], past: Tensors | None = None) -> Tensors:
    """One step after ``past``, the outputs of the step before."""
    tokens = np.array(input_ids, dtype=np.int64)
    batch, sequence = tokens.shape
    empty = np.zeros((batch, KEY_VALUE_HEADS, 0, HEAD_SIZE), np.float32)
    cache = {f"past_key_values.{name}": past[f"present.{name}"] if past else empty for name in CACHE}
    past_sequence = cache["past_key_values.0.key"].shape[2]
    total = past_sequence + sequence
    positions = np.broadcast_to(np.arange(past_sequence, total), (batch, sequence))
    mask = np.ones((batch, total), np.int64)
    feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **cache}
    names = [output.name for output in session.get_outputs()]
    return {name: np.asarray(value) for name, value in zip(names, session.run(names, feeds), strict=True)}


def test_model_is_valid_onnx():
    onnx.checker.check_model(onnx.load(FOLDER / "model.onnx"), full_check=True)


def test_inputs_and_outputs_follow_the_decoder_convention(session: InferenceSession):
    cache_shape = ["batch", KEY_VALUE_HEADS, "past_sequence", HEAD_SIZE]
    total = "past_sequence + sequence"
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    assert inputs == {
        "input_ids": ("tensor(int64)", ["batch", "sequence"]),
        "attention_mask": ("tensor(int64)", ["batch", total]),
        "position_ids": ("tensor(int64)", ["batch", "sequence"]),
        **{f"past_key_values.{name}": ("tensor(float)", cache_shape) for name in CACHE},
    }
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    assert outputs == {
        "logits": ("tensor(float)", ["batch", "sequence", VOCABULARY_SIZE]),
        **{f"present.{name}": ("tensor(float)", ["batch", KEY_VALUE_HEADS, total, HEAD_SIZE]) for name in CACHE},
    }


def test_prefill_equals_decoding_token_by_token(session: InferenceSession):
    tokens = np.random.default_rng(0).integers(VOCABULARY_SIZE, size=(2, 12)).tolist()
    prefill = run(session, tokens)
    step: Tensors | None = None
    logits = []
    for index in range(12):
        step = run(session, [row[index : index + 1] for row in tokens], step)
        logits.append(step["logits"])
    assert step is not None
    np.testing.assert_allclose(np.concatenate(logits, axis=1), prefill["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    for name in CACHE:
        np.testing.assert_allclose(step[f"present.{name}"], prefill[f"present.{name}"], rtol=TOLERANCE, atol=TOLERANCE)


def test_padding_on_the_left_does_not_change_the_next_token(session: InferenceSession):
    tokens, padding = np.random.default_rng(1).integers(VOCABULARY_SIZE, size=(1, 6)), 3
    empty = np.zeros((1, KEY_VALUE_HEADS, 0, HEAD_SIZE), np.float32)
    feeds = {
        "input_ids": np.pad(tokens, ((0, 0), (padding, 0))),
        "attention_mask": np.pad(np.ones_like(tokens), ((0, 0), (padding, 0))),
        "position_ids": np.pad(np.arange(6)[None], ((0, 0), (padding, 0))),
        **{f"past_key_values.{name}": empty for name in CACHE},
    }
    padded = np.asarray(session.run(["logits"], feeds)[0])
    plain = run(session, tokens.tolist())["logits"]
    np.testing.assert_allclose(padded[:, padding:], plain, rtol=TOLERANCE, atol=TOLERANCE)


def test_greedy_text_is_the_one_in_the_readme(session: InferenceSession):
    vocabulary: dict[str, int] = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = {token: piece for piece, token in vocabulary.items()}
    # Byte-level BPE writes a space as U+0120 and a line break as U+010A; printable ASCII stands for itself.
    tokens = [vocabulary[piece] for piece in ("The", "Ġking", "Ġsaid", "Ġto", "Ġhis", "Ġservants")]
    step = run(session, [tokens])
    for _ in range(40):
        tokens.append(int(step["logits"][0, -1].argmax()))
        step = run(session, [tokens[-1:]], step)
    text = "".join(pieces[token] for token in tokens).replace("Ġ", " ").replace("Ċ", "\n")
    assert text.replace("\n", " ") in " ".join((EXAMPLES / "README.md").read_text().replace("\n> ", " ").split())
