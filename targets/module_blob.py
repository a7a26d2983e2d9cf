"""The data that TVM puts into a compiled library: the tree of imported modules, in `__tvm_ffi__library_bin`.

Layout, all integers little-endian 64-bit: the number of bytes that follow; two lists of integers (row pointers and
children of the import tree), each with its length in front; then, in order, each module's kind as a string (length,
bytes) and, unless that is "_lib" (the library's own code), its contents as a string. A CUDA module's contents are
the format of its code as a string, its functions, and the code as a string.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

LIBRARY_KIND = "_lib"


@dataclass(frozen=True)
class ImportedModule:
    """One entry of the import tree: its kind, and its contents (empty for the library's own code)."""

    kind: str
    contents: bytes


@dataclass(frozen=True)
class ModuleBlob:
    """The import tree's shape, kept as the bytes that it is, and its modules."""

    tree: bytes
    modules: tuple[ImportedModule, ...]

    @classmethod
    def parse(cls, data: bytes) -> ModuleBlob:
        """Read a blob (which may have anything after it); raises ValueError when it is not one."""
        try:
            (size,) = struct.unpack_from("<Q", data)
            body = data[8 : 8 + size]
            if len(body) != size:
                raise ValueError("the module tree is cut short")
            (rows,) = struct.unpack_from("<Q", body)
            (children,) = struct.unpack_from("<Q", body, 8 * (1 + rows))
            offset = 8 * (2 + rows + children)
            tree = body[:offset]
            modules: list[ImportedModule] = []
            for _ in range(rows - 1):
                kind, offset = read_string(body, offset)
                contents = b""
                if kind != LIBRARY_KIND.encode():
                    contents, offset = read_string(body, offset)
                modules.append(ImportedModule(kind.decode(), contents))
        except (struct.error, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"not a tree of TVM modules: {error}") from error
        return cls(tree, tuple(modules))

    def serialize(self) -> bytes:
        """Return the bytes that `parse` reads."""
        body = bytearray(self.tree)
        for module in self.modules:
            body += write_string(module.kind.encode())
            if module.kind != LIBRARY_KIND:
                body += write_string(module.contents)
        return struct.pack("<Q", len(body)) + bytes(body)


def read_string(data: bytes, offset: int) -> tuple[bytes, int]:
    """Return the length-prefixed string at `offset` and the offset after it; raises ValueError when cut short."""
    (size,) = struct.unpack_from("<Q", data, offset)
    end = offset + 8 + size
    if end > len(data):
        raise ValueError("the module tree is cut short")
    return data[offset + 8 : end], end


def write_string(data: bytes) -> bytes:
    """Return the bytes with their length in front."""
    return struct.pack("<Q", len(data)) + data
