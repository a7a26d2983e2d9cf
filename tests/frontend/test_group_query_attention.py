"""GroupQueryAttention against onnxruntime: prompts, decoding, chunks, ragged and padded rows, and every option."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
from onnx import parser

from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized
from tests.frontend.comparison import assert_close, node_model, ours, theirs

HEADS, GROUPS, SIZE = 4, 2, 16


@dataclass(frozen=True)
class Step:
    """One call: new tokens, the past's buffer length (None: no past), the total length, each row's last position."""

    length: int
    past: int | None
    total: int
    last: tuple[int, ...]
    packed: bool = False
    rotary: int = 0  # number of angles; 0 for no rotary embedding
    dtype: str = "float32"
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)  # further inputs from cos_cache on, by shape
    attributes: dict[str, int | float] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("output", "present_key", "present_value")
    tolerance: float = 1.0


STEPS = {
    "prompt_without_past": Step(3, None, 3, (2, 2)),
    "padded_prompt": Step(3, None, 3, (2, 1)),
    "padded_prompt_into_buffer": Step(3, 8, 3, (2, 1), rotary=8),
    "decode_with_growing_past": Step(1, 4, 5, (4, 4), rotary=8),
    "decode_of_ragged_rows": Step(1, 4, 5, (4, 2), rotary=8),
    "decode_in_buffer": Step(1, 8, 5, (4, 3), rotary=8),
    "chunk_after_past": Step(3, 4, 7, (6,), rotary=8),
    "chunk_rotated_in_part_and_interleaved": Step(3, 4, 7, (6,), rotary=8, attributes={"rotary_interleaved": 1}),
    "packed": Step(3, 4, 7, (6,), packed=True, rotary=8),
    "packed_interleaved_with_soft_cap": Step(
        1, 8, 5, (4, 2), packed=True, rotary=8, attributes={"rotary_interleaved": 1, "softcap": 5.0}
    ),
    "packed_smooth_softmax_in_window": Step(
        3, 4, 7, (6,), packed=True, attributes={"smooth_softmax": 1, "local_window_size": 3}
    ),
    "window": Step(6, 4, 10, (9,), attributes={"local_window_size": 3}),
    "window_of_padded_prompt": Step(6, None, 6, (5, 1), attributes={"local_window_size": 2}),
    "soft_cap_and_scale": Step(3, 4, 7, (6,), attributes={"softcap": 5.0, "scale": 0.3}),
    "smooth_softmax": Step(3, 4, 7, (6,), attributes={"smooth_softmax": 1}),
    "head_sink": Step(3, 4, 7, (6,), extra={"_cos": (), "_sin": (), "_positions": (), "_bias": (), "sink": (HEADS,)}),
    "bias": Step(1, 8, 5, (4,), extra={"_cos": (), "_sin": (), "_positions": (), "bias": (1, 1, 1, 5)}),
    "not_causal": Step(3, None, 3, (2, 1), attributes={"causal": 0}),
    "scores": Step(
        3,
        4,
        7,
        (6,),
        attributes={"qk_output": 1, "softcap": 2.0},
        outputs=("output", "present_key", "present_value", "scores"),
    ),
    "probabilities": Step(
        1,
        8,
        5,
        (4,),
        attributes={"qk_output": 2},
        outputs=("output", "present_key", "present_value", "probabilities"),
    ),
    # onnxruntime rotates and multiplies in 16 bits; we in 32.
    "half_precision": Step(3, 4, 7, (6,), rotary=8, dtype="float16", tolerance=4.0),
}


def inputs_of(step: Step) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    batch = len(step.last)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(step.dtype)

    absent = np.zeros(0)
    if step.packed:
        inputs = {"query": draw(batch, step.length, (HEADS + 2 * GROUPS) * SIZE), "_key": absent, "_value": absent}
    else:
        inputs = {name: draw(batch, step.length, GROUPS * SIZE) for name in ("key", "value")}
        inputs = {"query": draw(batch, step.length, HEADS * SIZE), **inputs}
    if step.past is None:
        inputs |= {"_past_key": absent, "_past_value": absent}
    else:
        inputs |= {name: draw(batch, GROUPS, step.past, SIZE) for name in ("past_key", "past_value")}
    inputs |= {"last": np.array(step.last, np.int32), "total": np.array(step.total, np.int32)}
    if step.rotary:
        angles = random.uniform(0, 6, size=(16, step.rotary))
        inputs |= {"cosines": np.cos(angles).astype(step.dtype), "sines": np.sin(angles).astype(step.dtype)}
    return inputs | {name: draw(*shape) if shape else absent for name, shape in step.extra.items()}


def model_of(step: Step, **options: object) -> onnx.ModelProto:
    heads = {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": int(step.rotary > 0)}
    return node_model("GroupQueryAttention", inputs_of(step), step.outputs, **heads, **step.attributes, **options)


@pytest.mark.parametrize("name", STEPS)
def test_matches_onnxruntime(name: str):
    step = STEPS[name]
    model, inputs = model_of(step), inputs_of(step)
    fed = {value.name: inputs[value.name] for value in model.graph.input}
    assert_close(ours(model)(fed), theirs(model)(fed), step.tolerance)


_NEWEST_ONLY = {
    "prompt": (Step(3, 4, 3, (2,)), 3),
    "prompt_beyond_the_room": (Step(9, 4, 9, (8,)), 3),
    "tokens_that_all_fit": (Step(1, 4, 4, (3,)), 3),
    "first_tokens_that_go": (Step(1, 4, 5, (4,)), 3),
    "room_for_the_window_alone": (Step(1, 3, 8, (7,)), 3),
    "tokens_that_go_at_once": (Step(1, 7, 13, (12,)), 3),
    "chunk": (Step(3, 5, 12, (11,)), 3),
    "chunk_beyond_the_room": (Step(8, 4, 14, (13,)), 2),
    "ragged_rows": (Step(1, 4, 8, (7, 2, 4)), 3),
}


@pytest.mark.parametrize("name", _NEWEST_ONLY)
def test_a_cache_of_the_newest_tokens_alone_matches_onnxruntime(name: str) -> None:
    step, window = _NEWEST_ONLY[name]
    step = replace(step, rotary=8, attributes={"local_window_size": window, "sliding_window_cache": 1})
    model, inputs = model_of(step), inputs_of(step)
    fed = {value.name: inputs[value.name] for value in model.graph.input}
    actual, expected = ours(model)(fed), theirs(model)(fed)
    assert step.past is not None
    at_once = step.past - window + 1
    for row, last in enumerate(step.last):
        held = last + 1 - at_once * max(0, -(-(last + 1 - step.past) // at_once))
        for results in (actual, expected):
            for present in ("present_key", "present_value"):
                results[present][row, :, held:] = 0  # undefined
    assert_close(actual, expected)


def test_queries_and_keys_are_normalized_by_head_before_they_are_rotated() -> None:
    plain = STEPS["chunk_after_past"]
    scales = {"query_scale": (SIZE,), "key_scale": (SIZE,)}
    normed = replace(plain, extra={**dict.fromkeys(("_9", "_10", "_11", "_12", "_13"), ()), **scales})
    inputs = {name: array for name, array in inputs_of(normed).items() if not name.startswith("_")}
    expected = {name: array for name, array in inputs.items() if name not in scales}
    for name in ("query", "key"):
        heads = expected[name].reshape(*expected[name].shape[:2], -1, SIZE)
        rooted = np.sqrt((heads * heads).mean(-1, keepdims=True) + 1e-6)
        expected[name] = (heads / rooted * inputs[f"{name}_scale"]).astype("float32").reshape(expected[name].shape)
    # onnxruntime has this on GPUs alone.
    assert_close(ours(model_of(normed))(inputs), theirs(model_of(plain))(expected))


def test_one_import_serves_all_lengths():
    steps = [STEPS[name] for name in ("padded_prompt_into_buffer", "decode_of_ragged_rows", "decode_in_buffer")]
    dynamic = dict.fromkeys(("query", "key", "value"), ("batch", "length", None))
    shapes = {name: (*shape[:2], HEADS * SIZE if name == "query" else GROUPS * SIZE) for name, shape in dynamic.items()}
    shapes |= dict.fromkeys(("past_key", "past_value"), ("batch", GROUPS, "past", SIZE))
    model = model_of(steps[0], shapes={**shapes, "last": ("batch",)})
    run, reference = ours(model), theirs(model)
    for step in steps:
        inputs = inputs_of(step)
        assert_close(run(inputs), reference(inputs))


def test_total_length_computed_from_the_mask_stays_symbolic():
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>
        g (float[1, length, {HEADS * SIZE}] query, float[1, length, {GROUPS * SIZE}] key,
           float[1, length, {GROUPS * SIZE}] value, float[1, {GROUPS}, past, {SIZE}] past_key,
           float[1, {GROUPS}, past, {SIZE}] past_value, int64[1, "past + length"] mask)
        => (float[1, a, b] output, float[1, c, d, e] present_key, float[1, f, g, h] present_value) {{
            one = Constant <value = int64 {{1}}> ()
            axes = Constant <value = int64[1] {{1}}> ()
            sum = ReduceSum <keepdims = 0> (mask, axes)
            before = Sub (sum, one)
            last = Cast <to = 6> (before)
            shape = Shape (mask)
            length_of_mask = Gather <axis = 0> (shape, one)
            total = Cast <to = 6> (length_of_mask)
            output, present_key, present_value =
                com.microsoft.GroupQueryAttention <num_heads = {HEADS}, kv_num_heads = {GROUPS}>
                (query, key, value, past_key, past_value, last, total)
        }}
    """)
    given = inputs_of(STEPS["chunk_after_past"])
    inputs = {name: given[name] for name in ("query", "key", "value", "past_key", "past_value")}
    inputs["mask"] = np.ones((1, 7), np.int64)
    imported = import_model(model)
    shape = imported.module["main"].ret_ty.fields[1].shape.values
    assert str(shape[2]) in ("past + length", "length + past")
    assert_close(unoptimized(imported)(inputs), theirs(model)(inputs))


