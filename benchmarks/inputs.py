"""Sizes of networks by kind: the inputs of images, texts and decoders, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from benchmarks.architecture import PAST, Array, Dimensions, Input, Settings, Values, Variant

VOCABULARY = 100
HEADS = 4
LAYERS = 2
NARROW: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
}


def _pixels(generator: np.random.Generator, shape: tuple[int, ...], _: Dimensions) -> Array:
    """8-bit image samples scaled to [-1, 1], as image processors give them (and small when compressed)."""
    return (generator.integers(0, 256, shape) / 127.5 - 1).astype(np.float32)


def _normal(generator: np.random.Generator, shape: tuple[int, ...], _: Dimensions) -> Array:
    """Gaussian values on a grid of 1/64, which compress well."""
    return (np.round(generator.normal(size=shape) * 64) / 64).astype(np.float32)


def _tokens(vocabulary: int) -> Values:
    return lambda generator, shape, _: generator.integers(3, vocabulary, shape)


def _ended_tokens(vocabulary: int) -> Values:
    """Tokens of which the last one, and no other, is the last of the vocabulary: the end of a text."""

    def values(generator: np.random.Generator, shape: tuple[int, ...], _: Dimensions) -> Array:
        tokens = generator.integers(3, vocabulary - 1, shape)
        tokens[..., -1] = vocabulary - 1
        return tokens

    return values


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


def token_ids(name: str, vocabulary: int, dims: tuple[int | str, ...] = ("batch", "sequence")) -> Input:
    """Token numbers of a vocabulary, without the first three, which stand for padding and the like."""
    return Input(name, dims, _tokens(vocabulary))


def ended_token_ids(name: str, vocabulary: int, dims: tuple[int | str, ...]) -> Input:
    """Token numbers of texts that end with the last one of the vocabulary."""
    return Input(name, dims, _ended_tokens(vocabulary))


def pixels(dims: tuple[int | str, ...]) -> Input:
    """Images of the given dimensions."""
    return Input("pixel_values", dims, _pixels)


def features(dims: tuple[int | str, ...]) -> Input:
    """Spectra of speech of the given dimensions."""
    return Input("input_features", dims, _normal)


MASK = Input("attention_mask", ("batch", "sequence"), _padded_right)
SEGMENTS = Input("token_type_ids", ("batch", "sequence"), _segments)

IMAGE_CASES = {"batch_2": {"batch": 2}, "batch_1": {"batch": 1}}
TEXT_CASES = {"batch_2": {"batch": 2, "sequence": 9}, "batch_1": {"batch": 1, "sequence": 14}}
CACHE_CASES = {
    "chunk": {"batch": 2, "sequence": 3, "past_sequence": 4, "total_sequence": 7},
    "prefill": {"batch": 1, "sequence": 6, "past_sequence": 0, "total_sequence": 6},
    "decode": {"batch": 2, "sequence": 1, "past_sequence": 8, "total_sequence": 9},
}
FULL_CACHE_CASES = {
    "chunk": {"batch": 2, "sequence": 16, "past_sequence": 24, "total_sequence": 40},
    "prefill": {"batch": 1, "sequence": 128, "past_sequence": 0, "total_sequence": 128},
    "decode": {"batch": 1, "sequence": 1, "past_sequence": 128, "total_sequence": 129},
}
DECODER_CASES = {
    "batch_2": {"batch": 2, "sequence": 5, "encoder_sequence": 8},
    "batch_1": {"batch": 1, "sequence": 7, "encoder_sequence": 11},
}
FULL_DECODER_CASES = {
    "batch_2": {"batch": 2, "sequence": 5, "encoder_sequence": 96},
    "batch_1": {"batch": 1, "sequence": 32, "encoder_sequence": 128},
}
STATIC_CASES: Mapping[str, Dimensions] = {"static": {}}
STATIC_TOKENS = (1, 128)


def images(size: int, **settings: object) -> Variant:
    """Square images of one size in batches of any number, ten classes."""
    image = pixels(("batch", 3, size, size))
    return Variant({"num_labels": 10, **settings}, (image,), IMAGE_CASES)


def any_images(*inputs: Input, **settings: object) -> Variant:
    """Images of any height and width."""
    image = pixels(("batch", 3, "height", "width"))
    cases = {
        "batch_2": {"batch": 2, "height": 64, "width": 48},
        "batch_1": {"batch": 1, "height": 32, "width": 64},
    }
    return Variant({"num_labels": 10, **settings}, (image, *inputs), cases)


def full_images(height: int, width: int, *inputs: Input, **settings: object) -> Variant:
    """One image of a fixed size, the classes of ImageNet."""
    image = pixels((1, 3, height, width))
    return Variant({"num_labels": 1000, **settings}, (image, *inputs), STATIC_CASES)


def image_mask(dims: tuple[int | str, ...]) -> Input:
    """Which pixels of images in a batch belong to the image and not to its padding on the right."""
    return Input("pixel_mask", dims, _padded_right)


def text(*inputs: Input, **settings: object) -> Variant:
    """Texts of any length in a small vocabulary."""
    return Variant({"vocab_size": VOCABULARY, **settings}, (token_ids("input_ids", VOCABULARY), *inputs), TEXT_CASES)


def full_text(vocabulary: int, *inputs: Input, **settings: object) -> Variant:
    """One text of a fixed length."""
    fixed = (replace(spec, dims=STATIC_TOKENS) for spec in inputs)
    return Variant(settings, (token_ids("input_ids", vocabulary, STATIC_TOKENS), *fixed), STATIC_CASES)


def decoder_over(
    encoder_shape: tuple[int | str, int], vocabulary: int, cases: Mapping[str, Dimensions], settings: Settings
) -> Variant:
    """A decoder without cache over encoder states of shape (batch, *encoder_shape).

    Where the length of the encoder's input is dynamic, a mask says which of its states are padding.
    """
    length = encoder_shape[0]
    masks = [Input("encoder_attention_mask", ("batch", length), _padded_right)] if isinstance(length, str) else []
    states = Input("encoder_hidden_states", ("batch", *encoder_shape), _normal)
    return Variant(settings, (token_ids("decoder_input_ids", vocabulary), *masks, states), cases)


def with_past(
    layers: int,
    key_value_heads: int,
    head_size: int,
    vocabulary: int,
    cases: Mapping[str, Dimensions],
    settings: Settings,
) -> Variant:
    """A decoder with cache tensors of shape (batch, key_value_heads, past_sequence, head_size)."""
    cache = tuple(
        Input(f"{PAST}{layer}.{kind}", ("batch", key_value_heads, "past_sequence", head_size), _normal)
        for layer in range(layers)
        for kind in ("key", "value")
    )
    inputs = (
        token_ids("input_ids", vocabulary),
        Input("attention_mask", ("batch", "total_sequence"), _padded_left),
        Input("position_ids", ("batch", "sequence"), _positions),
        *cache,
    )
    return Variant({"vocab_size": vocabulary, **settings}, inputs, cases)
