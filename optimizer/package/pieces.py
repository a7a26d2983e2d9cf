"""Files written in pieces as large as a huge page, so that the operating system may map them by huge pages.

A token of a decoder reads all weights once, and through pages of 4 KiB it also walks the page tables for each of them.
Linux keeps a file's content in memory in blocks as large as the writes were (ext4 since 6.16, XFS since 5.18), and
maps a block of a huge page's size as one.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from typing import BinaryIO

PIECE_BYTES = 2 << 20
"""A huge page of x86, and of Arm where pages have 4 KiB."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14 and newer, which Python has no name for."""


def write_in_pieces(stream: BinaryIO, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` one after another from the stream's first byte on, by writes of whole aligned pieces."""
    piece = bytearray()
    for part in parts:
        rest = memoryview(part)
        while rest:
            fitting = PIECE_BYTES - len(piece)
            piece += rest[:fitting]
            rest = rest[fitting:]
            if len(piece) == PIECE_BYTES:
                stream.write(piece)
                piece.clear()
    stream.write(piece)


def ask_for_huge_pages(mapping: mmap.mmap) -> None:
    """Have the system read the mapped file in blocks of huge pages, where it knows them and has not read it yet.

    Memory that is no file's comes in huge pages as it is written to.
    """
    advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    try:
        mapping.madvise(advice)
    except OSError:  # a kernel without them
        return


def bring_in(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Have the system map the pages of these bytes at once, where it knows how to; else each when it is read."""
    first = begin - begin % mmap.PAGESIZE
    with contextlib.suppress(OSError):
        mapping.madvise(_POPULATE_READ, first, end - first)
