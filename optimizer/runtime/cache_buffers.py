"""The memory of one cache: a buffer of floats, or of codes with their scales and the newest tokens as floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optimizer.package import dimensions
from optimizer.package.entry_points import CacheRecord
from optimizer.runtime import cache_pages, tensors
from optimizer.runtime.cache_memory import Place
from optimizer.runtime.tensors import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.generic]


@dataclass(frozen=True)
class Room:
    """How many tokens a cache can hold: `tokens` in all, `recent` of them as floats where the others are codes.

    A ring has room for its window and a step of `step` tokens, if that is less.
    """

    tokens: int
    recent: int
    step: int


@dataclass(frozen=True)
class Held:
    """How many tokens a cache holds: `tokens` in all, the first `quantized` of them as codes where it has those."""

    tokens: int
    quantized: int


class CacheBuffers:
    """The tensors of a cache as the code takes them: the first in place of the input, the others after all inputs."""

    def __init__(self, record: CacheRecord, places: Sequence[Place], allocate: Callable[..., Tensor]) -> None:
        """Take memory for the buffers that `places_of` tells from `allocate` (shape, dtype); it may hold anything."""
        self.record = record
        self._lost = 0
        self.tensors: tuple[Tensor, ...] = tuple(allocate(*place) for place in places)

    def copy_from(self, other: CacheBuffers, held: Held) -> None:
        """Take over the tokens that other buffers hold."""
        if self.record.window:
            self._copy_ring(other, held.tokens)
            return
        for place, count in enumerate(self._counts(held)):
            self._write(place, other._first(place, count))

    def clear(self) -> None:
        """Fill a buffer of floats with zeros."""
        held = Held(self.tensors[0].shape[self.record.axis], 0)
        self._write(0, np.zeros_like(self.read(held)))

    def note(self, tokens: int) -> None:
        """Take note that a step has brought the cache to some number of tokens."""
        if self.record.window:
            self._lost = max(self._lost, tokens - self._slots)

    def least_length(self) -> int:
        """Return the fewest tokens, but none, that the cache can be cut back to."""
        return self._lost + self.record.window - 1 if self._lost else 0

    def store(self, tokens: Array, held: Held) -> None:
        """Store the first tokens, as many as are `held`."""
        pages = self.record.pages
        if pages is None:
            self._write(0, tokens)
            return
        split = held.quantized
        codes, scales = cache_pages.quantized(tokens[:, :, :split].astype(np.float32), pages)
        for place, part in enumerate((codes, scales, tokens[:, :, split:])):
            self._write(place, part)

    def read(self, held: Held) -> Array:
        """Return the tokens that are `held`, in the type of the buffer of floats."""
        parts = [self._first(place, count) for place, count in enumerate(self._counts(held))]
        if self.record.pages is None:
            return parts[0]
        codes, scales, recent = parts
        older = cache_pages.dequantized(codes, scales, self.record.pages)
        return np.concatenate([older.astype(recent.dtype), recent], self.record.axis)

    def requantize(self, held: Held, kept: Held) -> None:
        """Keep fewer tokens and fewer codes: what was a code and is none any more becomes a float."""
        if not kept.tokens:
            self._lost = 0
        if self.record.pages is not None and kept.quantized < held.quantized:
            tokens = self.read(Held(held.quantized, held.quantized))
            self._write(2, tokens[:, :, kept.quantized : kept.tokens])

    @property
    def _slots(self) -> int:
        return self.tensors[0].shape[self.record.axis]

    def _copy_ring(self, other: CacheBuffers, tokens: int) -> None:
        """Take over the newest tokens that both rings have room for."""
        axis = self.record.axis
        self._lost = max(other._lost, tokens - self._slots)
        kept = np.arange(max(0, tokens - min(self._slots, other._slots)), tokens)
        source, target = (tensors.host_view(ring.tensors[0], ring.record.dtype) for ring in (other, self))
        target[(slice(None),) * axis + (kept % self._slots,)] = source.take(kept % other._slots, axis)
        tensors.write_back(self.tensors[0], target)

    def _counts(self, held: Held) -> tuple[int, ...]:
        """Return how much of each tensor's token axis is in use."""
        pages = self.record.pages
        return (
            (held.tokens,)
            if pages is None
            else (*cache_pages.rows(held.quantized, pages), held.tokens - held.quantized)
        )

    def _first(self, place: int, count: int) -> Array:
        tensor = self.tensors[place]
        return _tokens(tensors.host_view(tensor, str(tensor.dtype)), self.record.axis, count)

    def _write(self, place: int, values: Array) -> None:
        """Store the first tokens of a tensor."""
        tensor, axis = self.tensors[place], self.record.axis
        target = tensors.host_view(tensor, str(tensor.dtype))
        _tokens(target, axis, values.shape[axis])[...] = values
        tensors.write_back(tensor, target)


def places_of(record: CacheRecord, sizes: Mapping[str, int], room: Room) -> list[Place]:
    """Return shapes and dtypes of a cache's buffers; `sizes` are the symbolic dimensions but the capacity."""
    shape = [dim if isinstance(dim, int) else _size(dim, sizes) for dim in record.shape]
    shape[record.axis] = min(room.tokens, record.window + room.step) if record.window else room.tokens
    if record.pages is None:
        return [(tuple(shape), record.dtype)]
    pages = record.pages
    whole = -(-max(room.tokens, 1) // pages.tokens) * pages.tokens
    shapes = cache_pages.shapes(whole, room.recent, pages, tuple(shape))
    return list(zip(shapes, ("uint8", "float16", record.dtype), strict=True))


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    if dim in sizes:
        return sizes[dim]
    symbols = dimensions.symbols(dim)
    return dimensions.evaluate(dim, {symbol: sizes.get(symbol, 1) for symbol in symbols})


def _tokens(array: Array, axis: int, count: int) -> Array:
    return array[(slice(None),) * axis + (slice(count),)]
