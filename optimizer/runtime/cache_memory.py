"""One piece of memory for all buffers of a cache, in Linux's huge pages once they are worth their memory.

A step of a decoder reads of each head as many bytes as there are tokens, which lie in thousands of pages of 4 KiB: more
than a core keeps addresses of. Buffers of one head are smaller than a page of 2 MiB, so all of them share the pages.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from optimizer.errors import InsufficientMemoryError
from optimizer.package.dtypes import ITEM_BYTES
from optimizer.package.manifest import WEIGHT_ALIGNMENT
from optimizer.package.pieces import PIECE_BYTES
from optimizer.runtime.tensors import Tensor, wrap_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

Place = tuple[tuple[int, ...], str]
"""The shape and dtype of a buffer."""

_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python's mmap does not name


class CacheMemory:
    """Memory of the CPU for buffers that are taken from it one after the other; Linux gives it as it is written to."""

    def __init__(self, size: int) -> None:
        """Reserve `size` bytes, or more where they begin and end; raises InsufficientMemoryError without as many."""
        # Linux has other rules, and seldom huge pages, for memory that may be shared, as mmap's is by default.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._memory = mmap.mmap(-1, size + PIECE_BYTES, flags=private)
        except (OSError, OverflowError, ValueError) as error:
            raise InsufficientMemoryError(
                f"there is too little memory for {size} bytes; reserve fewer tokens, or free memory"
            ) from error
        room: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)
        self._begin: int = -room.ctypes.data % PIECE_BYTES
        self._room = room[self._begin :]
        self._size, self._used = size, 0
        self.is_large = False

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return a tensor over the next part of the memory, all zeros."""
        size = math.prod(shape) * ITEM_BYTES[dtype]
        begin = self._used
        self._used += _whole_lines(size)
        return wrap_bytes(self._room[begin : begin + size], dtype, shape)

    def use_large_pages(self, *, written: bool) -> None:
        """Have what is `written` moved to huge pages, and what will be written; without such nothing changes.

        The end that fills no page stays in ordinary ones.
        """
        self.is_large = True
        whole = self._size // PIECE_BYTES * PIECE_BYTES
        advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
        if not whole or advice is None:
            return
        with suppress(OSError):  # a kernel without them, or none that are free
            self._memory.madvise(advice, self._begin, whole)
            if written:
                self._memory.madvise(_COLLAPSE, self._begin, whole)


def bytes_of(places: Sequence[Place]) -> int:
    """Return how much memory buffers take."""
    return sum(_whole_lines(math.prod(shape) * ITEM_BYTES[dtype]) for shape, dtype in places)


def _whole_lines(size: int) -> int:
    return -(-size // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
