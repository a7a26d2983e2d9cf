"""Buffers of keys and values that compiled code appends to in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from optimizer.errors import OptionError
from optimizer.package import dimensions
from optimizer.package.entry_points import CachePages, CacheRecord, EntryPoint, TensorSpec
from optimizer.runtime import cache_pages, tensors
from optimizer.runtime.cache_buffers import CacheBuffers, Held, Room, places_of
from optimizer.runtime.cache_memory import CacheMemory, Place, bytes_of
from optimizer.runtime.tensors import Device, Tensor

SMALLEST_CAPACITY = 256
"""Tokens that a cache has room for at first, and by which it grows at least."""
SMALLEST_STEP = 128
"""Tokens of a step that rings have room for beside their window, unless a step reads more."""
SMALLEST_RECENT = 128
"""Tokens that a quantized cache has room for as floats, unless a step reads more."""


@dataclass(frozen=True)
class Steps:
    """How many tokens are codes `before` a step, and how many the step makes `quantized`."""

    before: int
    quantized: int


NO_CODES = Steps(0, 0)


@dataclass(frozen=True)
class CacheTensors:
    """What the code takes of all caches: tensors in the places of inputs, and the `others`.

    `row` has None where an input stands that is no cache; `given` says of each of these where, and its name. They are
    made once for many steps: between two of them a step's weights push most of what Python has out of the caches.
    """

    row: Sequence[Tensor | None]
    given: Sequence[tuple[int, str]]
    others: Sequence[Tensor]


class KeyValueCache:
    """The buffers of one entry point for one text, `length` tokens of which are in use.

    In the CPU's memory the buffers grow with the text, by half, and are moved: so they are in use for the greatest part
    and may lie in huge pages, however large the `capacity`. On another device there is room for all of it at once.
    `sizes` are the other symbolic dimensions of the buffers, 1 where they are not given.
    The first `quantized` tokens are codes, in the caches that have those. Caches that are whole hold `capacity` tokens
    from the start, all zeros, and other inputs say which of them are meant. Raises OptionError for such caches without
    a capacity, or with another one than the model says, or beside caches that grow.
    """

    def __init__(
        self, entry: EntryPoint, device: Device, *, capacity: int | None = None, sizes: Mapping[str, int] | None = None
    ) -> None:
        self._entry = entry
        self._device = device
        self._sizes = dict(sizes or {})
        self._pages: CachePages | None = pages_of(entry)
        self._is_whole: bool = any(record.is_whole for record in entry.caches)
        if self._is_whole:
            capacity = _whole_capacity(entry, capacity)
        self.capacity: int | None = capacity
        self.length: int = capacity if self._is_whole and capacity is not None else 0
        self.quantized: int = 0
        self._memory: CacheMemory | None = None
        self._room: Room = Room(SMALLEST_CAPACITY if capacity is None else capacity, SMALLEST_RECENT, SMALLEST_STEP)
        if device == tensors.CPU and not self._is_whole:
            CacheMemory(self.bytes)  # refused now where it cannot be, not in the middle of a text
            self._room = replace(self._room, tokens=min(self._room.tokens, SMALLEST_CAPACITY))
        self.buffers: dict[str, CacheBuffers] = self._allocated(self._room, self.length)
        self.tensors: CacheTensors = tensors_of(entry, self.buffers)
        self._has_rings: bool = any(record.window for record in entry.caches)

    @property
    def bytes(self) -> int:
        """Return the size of all buffers when the capacity is reached, without one as they are."""
        return bytes_of(self._places(replace(self._room, tokens=max(self._room.tokens, self.capacity or 0))))

    def make_room(self, total: int) -> None:
        """Make room for a text of `total` tokens at once that several steps are to bring.

        Raises OptionError where that is more than the capacity.
        """
        require_room(self.capacity, self.length, total - self.length)
        self._change(self._room_for(total), total)

    def reserve(self, total: int) -> Steps:
        """Make room for `total` tokens, and return how many are codes before and in the step that brings them.

        Raises OptionError where that is more than the capacity.
        """
        if self._pages is None and self._holds(total):
            return NO_CODES
        require_room(self.capacity, self.length, total - self.length)
        before = self.quantized
        quantized = before if self._pages is None else cache_pages.settled(self.length, before, self._pages)
        recent = max(SMALLEST_RECENT, self.length - before, total - quantized)
        room = self._room_for(total)
        if self._pages is not None and not recent <= room.recent <= max(2 * recent, SMALLEST_RECENT):
            room = replace(room, recent=recent)
        if total - self.length > room.step:
            room = replace(room, step=total - self.length)
        self._change(room, total)
        return Steps(before, quantized)

    def _holds(self, total: int) -> bool:
        """Return whether the buffers stay as they are for so many tokens: most steps of one token ask for no more."""
        room, memory = self._room, self._memory
        if total > room.tokens or total - self.length > room.step:
            return False
        return memory is None or memory.is_large or 2 * total < room.tokens

    def commit(self, total: int, steps: Steps) -> None:
        """Take note of a step that was done."""
        self.length, self.quantized = total, steps.quantized
        if self._has_rings:
            for buffers in self.buffers.values():
                buffers.note(total)

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens, which may not be more than there are; a whole cache stays as it is.

        Raises OptionError where a ring does not hold the window of tokens before that any more.
        """
        if self._is_whole:
            return
        least = max((buffers.least_length() for buffers in self.buffers.values()), default=0)
        if 0 < length < least:
            raise OptionError(
                f"the sliding window has moved on and cannot be cut back to {length} tokens; "
                f"cut back to {least} or more, or to 0 and read the text again"
            )
        kept = Held(length, self.quantized)
        if self._pages is not None and length < self.quantized:
            kept = Held(length, length // self._pages.tokens * self._pages.tokens)
        for buffers in self.buffers.values():
            buffers.requantize(Held(self.length, self.quantized), kept)
        self.length, self.quantized = kept.tokens, kept.quantized

    def fork(self) -> KeyValueCache:
        """Return a cache of its own with the same tokens."""
        other = copy.copy(self)  # but for the buffers, which it has of its own
        other._use(other._allocated(self._room, self.length))
        for name, buffers in other.buffers.items():
            buffers.copy_from(self.buffers[name], Held(self.length, self.quantized))
        return other

    def _room_for(self, total: int) -> Room:
        """Return the room, or for more tokens than it has half as much again, if the capacity is as much."""
        room = self._room
        if total <= room.tokens:
            return room
        tokens = total + max(total // 2, SMALLEST_CAPACITY)
        return replace(room, tokens=tokens if self.capacity is None else min(tokens, self.capacity))

    def _change(self, room: Room, total: int) -> None:
        """Move to buffers with another room; those that `total` tokens fill by half go to huge pages."""
        if room is not self._room:
            held = Held(self.length, self.quantized)
            buffers = self._allocated(room, total)
            for name, each in buffers.items():
                each.copy_from(self.buffers[name], held)
            self._use(buffers)
            self._room = room
        memory = self._memory
        if memory is not None and not memory.is_large and 2 * total >= room.tokens:
            memory.use_large_pages(written=self.length > 0)

    def _places(self, room: Room) -> list[Place]:
        return [place for record in self._entry.caches for place in places_of(record, self._sizes, room)]

    def _allocated(self, room: Room, total: int) -> dict[str, CacheBuffers]:
        """Return buffers that are to hold `total` tokens."""
        allocate = partial(tensors.allocate, device=self._device)
        if self._device == tensors.CPU:
            memory = self._memory = CacheMemory(bytes_of(self._places(room)))
            if 2 * total >= room.tokens:
                memory.use_large_pages(written=False)
            allocate = memory.allocate
        made: dict[str, CacheBuffers] = {}
        for record in self._entry.caches:
            made[record.past] = CacheBuffers(record, places_of(record, self._sizes, room), allocate)
            if record.is_whole:
                made[record.past].clear()
        return made

    def _use(self, buffers: dict[str, CacheBuffers]) -> None:
        self.buffers, self.tensors = buffers, tensors_of(self._entry, buffers)


def _whole_capacity(entry: EntryPoint, capacity: int | None) -> int:
    """Return the capacity of caches that are whole."""
    sizes = {record.length for record in entry.caches}
    if len(sizes) > 1 or not all(record.is_whole for record in entry.caches):
        raise OptionError("the package has caches of several kinds or sizes; call it with the past as inputs")
    fixed = fixed_room(entry) or capacity
    if fixed is None:
        raise OptionError("the package's cache does not grow; give its capacity (generate's --max-context)")
    if capacity not in (None, fixed):
        raise OptionError(f"the package's cache holds {fixed} tokens and cannot have a capacity of {capacity}")
    return fixed


def fixed_room(entry: EntryPoint) -> int | None:
    """Return how many tokens caches that are whole have room for, where the model says a number; else None."""
    return next((int(r.length) for r in entry.caches if r.is_whole and r.length.isdecimal()), None)


def require_room(capacity: int | None, length: int, more: int) -> None:
    """Raise OptionError where a context that holds `length` tokens has no room for `more`."""
    if capacity is not None and length + more > capacity:
        first = f"{length} tokens are read and {more} more do" if length else f"{more} tokens do"
        raise OptionError(
            f"{first} not fit a context of {capacity}; "
            "shorten the prompt, rewind the session, or raise the capacity (generate's --max-context)"
        )


def pages_of(entry: EntryPoint) -> CachePages | None:
    """Return the layout of the entry point's quantized caches, one of them for all, or None."""
    return next((record.pages for record in entry.caches if record.pages is not None), None)


def tensors_of(entry: EntryPoint, buffers: Mapping[str, CacheBuffers]) -> CacheTensors:
    """Return the tensors that the code takes of the entry point's caches."""
    first = {record.past: buffers[record.past].tensors[0] for record in entry.caches}
    row = [first.get(spec.name) for spec in entry.inputs]
    given = [(place, spec.name) for place, spec in enumerate(entry.inputs) if spec.name not in first]
    return CacheTensors(row, given, [part for record in entry.caches for part in buffers[record.past].tensors[1:]])


def arguments(
    entry: EntryPoint,
    given: Mapping[str, Tensor],
    caches: CacheTensors,
    lengths: Mapping[str, int],
    steps: Mapping[str, Steps],
    skipped: int = 0,
) -> list[object]:
    """Return what the code takes: inputs, with buffers in the place of caches; the buffers' other parts; numbers.

    The numbers are each symbol's length, in the order of the caches, `steps` of those with quantized caches, and how
    many rows of shortened outputs are `skipped`.
    """
    result: list[object] = list(caches.row)
    for place, name in caches.given:
        result[place] = given[name]
    if not entry.caches:
        return result
    result += caches.others
    numbers = [dimensions.evaluate(symbol, lengths) for symbol in entry.past_symbols]
    result.append(counts_of(entry, numbers, [steps[symbol] for symbol in entry.paged_symbols], skipped))
    return result


def counts_of(entry: EntryPoint, lengths: Sequence[int], steps: Sequence[Steps], skipped: int) -> object:
    """Return the numbers that the code takes, as one argument."""
    counts = [number for each in steps for number in (each.before, each.quantized)]
    return tensors.shape_of([*lengths, *counts, *((skipped,) if entry.shortened else ())])


def argument_count(entry: EntryPoint) -> int:
    """Return how many arguments the code takes, but for the weights."""
    parts = sum(2 for record in entry.caches if record.pages is not None)
    return len(entry.inputs) + parts + bool(entry.caches)


def without_past(entry: EntryPoint) -> EntryPoint:
    """Return the entry point with the inputs that are no caches alone."""
    caches = {record.past for record in entry.caches}
    inputs = tuple(spec for spec in entry.inputs if spec.name not in caches)
    return replace(entry, inputs=inputs)


def steps_of_past(entry: EntryPoint, values: Mapping[str, int]) -> dict[str, Steps]:
    """Return how many tokens of what is given as past become codes: whole pages, as in a session."""
    steps: dict[str, Steps] = {}
    for record in entry.caches:
        if record.pages is not None:
            count = cache_pages.settled(values[record.length], 0, record.pages)
            steps[record.length] = Steps(count, count)
    return steps


def buffers_of_past(
    entry: EntryPoint,
    past: Mapping[str, Tensor],
    values: Mapping[str, int],
    steps: Mapping[str, Steps],
    device: Device,
) -> dict[str, CacheBuffers]:
    """Return buffers with what was given as past in them, and room for the new tokens and no more.

    Raises OptionError where a past of a sliding window has no room for all tokens: which of them it holds depends on
    what masks say of each row.
    """
    result: dict[str, CacheBuffers] = {}
    specs = {spec.name: spec for spec in entry.inputs}
    # Most often one of each for all caches.
    lengths = {size: dimensions.evaluate(size, values) for size in entry.past_symbols}
    totals = {size: dimensions.evaluate(size, values) for size in entry.cache_totals}
    for record in entry.caches:
        length, total = lengths[record.length], totals[record.total]
        if record.past in entry.newest_only:
            total = _require_all_in(record, length, total)
        held = Held(length, steps[record.length].before if record.pages is not None else 0)
        places = places_of(record, values, Room(total, max(total, length) - held.quantized, total))
        buffers = CacheBuffers(record, places, partial(tensors.allocate, device=device))
        buffers.store(tensors.host_view(past[record.past], specs[record.past].dtype), held)
        result[record.past] = buffers
    return result


def _require_all_in(record: CacheRecord, room: int, total: int) -> int:
    if total > room:
        raise OptionError(
            f"'{record.past}' has room for {room} tokens of a sliding window, and the call makes them {total}; "
            "give it room for all of them, or append to a session, whose cache moves with the window"
        )
    return room


def outputs_with_present(
    entry: EntryPoint,
    results: Sequence[Tensor],
    buffers: Mapping[str, CacheBuffers],
    values: Mapping[str, int],
    steps: Mapping[str, Steps],
    device: Device,
) -> list[Tensor]:
    """Return all outputs in order: what the code returned, and the buffers in the place of caches."""
    present = {record.present: record for record in entry.caches}
    returned = iter(results)
    outputs: list[Tensor] = []
    for spec in entry.outputs:
        record = present.get(spec.name)
        if record is None:
            outputs.append(next(returned))
            continue
        if record.pages is None and record.dtype == spec.dtype:
            outputs.append(buffers[record.past].tensors[0])
            continue
        quantized = steps[record.length].quantized if record.pages is not None else 0
        size = record.length if record.past in entry.newest_only else record.total
        held = Held(dimensions.evaluate(size, values), quantized)
        outputs.append(_as_declared(buffers[record.past], held, spec, device))
    return outputs


def total_tokens(entry: EntryPoint, values: Mapping[str, int]) -> int:
    """Return the most tokens that any cache will hold after a call."""
    return max(dimensions.evaluate(total, values) for total in entry.cache_totals)


def _as_declared(buffers: CacheBuffers, held: Held, spec: TensorSpec, device: Device) -> Tensor:
    """Return the tokens that are held in the output's own dtype."""
    tensor = tensors.from_numpy(buffers.read(held).astype(tensors.numpy_dtype(spec.dtype)), spec.dtype)
    return tensor if tensor.device == device else tensors.on_device(tensor, device)
