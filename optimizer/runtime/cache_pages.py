"""Pages of quantized keys and values, as compiled code makes and reads them (`schedules/cache_pages.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimizer.package.entry_points import CachePages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
    Floats = NDArray[np.float32]

LARGEST_SCALE = np.float32(65504.0)
"""The largest finite fp16 number."""


def settled(length: int, quantized: int, pages: CachePages) -> int:
    """Return how many tokens of `length` the code holds as codes in its next step, where `quantized` were before."""
    return quantized + max(0, (length - quantized - pages.recent) // pages.tokens) * pages.tokens


def rows(tokens: int, pages: CachePages) -> tuple[int, int]:
    """Return the sizes of the token axes of codes and scales that hold `tokens` tokens, a multiple of a page."""
    return tokens * pages.bits // 8, tokens // pages.tokens if pages.by_channel else tokens


def shapes(
    tokens: int, recent: int, pages: CachePages, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of codes, scales and recent tokens of a cache [B, G, any, D]."""
    batch, heads, _, channels = shape
    codes, scales = rows(tokens, pages)
    parts = (2, channels) if pages.by_channel else (2,)
    return (batch, heads, codes, channels), (batch, heads, scales, *parts), (batch, heads, recent, channels)


def quantized(values: Floats, pages: CachePages) -> tuple[Array, Array]:
    """Return codes and scales of tokens [B, G, T, D] where T is a multiple of a page."""
    batch, heads, tokens, channels = values.shape
    grouped = values.reshape(batch, heads, -1, pages.tokens, channels) if pages.by_channel else values
    axis = 3
    levels = np.float32((1 << pages.bits) - 1)
    low, high = (
        np.clip(limit, -LARGEST_SCALE, LARGEST_SCALE)
        for limit in (grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True))
    )
    minimum = low.astype(np.float16)
    scale = np.minimum((high - minimum.astype(np.float32)) / levels, LARGEST_SCALE).astype(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
    nearest = np.floor((grouped - minimum.astype(np.float32)) * inverse + np.float32(0.5))
    codes = np.clip(nearest, 0, levels).astype(np.uint8).reshape(batch, heads, tokens, channels)
    if pages.bits == 4:
        codes = codes[:, :, 0::2] | (codes[:, :, 1::2] << np.uint8(4))
    return codes, np.concatenate([scale, minimum], axis)


def dequantized(codes: Array, scales: Array, pages: CachePages) -> Floats:
    """Return the tokens [B, G, T, D] that codes and scales stand for."""
    batch, heads, stored, channels = codes.shape
    each = codes.astype(np.uint8)
    if pages.bits == 4:
        each = np.stack([each & np.uint8(15), each >> np.uint8(4)], 3).reshape(batch, heads, stored * 2, channels)
    values = each.astype(np.float32)
    if pages.by_channel:
        grouped = values.reshape(batch, heads, -1, pages.tokens, channels)
        wide = scales.astype(np.float32)
        return (grouped * wide[:, :, :, :1] + wide[:, :, :, 1:]).reshape(values.shape)
    wide = scales.astype(np.float32)
    return values * wide[..., :1] + wide[..., 1:]
