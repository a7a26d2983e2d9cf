"""Opening and verifying: every change of a package is found, and nothing hostile does harm."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimizer.errors import PackageError
from optimizer.package.archive import Member, lay_out, read_members
from optimizer.package.manifest import Manifest
from optimizer.package.reader import digest_line, open_package, verify_package

WritePackage = Callable[..., Path]
FORMS = pytest.mark.parametrize("name", ["folder", "file.opt"])
RELAXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


@FORMS
def test_manifest_and_files_come_back(write: WritePackage, name: str) -> None:
    path = write(name, extra_files={"NOTICE": b"thanks"})
    package = open_package(path)
    assert verify_package(path) == package.manifest
    assert package.locations["NOTICE"].read() == b"thanks"
    assert [record.name for record in package.manifest.files] == ["model.so", "weights.bin", "NOTICE"]


@RELAXED
@given(data=st.data(), change=st.integers(1, 255))
@FORMS
def test_any_changed_byte_of_any_file_is_found(
    write: WritePackage, tmp_path: Path, name: str, data: st.DataObject, change: int
) -> None:
    path = tmp_path / name
    if not path.exists():
        write(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    victim = data.draw(st.sampled_from(files))
    original = victim.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= change
    victim.write_bytes(changed)
    try:
        with pytest.raises(PackageError):
            verify_package(path)
    finally:
        victim.write_bytes(original)


@RELAXED
@given(data=st.data())
@FORMS
def test_truncated_and_extended_files_are_found(
    write: WritePackage, tmp_path: Path, name: str, data: st.DataObject
) -> None:
    path = tmp_path / name
    if not path.exists():
        write(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    victim = data.draw(st.sampled_from(files))
    original = victim.read_bytes()
    altered = data.draw(
        st.integers(0, len(original) - 1).map(lambda end: original[:end])
        | st.binary(min_size=1, max_size=80).map(lambda tail: original + tail)
    )
    victim.write_bytes(altered)
    try:
        with pytest.raises(PackageError):
            open_package(path)
    finally:
        victim.write_bytes(original)


def test_missing_package_and_missing_file_are_told_apart(write: WritePackage, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="there is no package at"):
        open_package(tmp_path / "nothing")
    path = write("folder")
    (path / "model.so").unlink()
    with pytest.raises(PackageError, match=r"lacks model\.so"):
        open_package(path)


def test_path_that_the_system_refuses_is_a_package_error() -> None:
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(PackageError):
            open_package(path)


def test_file_that_the_manifest_does_not_list_is_refused(write: WritePackage) -> None:
    path = write("folder")
    (path / "extra").write_bytes(b"")
    with pytest.raises(PackageError, match="'extra', which its manifest does not list"):
        open_package(path)


def test_links_folders_and_pipes_in_the_folder_are_refused(write: WritePackage, tmp_path: Path) -> None:
    for place in (lambda path: path.symlink_to(tmp_path / "compiled.so"), Path.mkdir, os.mkfifo):
        path = write("folder")
        (path / "model.so").unlink()
        place(path / "model.so")
        with pytest.raises(PackageError, match=r"'model\.so', which is not a regular file"):
            open_package(path)
        shutil.rmtree(path)


def test_a_pipe_in_place_of_the_package_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.opt")
    with pytest.raises(PackageError, match="not a regular file"):
        open_package(tmp_path / "pipe.opt")


def test_link_to_a_package_is_followed(write: WritePackage, tmp_path: Path) -> None:
    for name in ("folder", "file.opt"):
        (tmp_path / f"link-{name}").symlink_to(write(name))
        verify_package(tmp_path / f"link-{name}")


def test_oversize_manifest_is_refused_unread(write: WritePackage) -> None:
    path = write("folder")
    with (path / "manifest.json").open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(PackageError, match="over the limit"):
        open_package(path)


def test_altered_manifest_with_matching_digest_still_fails_on_hashes(write: WritePackage) -> None:
    path = write("folder")
    manifest = path / "manifest.json"
    text = manifest.read_bytes().replace(open_package(path).manifest.files[0].blake3[0].encode(), b"0" * 64)
    manifest.write_bytes(text)
    (path / "manifest.sha256").write_bytes(digest_line(text))
    with pytest.raises(PackageError, match=r"model\.so was altered"):
        verify_package(path)


def _members(draft: Manifest) -> dict[str, bytes]:
    text = draft.to_json()
    return {"manifest.json": text, "manifest.sha256": digest_line(text)}


def _link(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("model.so")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")


@pytest.mark.parametrize(
    "add",
    [
        lambda archive: archive.writestr("../../escape", b"x"),
        lambda archive: archive.writestr("weights.bin", bytes(1 << 22), compress_type=zipfile.ZIP_DEFLATED),
        lambda archive: archive.writestr("manifest.json", b"{}"),
        lambda archive: [archive.writestr(f"file{index}", b"") for index in range(1000)],
        lambda archive: setattr(archive, "comment", b"hello"),
        _link,
    ],
    ids=["traversal", "compressed", "duplicate", "many members", "comment", "link"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_of_other_tools_are_refused(
    draft: Manifest, tmp_path: Path, add: Callable[[zipfile.ZipFile], object]
) -> None:
    path = tmp_path / "hostile.opt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in _members(draft).items():
            archive.writestr(name, content)
        add(archive)
    with pytest.raises(PackageError, match="not a package archive"):
        open_package(path)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_no_archive(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "arbitrary.opt"
    path.write_bytes(content)
    with pytest.raises(PackageError):
        open_package(path)


def test_declared_sizes_beyond_the_file_are_refused(write: WritePackage) -> None:
    path = write("file.opt")
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF):
        struct.pack_into("<II", content, central + 20, size, size)
        path.write_bytes(content)
        with pytest.raises(PackageError, match="not a package archive"):
            open_package(path)


def test_archive_over_four_gibibytes_reads_back_and_suits_other_tools(tmp_path: Path) -> None:
    members = [Member("small", 10, 0), Member("large", 5 << 30, 0), Member("last", 7, 0)]
    layout = lay_out(members)
    path = tmp_path / "large.opt"
    with path.open("wb") as archive:
        for offset, header in layout.headers:
            archive.seek(offset)
            archive.write(header)
        archive.seek(layout.directory_offset)
        archive.write(layout.directory)
    with path.open("rb") as archive:
        found = read_members(archive, "large.opt")
    assert found == {
        member.name: (offset, member.bytes) for member, offset in zip(members, layout.data_offsets, strict=True)
    }
    with zipfile.ZipFile(path) as archive:
        assert [(info.filename, info.file_size) for info in archive.infolist()] == [
            (member.name, member.bytes) for member in members
        ]
        assert archive.getinfo("last").header_offset == layout.headers[2][0]
