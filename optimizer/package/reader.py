"""Open, inspect and verify a package without loading its code."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path

from optimizer.errors import PackageError
from optimizer.package.archive import read_members
from optimizer.package.digests import digesting, digests_in, digests_of
from optimizer.package.entry_points import MANIFEST_NAME
from optimizer.package.manifest import DIGEST_NAME, FORMAT, MAX_FILES, MAX_MANIFEST_BYTES, Manifest
from optimizer.package.pieces import ask_for_huge_pages

_DIGEST_LINE_BYTES = 64 + 2 + len(MANIFEST_NAME) + 1


@dataclass(frozen=True)
class FileLocation:
    """A package file's bytes: `path` on disk, from `offset`, `bytes` long."""

    path: Path
    offset: int
    bytes: int

    def open(self) -> BufferedReader:
        """Return the underlying file, positioned at the first byte; refuses links and anything but a regular file."""
        stream = _open_regular(self.path)
        stream.seek(self.offset)
        return stream

    def read(self) -> bytes:
        """Return all of the bytes."""
        with self.open() as stream:
            return stream.read(self.bytes)

    @cached_property
    def mapping(self) -> tuple[mmap.mmap, int]:
        """The file mapped read-only, once and for all, and where in that the bytes begin; they may not be none."""
        skipped = self.offset % mmap.ALLOCATIONGRANULARITY
        with self.open() as stream:
            length, start = skipped + self.bytes, self.offset - skipped
            mapping = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=start)
        ask_for_huge_pages(mapping)
        return mapping, skipped

    def digests(self, pool: ThreadPoolExecutor, *, in_place: bool = False) -> Iterator[str]:
        """Return the BLAKE3 of each piece in hexadecimal, as a `FileRecord` has them; `pool` begins at once.

        Digested `in_place` are the bytes of `mapping`, which is in memory then.
        """
        if in_place and self.bytes:
            return digests_in(*self.mapping, self.bytes, pool)
        return digests_of(self.open, self.bytes, pool)


@dataclass(frozen=True)
class Package:
    """A package whose structure and manifest are sound; the other files are not looked at until `verify`."""

    path: Path
    manifest: Manifest
    locations: Mapping[str, FileLocation]

    def verify(self, threads: int | None = None, *, in_place: Collection[str] = ()) -> None:
        """Raise PackageError unless every file's pieces have the digests that the manifest records.

        They are digested by so many `threads`, by default one for each CPU of this process. Those files that are read
        next where they are mapped are digested `in_place`, so that no page of them is missing then.
        """
        with digesting(threads) as pool:
            found = [
                (record, self.locations[record.name].digests(pool, in_place=record.name in in_place))
                for record in self.manifest.files
            ]
            for record, digests in found:
                if tuple(digests) != record.blake3:
                    raise PackageError(
                        f"{self.path}: {record.name} was altered (its digest differs); copy or build it again"
                    )


def open_package(path: str | os.PathLike[str]) -> Package:
    """Return the package at `path` (a folder or a single file) after checking structure, manifest and file sizes.

    Raises PackageError when it is missing, malformed, of another format version, or holds files not in the manifest.
    """
    location = Path(path)
    try:
        location = Path(os.path.realpath(path))
        if location.is_dir():
            found = _folder_files(location)
        else:
            with _open_regular(location) as archive:
                members = read_members(archive, str(location))
            found = {name: FileLocation(location, offset, size) for name, (offset, size) in members.items()}
        manifest = _read_manifest(location, found)
    except FileNotFoundError as error:
        raise PackageError(f"there is no package at {location}; check the path") from error
    except (OSError, ValueError) as error:
        raise PackageError(f"the package at {location!s:.200} cannot be read: {error}") from error
    recorded = {record.name: record.bytes for record in manifest.files}
    actual = {name: place.bytes for name, place in found.items() if name not in (MANIFEST_NAME, DIGEST_NAME)}
    for name in sorted(recorded.keys() | actual.keys()):
        if name not in actual:
            raise PackageError(f"{location} lacks {name}; copy or build it again")
        if name not in recorded:
            raise PackageError(f"{location} holds {name!r:.200}, which its manifest does not list; remove it")
        if recorded[name] != actual[name]:
            raise PackageError(f"{location}: {name} has {actual[name]} bytes, not {recorded[name]}; copy it again")
    return Package(location, manifest, found)


def verify_package(path: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of the package at `path` if structure and all hashes are right; else raise PackageError."""
    package = open_package(path)
    package.verify()
    return package.manifest


def is_package(path: Path) -> bool:
    """Return whether `path` looks like a package, sound or damaged: something that a new package may replace."""
    try:
        manifest = path / MANIFEST_NAME if path.is_dir() else path
        with _open_regular(manifest) as stream:
            start = stream.read(8192)
    except OSError:
        return False
    return f'"format": "{FORMAT}"'.encode() in start


def _folder_files(folder: Path) -> dict[str, FileLocation]:
    """Return the regular files of the folder; raises PackageError for links, folders and special files."""
    found: dict[str, FileLocation] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise PackageError(f"{folder} holds {entry.name!r:.200}, which is not a regular file; remove it")
            if len(found) > MAX_FILES + 2:
                raise PackageError(f"{folder} holds more files than any package; this is not a package")
            found[entry.name] = FileLocation(folder / entry.name, 0, status.st_size)
    return found


def _open_regular(path: Path) -> BufferedReader:
    """Open `path` for reading; a link, a device or a pipe raises OSError or PackageError instead of blocking."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise PackageError(f"{path} is not a regular file; this is not a package")
    return stream


def _read_manifest(path: Path, found: Mapping[str, FileLocation]) -> Manifest:
    for name in (MANIFEST_NAME, DIGEST_NAME):
        if name not in found:
            raise PackageError(f"{path} holds no {name}; this is not a package")
    if found[MANIFEST_NAME].bytes > MAX_MANIFEST_BYTES:
        raise PackageError(f"{path}: {MANIFEST_NAME} is over the limit of {MAX_MANIFEST_BYTES} bytes")
    text = found[MANIFEST_NAME].read()
    if found[DIGEST_NAME].bytes != _DIGEST_LINE_BYTES or found[DIGEST_NAME].read() != digest_line(text):
        raise PackageError(f"{path}: {MANIFEST_NAME} was altered (its sha256 differs); copy or build it again")
    return Manifest.from_json(text)


def digest_line(manifest_text: bytes) -> bytes:
    """Return the content of manifest.sha256, in the form that `sha256sum --check` reads."""
    return f"{hashlib.sha256(manifest_text).hexdigest()}  {MANIFEST_NAME}\n".encode("ascii")
