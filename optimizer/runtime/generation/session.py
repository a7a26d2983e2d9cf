"""One text in the making: a decoder with the keys and values of the tokens that it has read."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from optimizer.errors import OptionError
from optimizer.runtime.generation.returned_cache import ReturnedCache
from optimizer.runtime.generation.roles import DecoderRoles, roles_of
from optimizer.runtime.generation.step_inputs import TOKENS, VALUES, Step, mask_values
from optimizer.runtime.generation.token_steps import TokenSteps
from optimizer.runtime.kv_cache import fixed_room, require_room
from optimizer.runtime.tensors import CPU, host_view
from optimizer.runtime.unused_memory import give_back_unused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimizer.runtime.kv_cache import KeyValueCache
    from optimizer.runtime.model import CompiledModel, Entry, Input
    from optimizer.runtime.tensors import Tensor

    Logits = NDArray[np.floating]


MOST_AT_ONCE = 512
"""Tokens of a prompt that one call reads where the cache is appended to in place: enough for products to run at full
speed, few enough for what lies between them to stay small beside the weights."""
LONG_TEXT_CALLS = 4
"""Calls of a text after which the memory between kernels is given back: the next text has to ask for it again, which
takes 2 % of two calls."""


class DecoderSession:
    """A sequence of tokens that a decoder has read, which can grow, be cut back and be forked.

    `capacity` is the largest number of tokens, or None for no bound but memory. Sessions of one model share its weights
    and nothing else. Where the package appends to its cache in place, the session owns the buffers, and a step copies
    nothing of what was read before; a longer text is read `most_at_once` tokens at a time. A cache that the model gives
    room for a number of tokens, and no more, bounds the capacity, too. `unread` are tokens of the text that the next
    `append` reads first: the last one that a `Generation` made. Raises OptionError for a package that is not a decoder
    with a cache, for a capacity or `most_at_once` below 1, and for no capacity where the model leaves the room of such
    a cache to the caller.
    """

    def __init__(self, model: CompiledModel, *, capacity: int | None = None, most_at_once: int = MOST_AT_ONCE) -> None:
        if capacity is not None and capacity < 1:
            raise OptionError(f"a context of {capacity} tokens holds no text; give a capacity of 1 or more")
        if most_at_once < 1:
            raise OptionError(f"a text cannot be read {most_at_once} tokens at a time; give 1 or more")
        self._entry = model.entry("main")
        self._roles: DecoderRoles = roles_of(self._entry.signature)
        self._cache: KeyValueCache | ReturnedCache
        room = fixed_room(self._entry.signature)
        self._capacity = capacity if room is None else min(room, capacity or room)
        if len(self._entry.signature.caches) == len(self._roles.cache):
            self._cache = self._entry.new_cache(capacity=room or capacity)
        else:
            self._cache = ReturnedCache(model, self._roles.cache, capacity=capacity)
        self._most_at_once = most_at_once
        self._vocabulary = _vocabulary(self._entry, self._roles)
        self._steps = self._token_steps()
        self.tokens: list[int] = []
        self.unread: list[int] = []

    @property
    def capacity(self) -> int | None:
        """Return the largest number of tokens, or None for no bound but memory."""
        return self._capacity

    @property
    def cache_bytes(self) -> int:
        """Return the memory that is reserved for keys and values."""
        return self._cache.bytes

    def append(self, tokens: Sequence[int]) -> Logits:
        """Read more tokens and return the logits [vocabulary] of what follows the last of them.

        Raises OptionError for no tokens, for negative ones and those beyond the vocabulary, and where the text would
        exceed the capacity; the session stays as it was.
        """
        tokens = [*self.unread, *map(operator.index, tokens)]
        if not tokens:
            raise OptionError("there are no tokens to read; give at least one (the model's beginning-of-text token)")
        if min(tokens) < 0:
            raise OptionError(f"{min(tokens)} is no token; tokens are counted from 0")
        if self._vocabulary is not None and max(tokens) >= self._vocabulary:
            raise OptionError(
                f"the model has {self._vocabulary} tokens, and none with the number {max(tokens)}; "
                "give it its own tokenizer"
            )
        require_room(self.capacity, len(self.tokens), len(tokens))
        self.unread = []
        if isinstance(self._cache, ReturnedCache):
            return self._read(tokens)
        most = self._most_at_once
        if len(tokens) > most:
            self._cache.make_room(len(self.tokens) + len(tokens))
        *chunks, last = (tokens[start : start + most] for start in range(0, len(tokens), most))
        for chunk in chunks:
            self._read(chunk)
        logits = self._read(last)
        if len(tokens) >= LONG_TEXT_CALLS * most and self._entry.device == CPU:
            # Steps need next to nothing of what lay between the kernels of so many rows.
            give_back_unused()
        return logits

    def _read(self, tokens: Sequence[int]) -> Logits:
        """Read tokens by one call of the code and return the logits that follow the last of them."""
        past, count = len(self.tokens), len(tokens)
        if count == 1 and self._steps is not None:
            result = self._steps.append(tokens[0], past)
            if result is not None:
                self.tokens += tokens
                return result
        room = self._cache.capacity if self._roles.has_mask_over_room else None
        step = Step(tokens, past, room or past + count)
        inputs: dict[str, Input] = {name: VALUES[name](step) for name in self._roles.inputs}
        mask = self._roles.mask
        if mask is not None:
            inputs[mask.name] = mask_values(step, mask.dtype, len(mask.shape))
        outputs = self._step(inputs, count)
        self.tokens += tokens
        return self._logits(outputs[self._roles.logits.name])

    def _logits(self, result: Tensor) -> Logits:
        """Return the last row of what the code returned."""
        logits = host_view(result, self._roles.logits.dtype)
        rows = logits.reshape(-1, logits.shape[-1])
        # Of a long prompt's logits, which take more memory than anything else, one row is copied.
        return cast("Logits", rows[-1].astype(np.float32, copy=len(rows) > 1))

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`; raises OptionError for more than were read."""
        if not 0 <= length <= len(self.tokens):
            raise OptionError(f"the session holds {len(self.tokens)} tokens and cannot be cut to {length}")
        self._cache.rewind(length)
        del self.tokens[length:]
        self.unread = []

    def reset(self) -> None:
        """Forget all tokens, and keep the memory for others."""
        self.rewind(0)

    def fork(self) -> DecoderSession:
        """Return a session with the same tokens that goes its own way from here."""
        other = object.__new__(DecoderSession)
        other._entry, other._roles, other._most_at_once = self._entry, self._roles, self._most_at_once
        other._capacity, other._vocabulary = self._capacity, self._vocabulary
        other._cache = self._cache.fork()
        other._steps = other._token_steps()
        other.tokens, other.unread = list(self.tokens), list(self.unread)
        return other

    def _token_steps(self) -> TokenSteps | None:
        if isinstance(self._cache, ReturnedCache) or not TokenSteps.suit(self._entry):
            return None
        return TokenSteps(self._entry, self._roles, self._cache)

    def _step(self, inputs: dict[str, Input], count: int) -> dict[str, Tensor]:
        if isinstance(self._cache, ReturnedCache):
            return self._cache.append(inputs, count)
        return self._entry.append(inputs, self._cache, skipped=count - 1)


def _vocabulary(entry: Entry, roles: DecoderRoles) -> int | None:
    """Return how many tokens the model can read: those of its embedding, or else those that it has logits for."""
    if TOKENS in entry.index_ranges:
        return entry.index_ranges[TOKENS].maximum + 1
    size = roles.logits.shape[-1]
    return size if isinstance(size, int) else None
