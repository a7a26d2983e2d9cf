"""Caches of a function, as the pass that makes buffers of them notes them, and what it makes them of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm.ir
from tvm import relax, tirx

from schedules.cache_pages import CachePages

FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The float types of caches, by the names that the command line has for them."""
ATTRIBUTE = "kv_caches"
"""The attribute of a rewritten function: the numbers of each `Cache`. The lengths that come after the inputs, and the
capacities, are in the order of the caches, once for each symbol that was a length."""
LENGTHS = "cache_lengths"


@dataclass(frozen=True)
class Cache:
    """A cache of a function: which input it was and which of the outputs, and the axis that tokens lie along.

    One of a sliding window is a ring: token t lies at t modulo the buffer's size, which is at least the `window` and
    the tokens of a step, less one. A quantized one has `pages`. Its codes take the place of the input; its scales and
    recent tokens come after all inputs, in the order of the caches. Where input and output hold the newest tokens
    alone, `counted_by` is the input, and the axis of it, whose size is the number of all tokens after a step.
    """

    parameter: int
    output: int
    axis: int
    pages: CachePages | None = None
    window: int = 0
    counted_by: tuple[int, int] | None = None

    def record(self) -> list[int]:
        """Return the numbers that `caches_of` reads."""
        layout = (0, 0) if self.pages is None else (self.pages.bits, int(self.pages.by_channel))
        return [self.parameter, self.output, self.axis, self.window, *layout, *(self.counted_by or ())]

    @staticmethod
    def from_record(numbers: Sequence[int]) -> Cache:
        """Return the cache that `record` describes."""
        parameter, output, axis, window, bits, by_channel, *counted_by = (int(number) for number in numbers)
        pages = CachePages(bits, bool(by_channel)) if bits else None
        place = (counted_by[0], counted_by[1]) if counted_by else None
        return Cache(parameter, output, axis, pages, window, place)


@dataclass(frozen=True, eq=False)
class Append:
    """What a cache of `length` tokens is extended by, and what the result of `total` tokens is bound to.

    `past` is the parameter, from which the extended tensor may be cast. With `counts`, new tokens lie in each row
    behind as many. A cache that `is_scattered_to` has room for all tokens from the start, of which `length` and `total`
    are the number, and is written to anywhere; `is_circular` says that what lies beyond the end is at the beginning.
    """

    cache: Cache
    past: relax.Var
    length: tirx.Var
    new: relax.Expr
    counts: relax.Expr | None
    present: relax.Var
    total: tvm.ir.Expr
    is_scattered_to: bool = False
    is_circular: bool = False


def holds_floats(append: Append) -> bool:
    """Return whether the model's cache holds floats, which may be stored otherwise, and not codes of its own."""
    return str(append.past.ty.dtype.dtype) in FLOATS.values()


def caches_of(function: relax.Function) -> tuple[Cache, ...]:
    """Return the caches that this pass made buffers of in a function."""
    attributes = function.attrs
    if attributes is None or ATTRIBUTE not in attributes:
        return ()
    return tuple(Cache.from_record(record) for record in attributes[ATTRIBUTE])
