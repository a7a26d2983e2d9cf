"""Choosing the next token from a model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from optimizer.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Logits = NDArray[np.floating]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one where `temperature` is 0, else one drawn at random.

    `top_k` keeps the k likeliest tokens (0: all); `top_p` keeps the likeliest ones whose probabilities together reach p
    (Holtzman et al., The Curious Case of Neural Text Degeneration, 2020). `repetition_penalty` divides the positive
    logits of tokens that the text holds already, and multiplies the negative ones (Keskar et al., CTRL, 2019, section
    4.1). Equal seeds draw equal tokens from equal logits. Raises OptionError for values that make no sense.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature {self.temperature} is not possible; give 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise OptionError(f"top-k {self.top_k} is not possible; give the number of tokens to keep, or 0 for all")
        if not 0.0 < self.top_p <= 1.0:
            raise OptionError(f"top-p {self.top_p} is not possible; give a probability above 0 and up to 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise OptionError(f"repetition penalty {self.repetition_penalty} is not possible; 1 leaves logits alone")
        if self.seed < 0:
            raise OptionError(f"seed {self.seed} is not possible; give 0 or more")


class Sampler:
    """Draws tokens one after another."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    @cached_property
    def _generator(self) -> np.random.Generator:
        """The source of random numbers, whose import takes 7 ms: who takes the likeliest token needs none."""
        return np.random.default_rng(self._sampling.seed)

    def choose(self, logits: Logits, text: Sequence[int]) -> int:
        """Return the next token after `text`, given the logits [vocabulary] of its last position.

        Raises OptionError for logits that are no numbers, as models give beyond their last position.
        """
        settings = self._sampling
        likeliest = int(np.argmax(logits))  # the first that is no number, if one is
        if np.isnan(logits[likeliest]):
            raise OptionError(
                f"the model's logits are no numbers after {len(text)} tokens, which may be more than it has positions "
                "for; give a shorter text, or a context that the model has (generate's --max-context)"
            )
        if settings.temperature == 0.0 and settings.repetition_penalty == 1.0:
            return likeliest  # a copy in fp64 would take twice as long as the search
        values = logits.astype(np.float64)
        if settings.repetition_penalty != 1.0:
            seen = np.unique(np.asarray(text, np.int64))
            penalty = settings.repetition_penalty
            values[seen] = np.where(values[seen] > 0, values[seen] / penalty, values[seen] * penalty)
        if settings.temperature == 0.0:
            return int(np.argmax(values))
        order = np.argsort(-values, kind="stable")
        if settings.top_k:
            order = order[: settings.top_k]
        probabilities = _softmax(values[order], settings.temperature)
        if settings.top_p < 1.0:
            kept = int(np.searchsorted(np.cumsum(probabilities), settings.top_p)) + 1
            order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
        return int(self._generator.choice(order, p=probabilities))


def _softmax(values: Logits, temperature: float) -> Logits:
    """Return the probabilities of `values`; differences of these are divided, as quotients may exceed all floats."""
    with np.errstate(over="ignore"):
        weights = np.exp((values - values.max()) / temperature)
    return weights / weights.sum()
