"""Table of the network architectures that the tests and the benchmarks export from `transformers`.

Each row gives one architecture in two sizes: `small`, with dynamic dimensions, for the models committed under
`tests/models`, and `full`, with static ones, for the benchmarks. The settings of a full size are what differs from the
defaults of the configuration class, which are the published sizes of most architectures.
This module needs neither torch nor transformers; `benchmarks.export` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

Array = np.ndarray
Dimensions = Mapping[str, int]
Values = Callable[[np.random.Generator, tuple[int, ...], Dimensions], Array]
Settings = Mapping[str, object]
# How `benchmarks.export` calls the network: with its inputs as keywords, as a decoder over a given encoder output,
# or as a decoder with a key-value cache.
Call = Literal["keywords", "decoder", "decoder_with_past"]
# The two ONNX exporters of torch: `torch.onnx.export(dynamo=True)` and `dynamo=False`.
Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)

SEED = 0
VOCABULARY = 100
HEADS = 4
LAYERS = 2


@dataclass(frozen=True)
class Input:
    """One graph input: a string in `dims` names a dynamic dimension, a number fixes it."""

    name: str
    dims: tuple[int | str, ...]
    values: Values

    def shape(self, dimensions: Dimensions) -> tuple[int, ...]:
        """Return the concrete shape for the given values of the dynamic dimensions."""
        return tuple(dim if isinstance(dim, int) else dimensions[dim] for dim in self.dims)

    def draw(self, generator: np.random.Generator, dimensions: Dimensions) -> Array:
        """Return random contents of this input for the given values of the dynamic dimensions."""
        return self.values(generator, self.shape(dimensions), dimensions)


@dataclass(frozen=True)
class Variant:
    """One size of an architecture: configuration settings, inputs, and named sets of dynamic dimensions.

    The first case is the example that the exporters trace; its sizes are above 1 where an exporter would otherwise
    take 0 or 1 for a constant.
    """

    settings: Settings
    inputs: tuple[Input, ...]
    cases: Mapping[str, Dimensions]

    def draw(self, case: str) -> dict[str, Array]:
        """Return random inputs of the case called `case`, by name; the same on every call."""
        generator = np.random.default_rng([SEED, list(self.cases).index(case)])
        return {spec.name: spec.draw(generator, self.cases[case]) for spec in self.inputs}


@dataclass(frozen=True)
class Architecture:
    """How to build one architecture: class names in `transformers`, how it is called, and what it returns.

    `outputs` maps each output to its dynamic axes; `full_name` is the usual name of the full size.
    """

    model: str
    config: str
    outputs: Mapping[str, Mapping[int, str]]
    small: Variant
    full: Variant | None = None
    full_name: str = ""
    part: Literal["whole", "encoder"] = "whole"
    call: Call = "keywords"


def _pixels(generator: np.random.Generator, shape: tuple[int, ...], _: Dimensions) -> Array:
    """8-bit image samples scaled to [-1, 1], as image processors give them (and small when compressed)."""
    return (generator.integers(0, 256, shape) / 127.5 - 1).astype(np.float32)


def _normal(generator: np.random.Generator, shape: tuple[int, ...], _: Dimensions) -> Array:
    """Gaussian values on a grid of 1/64, which compress well."""
    return (np.round(generator.normal(size=shape) * 64) / 64).astype(np.float32)


def _tokens(vocabulary: int) -> Values:
    return lambda generator, shape, _: generator.integers(3, vocabulary, shape)


def _segments(_: np.random.Generator, shape: tuple[int, ...], __: Dimensions) -> Array:
    """Token types of a sentence pair: the first third is sentence 0."""
    segments = np.ones(shape, np.int64)
    segments[:, : shape[1] // 3] = 0
    return segments


def _padded_right(_: np.random.Generator, shape: tuple[int, ...], __: Dimensions) -> Array:
    """A mask with padding at the end of every row or image but the first."""
    mask = np.ones(shape, np.int64)
    mask[1:, ..., -(shape[-1] // 4) :] = 0
    return mask


def _padded_left(_: np.random.Generator, shape: tuple[int, ...], dimensions: Dimensions) -> Array:
    """A mask over past and present tokens with padding inside the past, so that no query sees nothing."""
    mask = np.ones(shape, np.int64)
    mask[1:, : dimensions["past_sequence"] // 2] = 0
    return mask


def _positions(_: np.random.Generator, shape: tuple[int, ...], dimensions: Dimensions) -> Array:
    past = dimensions["past_sequence"]
    return np.tile(np.arange(past, past + shape[1]), (shape[0], 1))


def _token_ids(name: str, vocabulary: int, dims: tuple[int | str, ...] = ("batch", "sequence")) -> Input:
    return Input(name, dims, _tokens(vocabulary))


MASK = Input("attention_mask", ("batch", "sequence"), _padded_right)
SEGMENTS = Input("token_type_ids", ("batch", "sequence"), _segments)

IMAGE_CASES = {"batch_2": {"batch": 2}, "batch_1": {"batch": 1}}
TEXT_CASES = {"batch_2": {"batch": 2, "sequence": 9}, "batch_1": {"batch": 1, "sequence": 14}}
CACHE_CASES = {
    "chunk": {"batch": 2, "sequence": 3, "past_sequence": 4, "total_sequence": 7},
    "prefill": {"batch": 1, "sequence": 6, "past_sequence": 0, "total_sequence": 6},
    "decode": {"batch": 2, "sequence": 1, "past_sequence": 8, "total_sequence": 9},
}
STATIC_CASES: Mapping[str, Dimensions] = {"static": {}}
STATIC_TOKENS = (1, 128)


def _images(size: int, **settings: object) -> Variant:
    image = Input("pixel_values", ("batch", 3, size, size), _pixels)
    return Variant({"num_labels": 10, **settings}, (image,), IMAGE_CASES)


def _any_images(*inputs: Input, **settings: object) -> Variant:
    """Images of any height and width."""
    image = Input("pixel_values", ("batch", 3, "height", "width"), _pixels)
    cases = {
        "batch_2": {"batch": 2, "height": 64, "width": 48},
        "batch_1": {"batch": 1, "height": 32, "width": 64},
    }
    return Variant({"num_labels": 10, **settings}, (image, *inputs), cases)


def _full_images(size: int, **settings: object) -> Variant:
    image = Input("pixel_values", (1, 3, size, size), _pixels)
    return Variant({"num_labels": 1000, **settings}, (image,), STATIC_CASES)


def _text(*inputs: Input, **settings: object) -> Variant:
    return Variant({"vocab_size": VOCABULARY, **settings}, (_token_ids("input_ids", VOCABULARY), *inputs), TEXT_CASES)


def _full_text(vocabulary: int, *inputs: Input) -> Variant:
    fixed = (replace(spec, dims=STATIC_TOKENS) for spec in inputs)
    return Variant({}, (_token_ids("input_ids", vocabulary, STATIC_TOKENS), *fixed), STATIC_CASES)


def _decoder_over(encoder_length: int | str, *inputs: Input, **settings: object) -> Variant:
    """A decoder without cache over encoder states of shape (batch, encoder_length, 32)."""
    states = Input("encoder_hidden_states", ("batch", encoder_length, 32), _normal)
    cases = {
        "batch_2": {"batch": 2, "sequence": 5, "encoder_sequence": 8},
        "batch_1": {"batch": 1, "sequence": 7, "encoder_sequence": 11},
    }
    tokens = _token_ids("decoder_input_ids", VOCABULARY)
    return Variant(settings, (tokens, *inputs, states), cases)


def _with_past(key_value_heads: int, head_size: int, **settings: object) -> Variant:
    """A decoder with cache tensors of shape (batch, key_value_heads, past_sequence, head_size)."""
    cache = tuple(
        Input(f"past_key_values.{layer}.{kind}", ("batch", key_value_heads, "past_sequence", head_size), _normal)
        for layer in range(LAYERS)
        for kind in ("key", "value")
    )
    inputs = (
        _token_ids("input_ids", VOCABULARY),
        Input("attention_mask", ("batch", "total_sequence"), _padded_left),
        Input("position_ids", ("batch", "sequence"), _positions),
        *cache,
    )
    return Variant({"vocab_size": VOCABULARY, **settings}, inputs, CACHE_CASES)


BATCH = {0: "batch"}
BATCH_SEQUENCE = {0: "batch", 1: "sequence"}
LOGITS_AND_PRESENT = {
    "logits": BATCH_SEQUENCE,
    **{
        f"present.{layer}.{kind}": {0: "batch", 2: "total_sequence"}
        for layer in range(LAYERS)
        for kind in ("key", "value")
    },
}
NARROW: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
}
GROUPED_QUERY: Settings = {**NARROW, "num_key_value_heads": 2, "max_position_embeddings": 64}
WHISPER: Settings = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5: Settings = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "vocab_size": VOCABULARY,
    "feed_forward_proj": "gated-gelu",
    # Few enough that the short test sequences reach the logarithmic buckets.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "resnet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"logits": BATCH},
        _images(32, embedding_size=16, hidden_sizes=(32, 64), depths=(2, 1)),
        _full_images(224),
        "resnet_50",
    ),
    "mobilenet_v2": Architecture(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"logits": BATCH},
        _images(64, image_size=64, depth_multiplier=0.1, finegrained_output=False),
        _full_images(224),
        "mobilenet_v2",
    ),
    "efficientnet": Architecture(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"logits": BATCH},
        _images(32, image_size=32, width_coefficient=0.1, depth_coefficient=0.2, hidden_dim=128),
        _full_images(224, image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
        "efficientnet_b0",
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"logits": BATCH},
        _images(32, image_size=32, num_stages=2, hidden_sizes=(16, 32), depths=(2, 1)),
        _full_images(224),
        "convnext_tiny",
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {"logits": BATCH},
        _images(32, image_size=32, patch_size=8, **NARROW),
        _full_images(224),
        "vit_base_16",
    ),
    "swin": Architecture(
        "SwinForImageClassification",
        "SwinConfig",
        {"logits": BATCH},
        _images(32, image_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4),
        _full_images(224),
        "swin_tiny",
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"logits": {0: "batch", 2: "output_height", 3: "output_width"}},
        _any_images(
            num_encoder_blocks=2,
            depths=(1, 1),
            sr_ratios=(4, 2),
            hidden_sizes=(16, 32),
            patch_sizes=(7, 3),
            strides=(4, 2),
            num_attention_heads=(1, 2),
            mlp_ratios=(2, 2),
            decoder_hidden_size=32,
        ),
    ),
    "detr": Architecture(
        "DetrForObjectDetection",
        "DetrConfig",
        {"logits": BATCH, "pred_boxes": BATCH},
        _any_images(
            Input("pixel_mask", ("batch", "height", "width"), _padded_right),
            backbone_config={
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": (16, 32),
                "depths": (1, 1),
                "out_features": ["stage2"],
            },
            num_queries=6,
            d_model=32,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        ),
    ),
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {
            "logits_per_image": {0: "image_batch", 1: "text_batch"},
            "logits_per_text": {0: "text_batch", 1: "image_batch"},
            "text_embeds": {0: "text_batch"},
            "image_embeds": {0: "image_batch"},
        },
        Variant(
            {
                "text_config": {
                    **NARROW,
                    "vocab_size": VOCABULARY,
                    "max_position_embeddings": 32,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                },
                "vision_config": {**NARROW, "image_size": 32, "patch_size": 8},
                "projection_dim": 24,
            },
            (
                _token_ids("input_ids", VOCABULARY, ("text_batch", "sequence")),
                Input("pixel_values", ("image_batch", 3, 32, 32), _pixels),
                Input("attention_mask", ("text_batch", "sequence"), _padded_right),
            ),
            {
                "images_2": {"image_batch": 2, "text_batch": 3, "sequence": 9},
                "images_1": {"image_batch": 1, "text_batch": 2, "sequence": 14},
            },
        ),
    ),
    "bert": Architecture(
        "BertModel",
        "BertConfig",
        {"last_hidden_state": BATCH_SEQUENCE, "pooler_output": BATCH},
        _text(MASK, SEGMENTS, max_position_embeddings=32, **NARROW),
        _full_text(30522, MASK, SEGMENTS),
        "bert_base",
    ),
    "distilbert": Architecture(
        "DistilBertModel",
        "DistilBertConfig",
        {"last_hidden_state": BATCH_SEQUENCE},
        _text(MASK, max_position_embeddings=32, dim=32, n_layers=LAYERS, n_heads=HEADS, hidden_dim=64),
        _full_text(30522, MASK),
        "distilbert_base",
    ),
    "deberta": Architecture(
        "DebertaV2Model",
        "DebertaV2Config",
        {"last_hidden_state": BATCH_SEQUENCE},
        _text(
            MASK,
            max_position_embeddings=32,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            **NARROW,
        ),
    ),
    "t5_encoder": Architecture(
        "T5EncoderModel",
        "T5Config",
        {"last_hidden_state": BATCH_SEQUENCE},
        _text(MASK, **T5),
    ),
    "t5_decoder": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {"logits": BATCH_SEQUENCE},
        _decoder_over(
            "encoder_sequence",
            Input("encoder_attention_mask", ("batch", "encoder_sequence"), _padded_right),
            **T5,
        ),
        call="decoder",
    ),
    "whisper_encoder": Architecture(
        "WhisperModel",
        "WhisperConfig",
        {"last_hidden_state": BATCH},
        Variant(WHISPER, (Input("input_features", ("batch", 16, 40), _normal),), IMAGE_CASES),
        Variant({}, (Input("input_features", (1, 80, 3000), _normal),), STATIC_CASES),
        "whisper_tiny_encoder",
        part="encoder",
    ),
    "whisper_decoder": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"logits": BATCH_SEQUENCE},
        _decoder_over(20, **WHISPER),
        call="decoder",
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        LOGITS_AND_PRESENT,
        _with_past(HEADS, 8, n_embd=32, n_layer=LAYERS, n_head=HEADS, n_positions=64, bos_token_id=1, eos_token_id=2),
        call="decoder_with_past",
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        "LlamaConfig",
        LOGITS_AND_PRESENT,
        _with_past(2, 8, **GROUPED_QUERY),
        call="decoder_with_past",
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        LOGITS_AND_PRESENT,
        _with_past(2, 8, tie_word_embeddings=True, **GROUPED_QUERY),
        call="decoder_with_past",
    ),
}
