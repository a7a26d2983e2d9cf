"""Arrays at addresses that kernels read without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimizer.package.manifest import WEIGHT_ALIGNMENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.generic]


def aligned_copy(array: Array) -> Array:
    """Return a contiguous copy of an array that begins on a boundary of 64 bytes."""
    storage = np.empty(array.nbytes + WEIGHT_ALIGNMENT, np.uint8)
    start = -storage.ctypes.data % WEIGHT_ALIGNMENT
    copy = storage[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
