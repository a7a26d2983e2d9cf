"""Attention and RotaryEmbedding of the standard domain, with dynamic lengths, against ONNX's reference evaluator."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from tests.frontend.comparison import assert_close, node_model, ours

BATCH, HEADS, GROUPS, QUERIES, PAST, SIZE = 2, 4, 2, 3, 4, 8
TOTAL = PAST + QUERIES
RANDOM = np.random.default_rng(11)
ABSENT = np.zeros(0)
OUTPUTS = ("output", "present_key", "present_value")


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


NEW = {
    "query": draw(BATCH, HEADS, QUERIES, SIZE),
    "key": draw(BATCH, GROUPS, QUERIES, SIZE),
    "value": draw(BATCH, GROUPS, QUERIES, SIZE),
}
OLD = {name: draw(BATCH, GROUPS, PAST, SIZE) for name in ("past_key", "past_value")}
DYNAMIC = {
    "query": ("batch", HEADS, "length", SIZE),
    "key": ("batch", GROUPS, "length", SIZE),
    "value": ("batch", GROUPS, "length", SIZE),
    "past_key": ("batch", GROUPS, "past", SIZE),
    "past_value": ("batch", GROUPS, "past", SIZE),
    "mask": ("batch", 1, "length", "total"),
}


def check(inputs: dict[str, np.ndarray], outputs: tuple[str, ...], **attributes: float) -> None:
    options = {"domain": "", "opset": 25, "shapes": DYNAMIC, **attributes}
    model = node_model("Attention", inputs, outputs, **options)
    fed = {value.name: inputs[value.name] for value in model.graph.input}
    results = ReferenceEvaluator(model).run(None, fed)
    assert_close(ours(model)(fed), dict(zip(outputs, results, strict=True)))


def test_causal_with_past_and_grouped_heads():
    check({**NEW, "_mask": ABSENT, **OLD}, OUTPUTS, is_causal=1, scale=0.3, softcap=2.0)


def test_float_mask_with_past():
    check({**NEW, "mask": draw(BATCH, 1, QUERIES, TOTAL), **OLD}, OUTPUTS)


def test_mask_shorter_than_the_keys_hides_the_rest():
    check({**NEW, "mask": RANDOM.integers(0, 2, (BATCH, 1, QUERIES, TOTAL - 2)).astype(bool), **OLD}, OUTPUTS)


def test_window_around_the_query():
    check({**NEW, "_mask": ABSENT, **OLD}, OUTPUTS, left_window_size=2, right_window_size=1)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_scores_of_every_stage(mode: int):
    inputs = {**NEW, "mask": draw(BATCH, 1, QUERIES, TOTAL), **OLD}
    # The reference evaluator caps mode 0 too, against the operator's text.
    check(inputs, (*OUTPUTS, "scores"), qk_matmul_output_mode=mode, softcap=3.0 if mode else 0.0)


def test_lengths_of_an_external_cache():
    keys = {name: draw(BATCH, GROUPS, TOTAL, SIZE) for name in ("key", "value")}
    absent = dict.fromkeys(("_mask", "_past_key", "_past_value"), ABSENT)
    inputs = {"query": NEW["query"], **keys, **absent, "lengths": np.array([5, 7], np.int64)}
    model = node_model("Attention", inputs, ["output"], domain="", opset=24, is_causal=1)
    fed = {value.name: inputs[value.name] for value in model.graph.input}
    (expected,) = ReferenceEvaluator(model).run(None, fed)
    assert_close(ours(model)(fed), {"output": expected})


def test_row_without_keys_is_zero_and_a_row_of_lowest_numbers_is_not():
    mask = np.zeros((BATCH, 1, QUERIES, QUERIES), np.float32)
    mask[0, 0, 0] = -np.inf
    mask[0, 0, 1] = np.finfo(np.float32).min
    model = node_model("Attention", {**NEW, "mask": mask}, ["output"], domain="", opset=24)
    output = ours(model)({**NEW, "mask": mask})["output"]
    np.testing.assert_array_equal(output[0, :, 0], 0)
    mean = np.repeat(NEW["value"][0].mean(axis=1), HEADS // GROUPS, axis=0)
    np.testing.assert_allclose(output[0, :, 1], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_inputs_are_rounded_once(dtype: type):
    inputs = {name: array.astype(dtype) for name, array in NEW.items()}
    wide = {name: array.astype(np.float32) for name, array in inputs.items()}
    expected = ours(node_model("Attention", wide, ["output"], domain="", opset=24))(wide)["output"]
    result = ours(node_model("Attention", inputs, ["output"], domain="", opset=24))(inputs)["output"]
    # The probabilities are rounded before the second product, the result after it.
    limit = 4 * float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(result.astype(np.float32), expected, rtol=limit, atol=limit)


def test_heads_that_do_not_group_are_refused():
    inputs = {**NEW, "key": draw(BATCH, 3, QUERIES, SIZE), "value": draw(BATCH, 3, QUERIES, SIZE)}
    with pytest.raises(UnsupportedModelError, match="4 query heads are not a multiple of 3"):
        import_model(node_model("Attention", inputs, ["output"], domain="", opset=24))


@pytest.mark.parametrize("attributes", [{}, {"interleaved": 1}, {"rotary_embedding_dim": 4}])
def test_rotary_embedding_at_positions(attributes: dict[str, int]):
    angles = RANDOM.uniform(0, 6, size=(20, attributes.get("rotary_embedding_dim", SIZE) // 2))
    inputs = {"x": draw(BATCH, HEADS, QUERIES, SIZE), "cosines": np.cos(angles).astype(np.float32)}
    inputs |= {"sines": np.sin(angles).astype(np.float32), "positions": np.array([[1, 2, 3], [4, 6, 5]])}
    shapes = {"x": ("batch", HEADS, "length", SIZE), "positions": ("batch", "length")}
    model = node_model("RotaryEmbedding", inputs, ["output"], domain="", opset=23, shapes=shapes, **attributes)
    (expected,) = ReferenceEvaluator(model).run(None, inputs)
    assert_close(ours(model)(inputs), {"output": expected})
