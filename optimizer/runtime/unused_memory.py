"""Memory that calls have had, and that the next ones would have again, given back to the system.

TVM keeps the memory of what lies between kernels for the next call of as many rows, and glibc keeps what TVM frees
where something else lies behind it. A long text's rows take more than a step of one token ever does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from optimizer.runtime.library import runtime_function


def give_back_unused() -> None:
    """Give back the memory of the CPU that no tensor has, in a millisecond or two; the next calls ask for it anew."""
    runtime_function("vm.builtin.memory_manager.clear")()
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's function that gives back whole pages; other C libraries have none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
