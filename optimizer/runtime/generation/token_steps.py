"""Steps of one token each, as decoding takes them: inputs are checked for many of them, and written where they lie.

Between two steps of a decoder its weights push what Python has out of the caches, so that a step waits for memory at
every object that it touches: of a small decoder, for as long as for a fifteenth of all its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimizer.errors import InputMismatchError
from optimizer.package.alignment import aligned_copy
from optimizer.runtime.generation.step_inputs import MASK, VALUES, Step, mask_values
from optimizer.runtime.kv_cache import argument_count, counts_of, total_tokens
from optimizer.runtime.tensors import CPU, tensor_over

if TYPE_CHECKING:
    from optimizer.runtime.generation.roles import DecoderRoles
    from optimizer.runtime.generation.step_inputs import Mask
    from optimizer.runtime.kv_cache import CacheTensors, KeyValueCache, Steps
    from optimizer.runtime.model import Entry
    from optimizer.runtime.tensors import Tensor

CHECKED_AT_ONCE = 64
"""Steps that are checked together, by the first and the last of them: from one to the next, lengths grow by one."""


class TokenSteps:
    """The steps of one token each of an entry point that appends to `cache`."""

    def __init__(self, entry: Entry, roles: DecoderRoles, cache: KeyValueCache) -> None:
        self._entry = entry
        self._cache = cache
        self._numbers = {name: aligned_copy(VALUES[name](Step((0,), 0, 1))) for name in roles.inputs}
        self._given = {name: tensor_over(array) for name, array in self._numbers.items()}
        self._mask_spec = roles.mask
        self._mask = None if roles.mask is None else self._wide_mask(0)
        self._logits = entry.returned_names.index(roles.logits.name)
        places = [spec.name for spec in entry.signature.inputs]
        self._place_of_mask = places.index(MASK) if self._mask is not None else 0
        self._checked = range(0)
        self._laid_out: CacheTensors | None = None
        self._arguments: list[object] = []
        self._place_of_counts = argument_count(entry.signature) - 1

    @staticmethod
    def suit(entry: Entry) -> bool:
        """Return whether there are such steps: the caches grow, and inputs lie in the CPU's memory."""
        return entry.device == CPU and not any(record.is_whole for record in entry.signature.caches)

    def append(self, token: int, past: int) -> Tensor | None:
        """Read a token behind `past` others and return the logits; None where `Entry.append` has to check the step."""
        if past not in self._checked and not self._check(past):
            return None
        cache, arguments = self._cache, self._arguments
        steps = cache.reserve(past + 1)
        if cache.tensors is not self._laid_out:
            arguments = self._lay_out(past, steps)
        step = Step((token,), past, 1)
        for name, array in self._numbers.items():
            array[...] = VALUES[name](step)
        if self._mask is not None:
            arguments[self._place_of_mask] = tensor_over(self._mask[..., : past + 1])
        signature = self._entry.signature
        lengths, paged = [past] * len(signature.past_symbols), [steps] * len(signature.paged_symbols)
        arguments[self._place_of_counts] = counts_of(signature, lengths, paged, 0)
        results = self._entry.invoke(arguments)
        cache.commit(past + 1, steps)
        return results[self._logits]

    def _wide_mask(self, places: int) -> Mask:
        """Return the mask of a token that sees all `places`."""
        assert self._mask_spec is not None
        step = Step((0,), places - 1, places)
        return aligned_copy(mask_values(step, self._mask_spec.dtype, len(self._mask_spec.shape)))

    def _check(self, past: int) -> bool:
        """Return whether steps from `past` tokens on are sound, as many as are checked at once."""
        capacity = self._cache.capacity
        end = past + CHECKED_AT_ONCE if capacity is None else min(past + CHECKED_AT_ONCE, capacity)
        if past >= end or not all(self._fits(length) for length in (past, end - 1)) or self._is_beyond(end - 1):
            return False
        if self._mask is not None and self._mask.size < end:
            self._mask = self._wide_mask(2 * end)
        self._checked = range(past, end)
        return True

    def _is_beyond(self, past: int) -> bool:
        """Return whether a position after `past` tokens is more than the model has."""
        step, ranges = Step((0,), past, 1), self._entry.index_ranges
        return any(name in ranges and VALUES[name](step).max() > ranges[name].maximum for name in self._numbers)

    def _fits(self, past: int) -> bool:
        try:
            values = self._values(past)
        except InputMismatchError:
            return False
        return total_tokens(self._entry.signature, values) == past + 1

    def _values(self, past: int) -> dict[str, int]:
        shapes = {name: array.shape for name, array in self._numbers.items()}
        if self._mask is not None:
            shapes[MASK] = (*self._mask.shape[:-1], past + 1)
        return self._entry.values_of(shapes, past)

    def _lay_out(self, past: int, steps: Steps) -> list[object]:
        """Return the arguments with the cache's buffers as they are now."""
        given = self._given if self._mask is None else {**self._given, MASK: tensor_over(self._mask[..., : past + 1])}
        self._arguments = self._entry.arguments(given, self._cache, self._values(past), steps, 0)
        self._laid_out = self._cache.tensors
        return self._arguments
