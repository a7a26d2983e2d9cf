"""MultiHeadAttention, Attention, QAttention and RotaryEmbedding of com.microsoft against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from tests.frontend.comparison import assert_close, assert_same, node_model, ours

BATCH, QUERIES, KEYS, HEADS, SIZE, PAST = 2, 3, 5, 2, 8, 4
HIDDEN = HEADS * SIZE
RANDOM = np.random.default_rng(7)
ABSENT = np.zeros(0)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def mask(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 2, shape).astype(np.int32)


def lengths(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


CROSS = {"query": draw(BATCH, QUERIES, HIDDEN), "key": draw(BATCH, KEYS, HIDDEN), "value": draw(BATCH, KEYS, HIDDEN)}
SELF = {name: draw(BATCH, QUERIES, HIDDEN) for name in ("query", "key", "value")}
OLD = {name: draw(BATCH, HEADS, PAST, SIZE) for name in ("past_key", "past_value")}
NO_BIAS = {"_bias": ABSENT}
PRESENT = ("output", "present_key", "present_value")

MULTI_HEAD: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...], dict[str, float]]] = {
    "cross": (CROSS, ("output",), {}),
    "narrow_values": ({**CROSS, "value": draw(BATCH, KEYS, HEADS * 4)}, ("output",), {}),
    "bias": ({**CROSS, "bias": draw(3 * HIDDEN)}, ("output",), {"scale": 0.4}),
    "split_keys": (
        {"query": CROSS["query"], "key": draw(BATCH, HEADS, KEYS, SIZE), "value": draw(BATCH, HEADS, KEYS, SIZE)},
        ("output",),
        {},
    ),
    "lengths": ({**CROSS, **NO_BIAS, "mask": lengths(3, 5)}, ("output",), {}),
    "mask_of_keys": ({**CROSS, **NO_BIAS, "mask": mask(BATCH, KEYS)}, ("output",), {"mask_filter_value": -3.0}),
    "row_without_keys": ({**CROSS, **NO_BIAS, "mask": np.zeros((BATCH, KEYS), np.int32)}, ("output",), {}),
    "mask_of_pairs": ({**CROSS, **NO_BIAS, "mask": mask(BATCH, QUERIES, KEYS)}, ("output",), {}),
    "mask_and_bias": (
        {**CROSS, **NO_BIAS, "mask": mask(BATCH, KEYS), "scores": draw(1, HEADS, QUERIES, KEYS)},
        ("output",),
        {},
    ),
    "unidirectional": (
        {**SELF, **NO_BIAS, "mask": mask(BATCH, QUERIES)},
        ("output",),
        {"unidirectional": 1, "mask_filter_value": -3.0},
    ),
    "past": ({**SELF, **NO_BIAS, "_mask": ABSENT, "_scores": ABSENT, **OLD}, PRESENT, {"unidirectional": 1}),
    "past_and_mask": (
        {**SELF, **NO_BIAS, "mask": mask(BATCH, PAST + QUERIES), "_scores": ABSENT, **OLD},
        PRESENT,
        {"unidirectional": 1},
    ),
}


@pytest.mark.parametrize("case", MULTI_HEAD)
def test_multi_head_attention(case: str):
    inputs, outputs, attributes = MULTI_HEAD[case]
    assert_same("MultiHeadAttention", inputs, outputs, num_heads=HEADS, **attributes)


def test_multi_head_attention_with_dynamic_lengths():
    inputs, outputs, attributes = MULTI_HEAD["past_and_mask"]
    shapes = dict.fromkeys(SELF, ("batch", "length", HIDDEN))
    shapes |= dict.fromkeys(OLD, ("batch", HEADS, "past", SIZE))
    shapes["mask"] = ("batch", "total")
    assert_same("MultiHeadAttention", inputs, outputs, num_heads=HEADS, shapes=shapes, **attributes)


def test_packed_inputs_equal_separate_ones():
    packed = draw(BATCH, QUERIES, HEADS, 3, SIZE)
    apart = {
        name: np.ascontiguousarray(packed[:, :, :, index]).reshape(BATCH, QUERIES, HIDDEN)
        for index, name in enumerate(("query", "key", "value"))
    }
    expected = ours(node_model("MultiHeadAttention", apart, ["output"], num_heads=HEADS))(apart)
    together = {"query": packed}
    assert_close(ours(node_model("MultiHeadAttention", together, ["output"], num_heads=HEADS))(together), expected)
    pair = {"query": apart["query"], "key": np.ascontiguousarray(packed[:, :, :, 1:])}
    assert_close(ours(node_model("MultiHeadAttention", pair, ["output"], num_heads=HEADS))(pair), expected)


PROJECTED = {"input": draw(BATCH, QUERIES, 12), "weights": draw(12, 3 * HIDDEN), "bias": draw(3 * HIDDEN)}
STACKED = {"past": draw(2, BATCH, HEADS, PAST, SIZE)}

SELF_ATTENTION: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...], dict[str, object]]] = {
    "plain": (PROJECTED, ("output",), {}),
    "sizes": (
        {**PROJECTED, "weights": draw(12, 40), "bias": draw(40)},
        ("output",),
        {"qkv_hidden_sizes": [HIDDEN, HIDDEN, 8]},
    ),
    "lengths": ({**PROJECTED, "mask": lengths(2, 3)}, ("output",), {"unidirectional": 1, "mask_filter_value": -2.0}),
    "ends_and_starts": ({**PROJECTED, "mask": lengths(2, 3, 1, 0)}, ("output",), {}),
    "mask_of_keys": ({**PROJECTED, "mask": mask(BATCH, QUERIES)}, ("output",), {"mask_filter_value": -3.0}),
    "mask_of_pairs": ({**PROJECTED, "mask": mask(BATCH, QUERIES, QUERIES)}, ("output",), {"unidirectional": 1}),
    "past": ({**PROJECTED, "_mask": ABSENT, **STACKED}, ("output", "present"), {"unidirectional": 1}),
    "past_and_mask": ({**PROJECTED, "mask": mask(BATCH, PAST + QUERIES), **STACKED}, ("output", "present"), {}),
    "scores": (
        {**PROJECTED, "_mask": ABSENT, "_past": ABSENT, "scores": draw(1, HEADS, QUERIES, QUERIES)},
        ("output",),
        {},
    ),
}


@pytest.mark.parametrize("case", SELF_ATTENTION)
def test_attention(case: str):
    inputs, outputs, attributes = SELF_ATTENTION[case]
    # Scores of this projection reach several tens, which scales the rounding of the exponential.
    assert_same("Attention", inputs, outputs, tolerance=4.0, num_heads=HEADS, **attributes)


def test_attention_with_a_mask_of_rank_4_is_refused():
    inputs = {**PROJECTED, "mask": mask(BATCH, 1, 8, 8)}
    with pytest.raises(UnsupportedModelError, match="mask of rank 4"):
        import_model(node_model("Attention", inputs, ["output"], num_heads=HEADS))


@pytest.mark.parametrize("with_past", [False, True])
def test_quantized_attention(with_past: bool):
    inputs = {
        "input": RANDOM.integers(0, 256, (BATCH, QUERIES, 12)).astype(np.uint8),
        # Beyond 64 onnxruntime's sums of pairs saturate on x86 without VNNI.
        "weights": RANDOM.integers(-64, 65, (12, 3 * HIDDEN)).astype(np.int8),
        "bias": draw(3 * HIDDEN),
        "input_scale": np.array(0.02, np.float32),
        "weight_scale": np.array(0.02, np.float32),
        "_mask": ABSENT,
        "input_zero_point": np.array(120, np.uint8),
        "weight_zero_point": np.array(3, np.int8),
    }
    outputs: tuple[str, ...] = ("output",)
    if with_past:
        inputs, outputs = {**inputs, **STACKED}, ("output", "present")
    assert_same("QAttention", inputs, outputs, tolerance=4.0, num_heads=HEADS, unidirectional=1)


ANGLES = RANDOM.uniform(0, 6, size=(20, SIZE // 2))
CACHES = {"cosines": np.cos(ANGLES).astype(np.float32), "sines": np.sin(ANGLES).astype(np.float32)}


@pytest.mark.parametrize(
    ("data", "positions", "attributes"),
    [
        (draw(BATCH, QUERIES, HIDDEN), np.array([[1, 2, 3], [4, 6, 5]]), {}),
        (draw(BATCH, QUERIES, HIDDEN), np.array([5]), {}),
        (draw(BATCH, HEADS, QUERIES, SIZE), np.array([5]), {"interleaved": 1}),
        (draw(BATCH, QUERIES, HEADS * 16), np.array([5]), {"num_heads": HEADS, "rotary_embedding_dim": SIZE}),
    ],
    ids=["positions", "first_position", "interleaved", "partial"],
)
def test_rotary_embedding(data: np.ndarray, positions: np.ndarray, attributes: dict[str, int]):
    assert_same("RotaryEmbedding", {"data": data, "positions": positions, **CACHES}, ["output"], **attributes)
