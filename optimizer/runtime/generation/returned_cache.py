"""The cache of a decoder whose code returns it with every step, as models in ONNX do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from optimizer.package.dtypes import numpy_dtype
from optimizer.runtime.generation.roles import CacheTensor
from optimizer.runtime.kv_cache import require_room
from optimizer.runtime.tensors import Tensor, to_numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimizer.runtime.model import CompiledModel, Input

    Array = NDArray[np.generic]


class ReturnedCache:
    """Keys and values as the last step returned them, which the next step takes."""

    def __init__(self, model: CompiledModel, parts: tuple[CacheTensor, ...], *, capacity: int | None = None) -> None:
        self._model = model
        self._parts = parts
        self._values: dict[str, Array | Tensor] = {
            part.past: np.zeros(part.shape, numpy_dtype(part.dtype)) for part in parts
        }
        self.capacity: int | None = capacity
        self.length: int = 0

    @property
    def bytes(self) -> int:
        """Return the size of all keys and values."""
        return sum(int(np.prod(v.shape)) * numpy_dtype(p.dtype).itemsize for p, v in self._parts_and_values())

    def append(self, inputs: Mapping[str, Input], count: int) -> dict[str, Tensor]:
        """Run the model on `count` new tokens and keep what it returns of them; raises OptionError for too many."""
        require_room(self.capacity, self.length, count)
        outputs = self._model({**inputs, **self._values}, outputs="dlpack")
        self._values = {part.past: outputs.pop(part.present) for part in self._parts}
        self.length += count
        return outputs

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens, which may not be more than there are."""
        if length == self.length:
            return
        for part, value in self._parts_and_values():
            array = value if isinstance(value, np.ndarray) else to_numpy(value, part.dtype)
            self._values[part.past] = np.ascontiguousarray(array.take(np.arange(length), part.axis))
        self.length = length

    def fork(self) -> ReturnedCache:
        """Return a cache of its own with the same tokens, the memory of which is shared."""
        other = ReturnedCache(self._model, self._parts, capacity=self.capacity)
        other._values, other.length = dict(self._values), self.length
        return other

    def _parts_and_values(self) -> list[tuple[CacheTensor, Array | Tensor]]:
        return [(part, self._values[part.past]) for part in self._parts]
