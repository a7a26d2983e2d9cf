"""One text in the making: a decoder with the keys and values of the tokens that it has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from optimizer.errors import OptionError
from optimizer.package.dtypes import numpy_dtype
from optimizer.runtime.generation.roles import DecoderRoles, roles_of
from optimizer.runtime.tensors import Tensor, to_numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimizer.runtime.model import CompiledModel, Input

    Array = NDArray[np.generic]
    Logits = NDArray[np.floating]


class DecoderSession:
    """A sequence of tokens that a decoder has read, which can grow, be cut back and be forked.

    `capacity` is the largest number of tokens, or None for no bound but memory. Sessions of one model share its weights
    and nothing else. Raises OptionError for a package that is not a decoder with a cache.
    """

    def __init__(self, model: CompiledModel, *, capacity: int | None = None) -> None:
        self._model = model
        self._roles: DecoderRoles = roles_of(model.entry("main").signature)
        self._cache: dict[str, Array | Tensor] = {}
        self.capacity: int | None = capacity
        self.tokens: list[int] = []
        self.rewind(0)

    def append(self, tokens: Sequence[int]) -> Logits:
        """Read more tokens and return the logits [vocabulary] of what follows the last of them.

        Raises OptionError for no tokens, and where the text would exceed the capacity; the session stays as it was.
        """
        past, count = len(self.tokens), len(tokens)
        if not count:
            raise OptionError("there are no tokens to read; give at least one (the model's beginning-of-text token)")
        if self.capacity is not None and past + count > self.capacity:
            raise OptionError(
                f"{past} tokens are read and {count} more do not fit a context of {self.capacity}; "
                "shorten the prompt, rewind the session, or raise the capacity"
            )
        inputs: dict[str, Input] = {self._roles.tokens.name: np.asarray([tokens], np.int64), **self._cache}
        if self._roles.mask is not None:
            inputs[self._roles.mask.name] = np.ones((1, past + count), np.int64)
        if self._roles.positions is not None:
            inputs[self._roles.positions.name] = np.arange(past, past + count)[None]
        outputs = self._model(inputs, outputs="dlpack")
        self._cache = {tensor.past: outputs[tensor.present] for tensor in self._roles.cache}
        self.tokens += tokens
        logits = to_numpy(outputs[self._roles.logits.name], self._roles.logits.dtype)
        return cast("Logits", logits.reshape(-1, logits.shape[-1])[-1].astype(np.float32))

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`; raises OptionError for more than were read."""
        if not 0 <= length <= len(self.tokens):
            raise OptionError(f"the session holds {len(self.tokens)} tokens and cannot be cut to {length}")
        if length == len(self.tokens) and self._cache:
            return
        for tensor in self._roles.cache:
            if length == 0:
                self._cache[tensor.past] = np.zeros(tensor.shape, numpy_dtype(tensor.dtype))
                continue
            values = to_numpy(cast("Tensor", self._cache[tensor.past]), tensor.dtype)
            self._cache[tensor.past] = np.ascontiguousarray(values.take(np.arange(length), tensor.axis))
        del self.tokens[length:]

    def fork(self) -> DecoderSession:
        """Return a session with the same tokens that goes its own way from here; what was read so far is shared."""
        other = DecoderSession(self._model, capacity=self.capacity)
        other.tokens = list(self.tokens)
        other._cache = dict(self._cache)
        return other
