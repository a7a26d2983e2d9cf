"""Digests of files by pieces, so that several threads digest one file.

All of a decoder's weights are digested before its first token. SHA-256 goes through its bytes one after the other, at
1.7 GB/s on one core of a Granite Rapids; BLAKE3 has lanes for vectors, and makes 6.5. A file has one digest for each
piece, and whoever knows all of them, in order, and its size, knows the file. Each piece is mapped and digested where it
lies: 700 MB take 180 ms of a core, and 235 where they are read into a buffer first. Weights that stay mapped are
digested there, so that the first token finds all of their pages: one by one they take 35 ms of these 700 MB.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader

from blake3 import blake3

from optimizer.package.pieces import bring_in

DIGESTED_BYTES = 4 << 20
"""Bytes that have a digest of their own: so many that threads seldom wait for Python's lock in between."""
_MOST_THREADS = 8
"""As many as keep up with memory."""


def piece_count(size: int) -> int:
    """Return how many digests a file of `size` bytes has; an empty one has that of nothing."""
    return max(1, -(-size // DIGESTED_BYTES))


@contextmanager
def digesting(threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Yield threads for `digests_of`, by default one for each CPU of this process; an error ends them early."""
    count = len(os.sched_getaffinity(0)) if threads is None else threads
    pool = ThreadPoolExecutor(min(count, _MOST_THREADS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def digests_of(opened: Callable[[], BufferedReader], size: int, pool: ThreadPoolExecutor) -> Iterator[str]:
    """Return the BLAKE3 of each piece of a file in hexadecimal, which `pool` begins with at once.

    `opened` returns the file at its first byte. Of a file that ends before `size` bytes, the digests are of what is
    there.
    """
    starts = range(0, max(size, 1), DIGESTED_BYTES)
    return pool.map(lambda start: _digest(opened, start, min(DIGESTED_BYTES, size - start)), starts)


def digests_in(mapping: mmap.mmap, first: int, size: int, pool: ThreadPoolExecutor) -> Iterator[str]:
    """Return the BLAKE3 of each piece of `size` bytes of mapped memory from `first` on, as `digests_of` does."""

    def digest(start: int) -> str:
        begin, end = first + start, first + min(start + DIGESTED_BYTES, size)
        bring_in(mapping, begin, end)
        with memoryview(mapping) as pages, pages[begin:end] as piece:
            return blake3(piece).hexdigest()

    return pool.map(digest, range(0, size, DIGESTED_BYTES))


def _digest(opened: Callable[[], BufferedReader], start: int, size: int) -> str:
    with opened() as stream:
        offset = stream.tell() + start
        found = min(size, os.fstat(stream.fileno()).st_size - offset)
        if found <= 0:
            return blake3().hexdigest()
        skipped = offset % mmap.ALLOCATIONGRANULARITY
        flags, first = mmap.MAP_SHARED | mmap.MAP_POPULATE, offset - skipped
        with (
            mmap.mmap(stream.fileno(), skipped + found, flags=flags, prot=mmap.PROT_READ, offset=first) as mapping,
            memoryview(mapping) as pages,
            pages[skipped:] as piece,
        ):
            return blake3(piece).hexdigest()
