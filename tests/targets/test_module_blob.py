"""The module tree in compiled libraries is read and written without loss, and damage is noticed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets.device_code import fat_binary_entries
from targets.elf import ElfFile
from targets.module_blob import ImportedModule, ModuleBlob, write_string


def blob_of(modules: list[ImportedModule]) -> ModuleBlob:
    rows = struct.pack(f"<Q{len(modules) + 1}Q", len(modules) + 1, *[0] * (len(modules) + 1))
    return ModuleBlob(rows + struct.pack("<Q", 0), tuple(modules))


MODULES = st.lists(
    st.one_of(
        st.just(ImportedModule("_lib", b"")),
        st.builds(ImportedModule, st.sampled_from(["cuda", "relax.VMExecutable"]), st.binary(max_size=40)),
    ),
    max_size=4,
)


@given(MODULES, st.binary(max_size=16))
def test_parsing_what_was_serialized_gives_it_back(modules, following: bytes):
    blob = blob_of(modules)
    assert ModuleBlob.parse(blob.serialize() + following) == blob


@given(MODULES, st.data())
def test_cut_blob_is_refused(modules, data):
    serialized = blob_of(modules).serialize()
    length = data.draw(st.integers(0, len(serialized) - 1))
    with pytest.raises(ValueError, match=r"cut short|not a tree"):
        ModuleBlob.parse(serialized[:length])


def test_contents_longer_than_the_blob_are_refused():
    blob = blob_of([ImportedModule("cuda", b"")])
    body = blob.tree + write_string(b"cuda") + struct.pack("<Q", 1 << 40)
    with pytest.raises(ValueError, match="cut short"):
        ModuleBlob.parse(struct.pack("<Q", len(body)) + body)


@pytest.mark.parametrize("data", [b"", b"\x50\xed\x55\xba", b"\0" * 64])
def test_malformed_fat_binary_is_refused(data: bytes):
    with pytest.raises(ValueError, match="fat binary"):
        list(fat_binary_entries(data))


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x01\x01" + bytes(60), b"\x7fELF\x02\x01" + b"\xff" * 20])
def test_malformed_elf_file_is_refused(data: bytes):
    with pytest.raises(ValueError, match="ELF"):
        ElfFile(data)
