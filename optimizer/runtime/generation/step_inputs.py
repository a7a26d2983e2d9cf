"""What decoders take beside their cache to read tokens, by the names that exporters and ONNX give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optimizer.package.dtypes import lowest, numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]
    Mask = NDArray[np.generic]


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


def mask_values(step: Step, dtype: str, rank: int) -> Mask:
    """Return a step's mask in one of the types and ranks of `MASKS`.

    [batch, places] has 1 where a token lies, and the model itself hides from each query what comes after it.
    [batch, 1, tokens, places] says what each query sees: True, or in floats 0, which is added to its scores, and the
    lowest number elsewhere.
    """
    places = np.arange(step.mask_width)
    if rank == _OF_TOKENS:
        return (places < step.total).astype(numpy_dtype(dtype))[None]
    seen = (places <= _places(step)[:, None])[None, None]
    return seen if dtype == "bool" else np.where(seen, 0.0, lowest(dtype)).astype(numpy_dtype(dtype))


def _places(step: Step) -> Numbers:
    return np.arange(step.past, step.total)


TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
_FLOATS = ("float32", "float16", "bfloat16")
_OF_TOKENS, _OF_QUERIES = 2, 4
MASKS = {_OF_TOKENS: ("int64", "int32", "bool", *_FLOATS), _OF_QUERIES: ("bool", *_FLOATS)}
"""The types that a mask may have, by its rank."""
VALUES: Mapping[str, Callable[[Step], Numbers]] = {
    TOKENS: lambda step: np.asarray([step.tokens], np.int64),
    POSITIONS: lambda step: _places(step)[None],
    # Of caches that have room for all tokens from the start: the places of the new tokens, as transformers names them,
    # and the inputs of TensorScatter and of Attention that say where each row's tokens begin and end.
    "cache_position": _places,
    "write_indices": lambda step: np.array([step.past]),
    "nonpad_kv_seqlen": lambda step: np.array([step.total]),
}
"""The int64 inputs of one sequence but for the mask, and what they hold in a step."""
RANKS = {name: VALUES[name](Step((0,), 0, 1)).ndim for name in VALUES}
PER_SEQUENCE = ("write_indices", "nonpad_kv_seqlen")
"""The inputs that hold one number for each sequence."""
