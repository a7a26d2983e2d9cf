"""Buffers of keys and values that compiled code appends to in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import tvm_ffi

from optimizer.errors import OptionError
from optimizer.package import dimensions
from optimizer.package.dtypes import ITEM_BYTES
from optimizer.package.manifest import CacheRecord, EntryPoint, TensorSpec
from optimizer.runtime import tensors
from optimizer.runtime.tensors import Device, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]

SMALLEST_CAPACITY = 256
"""Tokens that a cache without a bound has room for at first; it doubles when it is full."""


class KeyValueCache:
    """The buffers of one entry point for one text, `length` tokens of which are in use.

    Memory for all of `capacity` is reserved at once, and taken by the operating system as tokens arrive. Without a
    `capacity` the buffers grow. `sizes` are the other symbolic dimensions of the buffers, 1 where they are not given.
    """

    def __init__(
        self, entry: EntryPoint, device: Device, *, capacity: int | None = None, sizes: Mapping[str, int] | None = None
    ) -> None:
        self._entry = entry
        self._device = device
        self._sizes = dict(sizes or {})
        self.capacity: int | None = capacity
        self.length: int = 0
        self._room = SMALLEST_CAPACITY if capacity is None else capacity
        self.buffers: dict[str, Tensor] = self._allocated(self._room)

    @property
    def bytes(self) -> int:
        """Return the size of all buffers."""
        records = {record.past: record for record in self._entry.caches}
        return sum(math.prod(t.shape) * ITEM_BYTES[records[name].dtype] for name, t in self.buffers.items())

    def reserve(self, total: int) -> None:
        """Make room for `total` tokens; raises OptionError where that is more than the capacity."""
        if self.capacity is not None and total > self.capacity:
            raise OptionError(
                f"{self.length} tokens are read and {total - self.length} more do not fit a context of "
                f"{self.capacity}; shorten the prompt, rewind the session, or raise the capacity"
            )
        if total > self._room:
            self._room = max(total, 2 * self._room)
            self._move_to(self._allocated(self._room))

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens, which may not be more than there are."""
        self.length = length

    def fork(self) -> KeyValueCache:
        """Return a cache of its own with the same tokens."""
        other = KeyValueCache(self._entry, self._device, capacity=self.capacity, sizes=self._sizes)
        other.reserve(self.length)
        other.buffers, own = self.buffers, other.buffers
        other.length = self.length
        other._move_to(own)
        return other

    def _allocated(self, room: int) -> dict[str, Tensor]:
        return {record.past: allocate(record, self._sizes, room, self._device) for record in self._entry.caches}

    def _move_to(self, buffers: dict[str, Tensor]) -> None:
        for record in self._entry.caches:
            kept = _tokens(tensors.host_view(self.buffers[record.past], record.dtype), record.axis, self.length)
            _write(buffers[record.past], kept, record)
        self.buffers = buffers


def allocate(record: CacheRecord, sizes: Mapping[str, int], room: int, device: Device) -> Tensor:
    """Return a buffer for `room` tokens, whose content is not defined."""
    shape = [dim if isinstance(dim, int) else _size(dim, sizes) for dim in record.shape]
    shape[record.axis] = room
    return tensors.allocate(tuple(shape), record.dtype, device)


def lengths_argument(entry: EntryPoint, lengths: Mapping[str, int], skipped: int = 0) -> object:
    """Return the lengths as the code takes them: each symbol's once, in the order of the caches.

    `skipped` rows of shortened outputs are left out.
    """
    symbols = dict.fromkeys(record.length for record in entry.caches)
    return tvm_ffi.Shape((*(lengths[symbol] for symbol in symbols), *((skipped,) if entry.shortened else ())))


def without_past(entry: EntryPoint) -> EntryPoint:
    """Return the entry point with the inputs that are no caches alone."""
    caches = {record.past for record in entry.caches}
    inputs = tuple(spec for spec in entry.inputs if spec.name not in caches)
    return replace(entry, inputs=inputs)


def buffers_of_past(
    entry: EntryPoint, past: Mapping[str, Tensor], values: Mapping[str, int], device: Device
) -> dict[str, Tensor]:
    """Return buffers with what was given as past in them, and room for the new tokens and no more."""
    buffers: dict[str, Tensor] = {}
    specs = {spec.name: spec for spec in entry.inputs}
    for record in entry.caches:
        total = dimensions.evaluate(record.total, values)
        buffer = allocate(record, values, total, device)
        _write(buffer, tensors.host_view(past[record.past], specs[record.past].dtype), record)
        buffers[record.past] = buffer
    return buffers


def outputs_with_present(
    entry: EntryPoint, results: Sequence[Tensor], buffers: Mapping[str, Tensor], device: Device
) -> list[Tensor]:
    """Return all outputs in order: what the code returned, and the buffers in the place of caches."""
    present = {record.present: record for record in entry.caches}
    returned = iter(results)
    outputs: list[Tensor] = []
    for spec in entry.outputs:
        record = present.get(spec.name)
        outputs.append(next(returned) if record is None else _as_declared(buffers[record.past], record, spec, device))
    return outputs


def returned_count(entry: EntryPoint) -> int:
    """Return how many of the outputs the code returns."""
    return len(entry.outputs) - len(entry.caches)


def total_tokens(records: Iterable[CacheRecord], values: Mapping[str, int]) -> int:
    """Return the most tokens that any cache will hold after a call."""
    return max(dimensions.evaluate(record.total, values) for record in records)


def _as_declared(buffer: Tensor, record: CacheRecord, spec: TensorSpec, device: Device) -> Tensor:
    if record.dtype == spec.dtype:
        return buffer
    values = tensors.host_view(buffer, record.dtype)
    tensor = tensors.from_numpy(values.astype(tensors.numpy_dtype(spec.dtype)), spec.dtype)
    return tensor if tensor.device == device else tensors.on_device(tensor, device)


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    symbols = dimensions.symbols(dim)
    return dimensions.evaluate(dim, {symbol: sizes.get(symbol, 1) for symbol in symbols})


def _tokens(array: Array, axis: int, count: int) -> Array:
    return array[(slice(None),) * axis + (slice(count),)]


def _write(buffer: Tensor, tokens: Array, record: CacheRecord) -> None:
    """Store `tokens` as the first ones of a buffer."""
    target = tensors.host_view(buffer, record.dtype)
    _tokens(target, record.axis, tokens.shape[record.axis])[...] = tokens
    tensors.write_back(buffer, target)
