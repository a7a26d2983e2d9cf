"""Steps of one token each, as decoding takes them: inputs are checked and made for many, and written where they lie.

Between two steps of a decoder its weights push what Python has out of the caches, so that a step waits for memory at
every object that it touches: of a small decoder, for as long as for a fifteenth of all its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from optimizer.errors import InputMismatchError
from optimizer.package.alignment import aligned_copy
from optimizer.runtime.generation.step_inputs import MASK, TOKENS, VALUES, Step, mask_values
from optimizer.runtime.kv_cache import NO_CODES, argument_count, counts_of, total_tokens
from optimizer.runtime.tensors import CPU, host_view, tensor_over, viewed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimizer.runtime.generation.roles import DecoderRoles
    from optimizer.runtime.generation.step_inputs import Mask
    from optimizer.runtime.kv_cache import CacheTensors, KeyValueCache, Steps
    from optimizer.runtime.model import Entry
    from optimizer.runtime.tensors import Tensor

    Logits = NDArray[np.floating]

CHECKED_AT_ONCE = 64
"""Steps that are checked together, by the first and the last of them: from one to the next, lengths grow by one."""


@dataclass(frozen=True)
class _Made:
    """What a step takes, made before it: the values of `TokenSteps._views`, its mask, and the counts of tokens.

    The mask is None where there is none, and the counts where they depend on what earlier steps quantized.
    """

    values: Sequence[int]
    mask: Tensor | None
    counts: object | None


class TokenSteps:
    """The steps of one token each of an entry point that appends to `cache`."""

    def __init__(self, entry: Entry, roles: DecoderRoles, cache: KeyValueCache) -> None:
        self._entry = entry
        self._cache = cache
        self._numbers = {name: aligned_copy(VALUES[name](Step((0,), 0, 1))) for name in roles.inputs}
        self._given = {name: tensor_over(array) for name, array in self._numbers.items()}
        # Each holds one number in such a step: the token, or what follows from how many there were before.
        self._views = {name: array.reshape(-1).data for name, array in self._numbers.items()}
        self._token = self._views.pop(TOKENS)
        self._mask_spec = roles.mask
        self._mask = None if roles.mask is None else self._wide_mask(0)
        self._logits = entry.returned_names.index(roles.logits.name)
        self._logits_dtype = roles.logits.dtype
        places = [spec.name for spec in entry.signature.inputs]
        self._place_of_mask = places.index(MASK) if self._mask is not None else 0
        self._checked = range(0)
        self._made: list[_Made] = []
        self._laid_out: CacheTensors | None = None
        self._arguments: list[object] = []
        self._place_of_counts = argument_count(entry.signature) - 1

    @staticmethod
    def suit(entry: Entry) -> bool:
        """Return whether there are such steps: the caches grow, and inputs lie in the CPU's memory."""
        return entry.device == CPU and not any(record.is_whole for record in entry.signature.caches)

    def append(self, token: int, past: int) -> Logits | None:
        """Read a token behind `past` others and return the logits; None where `Entry.append` has to check the step."""
        if past not in self._checked and not self._check(past):
            return None
        cache, arguments = self._cache, self._arguments
        steps = cache.reserve(past + 1)
        if cache.tensors is not self._laid_out:
            arguments = self._lay_out(past, steps)
        made = self._made[past - self._checked.start]
        self._token[0] = token
        for view, value in zip(self._views.values(), made.values, strict=True):
            view[0] = value
        if made.mask is not None:
            arguments[self._place_of_mask] = made.mask
        arguments[self._place_of_counts] = self._counts(past, steps) if made.counts is None else made.counts
        result = self._entry.invoke_for(arguments, self._logits)
        cache.commit(past + 1, steps)
        if self._logits_dtype == "float32":
            return cast("Logits", viewed(result)).reshape(-1)
        return host_view(result, self._logits_dtype).reshape(-1).astype(np.float32)

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
        self._made = [self._make(each) for each in self._checked]
        return True

    def _make(self, past: int) -> _Made:
        step = Step((0,), past, 1)
        values = [int(VALUES[name](step).item()) for name in self._views]
        mask = None if self._mask is None else self._mask_of(past)
        return _Made(values, mask, None if self._entry.signature.paged_symbols else self._counts(past, NO_CODES))

    def _mask_of(self, past: int) -> Tensor:
        assert self._mask is not None
        return tensor_over(self._mask[..., : past + 1])

    def _counts(self, past: int, steps: Steps) -> object:
        signature = self._entry.signature
        lengths, paged = [past] * len(signature.past_symbols), [steps] * len(signature.paged_symbols)
        return counts_of(signature, lengths, paged, 0)

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
        given = self._given if self._mask is None else {**self._given, MASK: self._mask_of(past)}
        self._arguments = self._entry.arguments(given, self._cache, self._values(past), steps, 0)
        self._laid_out = self._cache.tensors
        return self._arguments
