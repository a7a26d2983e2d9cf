"""The single-file form of a package: a ZIP that any tool can read, of which exactly one byte sequence is valid.

Members are stored, not compressed, in manifest order, with a fixed date, and padded (in the extra field of their local
header) so that their data begin on a page: weights are mapped straight out of the archive. The reader takes no header
at its word: it lays the archive out anew from names, sizes and checksums, and refuses it unless every byte outside the
data is the same. So traversal, links, overlaps, compression bombs and stray bytes all fail one comparison.
Format: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 (structure), 4.5.3 (ZIP64); 0xD935 is the alignment field of Android.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from optimizer.errors import PackageError
from optimizer.package.manifest import MAX_FILES
from optimizer.package.pieces import write_in_pieces

DATA_ALIGNMENT = 4096

_MAX_MEMBERS = MAX_FILES + 2
_MAX_NAME_BYTES = 128
_BIG = 0xFFFFFFFF
_VERSION = 45
_DATE = (1 << 5) | 1
"""1 January 1980, the first day that ZIP can express."""
_REGULAR_FILE = 0o100644 << 16
_UNIX = 3 << 8
_ALIGNMENT_FIELD = 0xD935
_CHUNK_BYTES = 1 << 20

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<IIQI")


@dataclass(frozen=True)
class Member:
    """A file in the archive: its size in bytes and the CRC-32 of its data."""

    name: str
    bytes: int
    crc: int


@dataclass(frozen=True)
class Layout:
    """Where everything lies: (offset, header) and data offset per member, and the directory that follows the data."""

    headers: tuple[tuple[int, bytes], ...]
    data_offsets: tuple[int, ...]
    directory_offset: int
    directory: bytes


def lay_out(members: Sequence[Member]) -> Layout:
    """Return the one valid layout of `members` in this order."""
    headers: list[tuple[int, bytes]] = []
    data_offsets: list[int] = []
    entries = bytearray()
    position = 0
    for member in members:
        header = _local_header(member, position)
        headers.append((position, header))
        data_offsets.append(position + len(header))
        entries += _central_entry(member, position)
        position += len(header) + member.bytes
    directory = bytes(entries) + _end_records(len(members), len(entries), position)
    return Layout(tuple(headers), tuple(data_offsets), position, directory)


def _local_header(member: Member, position: int) -> bytes:
    name = member.name.encode("ascii")
    sizes, big = _sizes(member)
    extra = struct.pack("<HHQQ", 1, 16, member.bytes, member.bytes) if big else b""
    unpadded = position + _LOCAL.size + len(name) + len(extra) + 6
    padding = -unpadded % DATA_ALIGNMENT
    extra += struct.pack("<HHH", _ALIGNMENT_FIELD, 2 + padding, DATA_ALIGNMENT) + bytes(padding)
    fixed = _LOCAL.pack(0x04034B50, _VERSION, 0, 0, 0, _DATE, member.crc, *sizes, len(name), len(extra))
    return fixed + name + extra


def _sizes(member: Member) -> tuple[tuple[int, int], bool]:
    """Return the two 32-bit size fields, and whether the true sizes go into a ZIP64 field."""
    big = member.bytes >= _BIG
    size = _BIG if big else member.bytes
    return (size, size), big


def _central_entry(member: Member, position: int) -> bytes:
    name = member.name.encode("ascii")
    sizes, big = _sizes(member)
    values = ([member.bytes, member.bytes] if big else []) + ([position] if position >= _BIG else [])
    extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    version = _UNIX | _VERSION
    fixed = (0x02014B50, version, _VERSION, 0, 0, 0, _DATE, member.crc, *sizes, len(name), len(extra), 0, 0, 0)
    return _CENTRAL.pack(*fixed, _REGULAR_FILE, min(position, _BIG)) + name + extra


def _end_records(count: int, entries_bytes: int, position: int) -> bytes:
    end = _END.pack(0x06054B50, 0, 0, count, count, entries_bytes, min(position, _BIG), 0)
    if position < _BIG:
        return end
    version = _UNIX | _VERSION
    end64 = _END64.pack(0x06064B50, 44, version, _VERSION, 0, 0, count, count, entries_bytes, position)
    return end64 + _LOCATOR64.pack(0x07064B50, 0, position + entries_bytes, 1) + end


def write_archive(path: Path, files: Sequence[tuple[str, Path]]) -> None:
    """Write the archive of `files` (name in the archive, where to read it) to `path`, which must not exist."""
    layout = lay_out([Member(name, source.stat().st_size, _crc(source)) for name, source in files])

    def parts() -> Iterator[bytes]:
        for (_, header), (_, source) in zip(layout.headers, files, strict=True):
            yield header
            yield from _chunks(source)
        yield layout.directory

    with path.open("xb") as archive:
        write_in_pieces(archive, parts())


def _crc(path: Path) -> int:
    crc = 0
    for chunk in _chunks(path):
        crc = zlib.crc32(chunk, crc)
    return crc


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            yield chunk


def read_members(archive: BinaryIO, what: str) -> dict[str, tuple[int, int]]:
    """Return name -> (offset, bytes) of each member; raises PackageError unless the layout is the one valid one."""
    try:
        members = _read_directory(archive)
        layout = lay_out(members)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise _invalid(what) from error
    pieces = [*layout.headers, (layout.directory_offset, layout.directory)]
    if archive.seek(0, os.SEEK_END) != layout.directory_offset + len(layout.directory):
        raise _invalid(what)
    for offset, expected in pieces:
        archive.seek(offset)
        if archive.read(len(expected)) != expected:
            raise _invalid(what)
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        raise _invalid(what)
    return {member.name: (offset, member.bytes) for member, offset in zip(members, layout.data_offsets, strict=True)}


def _invalid(what: str) -> PackageError:
    if what.endswith(".onnx"):
        return PackageError(f"{what} is a model, not a package; compile it first: python -m optimizer compile {what}")
    return PackageError(f"{what} is not a package archive, or was altered; copy or build it again")


def _read_directory(archive: BinaryIO) -> list[Member]:
    """Return what the central directory claims; offsets are ignored, they follow from the order."""
    largest = _MAX_MEMBERS * (_CENTRAL.size + _MAX_NAME_BYTES + 28) + _END64.size + _LOCATOR64.size + _END.size
    total = archive.seek(0, os.SEEK_END)
    archive.seek(max(0, total - largest))
    tail = archive.read(largest)
    *_, count, entries_bytes, position, _comment = _END.unpack(tail[-_END.size :])
    trailer = _END.size + (_END64.size + _LOCATOR64.size if position == _BIG else 0)
    start = len(tail) - trailer - entries_bytes
    if start < 0 or count > _MAX_MEMBERS:
        raise IndexError("the directory is larger than any package's")
    members: list[Member] = []
    for _ in range(count):
        fields = _CENTRAL.unpack_from(tail, start)
        crc, size, name_bytes, extra_bytes = fields[7], fields[9], fields[10], fields[11]
        name_start = start + _CENTRAL.size
        extra_start = name_start + name_bytes
        if name_bytes > _MAX_NAME_BYTES:
            raise IndexError("a name is longer than any package's")
        if size == _BIG:
            (size,) = struct.unpack_from("<Q", tail, extra_start + 4)
        members.append(Member(tail[name_start:extra_start].decode("ascii"), size, crc))
        start = extra_start + extra_bytes
    return members
