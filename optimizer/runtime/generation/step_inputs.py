"""What decoders take beside their cache to read tokens, by the names that exporters and ONNX give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """The `tokens` that one call reads behind `past` others, and how many places a mask has: at least all of them."""

    tokens: Sequence[int]
    past: int
    mask_width: int

    @property
    def total(self) -> int:
        """Return the number of tokens after the call."""
        return self.past + len(self.tokens)


def _mask(step: Step) -> Numbers:
    return (np.arange(step.mask_width) < step.total).astype(np.int64)[None]


def _places(step: Step) -> Numbers:
    return np.arange(step.past, step.total)


TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
VALUES: Mapping[str, Callable[[Step], Numbers]] = {
    TOKENS: lambda step: np.asarray([step.tokens], np.int64),
    MASK: _mask,
    POSITIONS: lambda step: _places(step)[None],
    # Of caches that have room for all tokens from the start: the places of the new tokens, as transformers names them,
    # and the inputs of TensorScatter and of Attention that say where each row's tokens begin and end.
    "cache_position": _places,
    "write_indices": lambda step: np.array([step.past]),
    "nonpad_kv_seqlen": lambda step: np.array([step.total]),
}
"""The int64 inputs of one sequence, and what they hold in a step."""
RANKS = {name: VALUES[name](Step((0,), 0, 1)).ndim for name in VALUES}
PER_SEQUENCE = ("write_indices", "nonpad_kv_seqlen")
"""The inputs that hold one number for each sequence."""