_CODES = {
    "int8_by_tensor": (8, "PER_TENSOR", {}),
    "int8_by_channel": (8, "PER_CHANNEL", {}),
    "int4_by_tensor": (4, "PER_TENSOR", {}),
    "int4_by_channel_in_window": (4, "PER_CHANNEL", {"local_window_size": 3}),
    "int8_of_newest_tokens_alone": (8, "PER_CHANNEL", {"local_window_size": 4, "sliding_window_cache": 1}),
}


def coded(bits: int, mode: str, step: Step, **attributes: int | str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A step whose past holds codes, with its inputs; the values' scale is twice the keys'."""
    random = np.random.default_rng(6)
    shape = (1,) if mode == "PER_TENSOR" else (1, GROUPS, 1, SIZE)
    scale = (random.uniform(1, 2, shape) * (4 / 2**bits)).astype(np.float32)
    absent = {f"_{index}": np.zeros(0) for index in range(12 - 7 - 2 * (step.rotary > 0))}
    inputs = {**inputs_of(step), **absent, "key_scale": scale, "value_scale": 2 * scale}
    kind, size = (np.int8, SIZE) if bits == 8 else (np.uint8, SIZE // 2)
    info = np.iinfo(kind)
    for name in ("past_key", "past_value"):
        inputs[name] = random.integers(info.min, info.max + 1, (len(step.last), GROUPS, step.past or 0, size), kind)
    heads = {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": int(step.rotary > 0)}
    codes = {"k_quant_type": mode, "v_quant_type": mode, "kv_cache_bit_width": bits}
    model = node_model("GroupQueryAttention", inputs, step.outputs, **heads, **codes, **attributes)
    return model, {value.name: inputs[value.name] for value in model.graph.input}


@pytest.mark.parametrize("name", _CODES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_cache_of_codes_matches_onnxruntime_bit_for_bit(name: str, dtype: str) -> None:
    bits, mode, attributes = _CODES[name]
    # Where keys are rotated in 16 bits before they are rounded, codes differ.
    rotary = 8 if dtype == "float32" else 0
    model, inputs = coded(bits, mode, replace(STEPS["chunk_after_past"], dtype=dtype, rotary=rotary), **attributes)
    actual, expected = ours(model)(inputs), theirs(model)(inputs)
    held = 4 if "sliding_window_cache" in attributes else None
    for present in ("present_key", "present_value"):
        np.testing.assert_array_equal(actual.pop(present)[:, :, :held], expected.pop(present)[:, :, :held])
    assert_close(actual, expected, 4.0)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"v_quant_type": "NONE"}, "of int8, has NONE, PER_TENSOR; build the model so, or with an unquantized cache"),
        ({"kv_cache_bit_width": 4}, "int8 with codes of 4 bits is not supported; build the model with int8, int4"),
    ],
)
def test_other_codes_are_refused_with_what_to_do(attributes: dict[str, int | str], message: str) -> None:
    model, _ = coded(8, "PER_TENSOR", STEPS["chunk_after_past"])
    for attribute in model.graph.node[0].attribute:
        if attribute.name in attributes:
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, attributes[attribute.name]))
    with pytest.raises(UnsupportedModelError, match=message):
        import_model(model)


@pytest.mark.parametrize("dtype", ["float8e4m3fn", "int8"])
def test_a_cache_of_codes_without_scales_is_refused_with_what_to_do(dtype: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a cache of codes needs k_scale and v_scale.*build the model so"):
        import_model(node_model_with_open_heads(dtype))


def test_an_open_size_of_cached_heads_is_that_of_the_new_ones() -> None:
    model = node_model_with_open_heads()
    imported = import_model(model)
    parameters = imported.module["main"].params
    sizes = {name: parameter.ty.shape[3] for name, parameter in zip(imported.input_names, parameters, strict=True)
             if name.startswith("past")}  # fmt: skip
    assert {name: int(size) for name, size in sizes.items()} == {"past_key": SIZE, "past_value": SIZE}


def node_model_with_open_heads(cached: str = "float") -> onnx.ModelProto:
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        decoder (float[1, S, {(HEADS + 2 * GROUPS) * SIZE}] packed, {cached}[1, {GROUPS}, P, D] past_key,
                 {cached}[1, {GROUPS}, P, D] past_value, int32[1] last, int32[1] total)
            => (float[1, S, {HEADS * SIZE}] y, {cached}[1, {GROUPS}, T, D] key, {cached}[1, {GROUPS}, T, D] value) {{
            y, key, value = com.microsoft.GroupQueryAttention <num_heads = {HEADS}, kv_num_heads = {GROUPS}>
                (packed, , , past_key, past_value, last, total)
        }}
    """)
