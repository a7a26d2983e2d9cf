"""What is asked of compiled libraries: their machine and the bytes behind an exported symbol (64-bit ELF)."""

from __future__ import annotations

import struct
from typing import NamedTuple

_MACHINES = {62: "x86_64", 183: "aarch64"}
_LOADABLE_SEGMENT = 1
_DYNAMIC_SYMBOLS_SECTION = 11


class _Section(NamedTuple):
    kind: int
    offset: int
    size: int
    link: int


class ElfFile:
    """A 64-bit little-endian ELF file in memory; raises ValueError when it is anything else."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        self._data = data
        try:
            (machine,) = struct.unpack_from("<H", data, 18)
            segments_offset, sections_offset = struct.unpack_from("<QQ", data, 32)
            segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", data, 54)
            self._segments = [
                struct.unpack_from("<IIQQQQ", data, segments_offset + index * segment_size)
                for index in range(segment_count)
            ]
            self._sections = [self._section(sections_offset + index * section_size) for index in range(section_count)]
        except struct.error as error:
            raise ValueError("an ELF file is cut short") from error
        self.architecture = _MACHINES.get(machine, f"machine {machine}")

    def _section(self, offset: int) -> _Section:
        _, kind, _, _, file_offset, size, link = struct.unpack_from("<IIQQQQI", self._data, offset)
        return _Section(kind, file_offset, size, link)

    def data_of_symbol(self, name: str) -> bytes | None:
        """Return the file's bytes from an exported symbol to the end of its segment, None without that symbol."""
        address = self._address_of(name.encode())
        if address is None:
            return None
        for kind, _, offset, segment_address, _, size in self._segments:
            if kind == _LOADABLE_SEGMENT and segment_address <= address < segment_address + size:
                return self._data[offset + address - segment_address : offset + size]
        raise ValueError(f"symbol '{name}' lies outside the file")

    def _address_of(self, name: bytes) -> int | None:
        for section in self._sections:
            if section.kind != _DYNAMIC_SYMBOLS_SECTION:
                continue
            names = self._sections[section.link]
            for offset in range(section.offset, section.offset + section.size, 24):
                name_offset, _, _, _, address = struct.unpack_from("<IBBHQ", self._data, offset)
                start = names.offset + name_offset
                if address and self._data[start : start + len(name) + 1] == name + b"\0":
                    return address
        return None
