"""Write a package so that it appears complete or not at all, and the same content gives the same bytes."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.errors import PackageError
from optimizer.package.archive import DATA_ALIGNMENT, write_archive
from optimizer.package.digests import digesting
from optimizer.package.dtypes import ITEM_BYTES
from optimizer.package.entry_points import MANIFEST_NAME
from optimizer.package.manifest import (
    DIGEST_NAME,
    MAX_MANIFEST_BYTES,
    WEIGHT_ALIGNMENT,
    Certificate,
    FileRecord,
    Manifest,
    WeightRecord,
    require_file_name,
)
from optimizer.package.pieces import write_in_pieces
from optimizer.package.reader import FileLocation, digest_line, is_package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SINGLE_FILE_SUFFIX = ".opt"


@dataclass(frozen=True)
class Weight:
    """A weight tensor by name; any shape, any dtype of `optimizer.package.dtypes` but int4 and uint4."""

    name: str
    array: NDArray[np.generic]


def write_package(
    path: str | os.PathLike[str],
    manifest: Manifest,
    library: Path,
    weights: Iterable[Weight],
    *,
    extra_files: Mapping[str, bytes] | None = None,
    certify: Callable[[Path], Certificate] | None = None,
) -> Manifest:
    """Write a package to `path`: one file if the path ends in ".opt", a folder otherwise; returns the full manifest.

    `manifest` comes without weights, files and certificate. `certify` is called with the folder of the finished but not
    yet published package; the certificate that it returns is recorded, and whatever it raises leaves `path` as it was.
    An existing package at `path` is replaced; anything else there raises PackageError and stays.
    """
    destination = Path(path)
    require_replaceable(destination)
    staging = destination.parent / f".{destination.name}.{secrets.token_hex(8)}.partial"
    folder = staging / "package"
    try:
        with _naming(destination):
            folder.mkdir(parents=True)
            manifest = _fill(folder, manifest, library, weights, extra_files or {})
            _write_manifest(folder, manifest)
        certificate = certify(folder) if certify is not None else None
        with _naming(destination):
            manifest = dataclasses.replace(manifest, certificate=certificate)
            _write_manifest(folder, manifest)
            finished = folder
            if destination.suffix == SINGLE_FILE_SUFFIX:
                finished = staging / "package.opt"
                names = (MANIFEST_NAME, DIGEST_NAME, *(record.name for record in manifest.files))
                write_archive(finished, [(name, folder / name) for name in names])
            _publish(finished, destination, staging / "replaced")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


@contextmanager
def _naming(destination: Path) -> Iterator[None]:
    """Turn an operating-system error of the body into a PackageError that says which package was being written."""
    try:
        yield
    except OSError as error:
        raise PackageError(f"the package cannot be written to {destination}: {error}") from error


def require_replaceable(destination: Path) -> None:
    """Raise PackageError if a package cannot be written here: no such folder, or something else stands there."""
    if destination.suffix == SINGLE_FILE_SUFFIX and destination.is_dir():
        raise PackageError(f"{destination} is a folder, but '.opt' asks for a single file; choose another output path")
    if os.path.lexists(destination) and not is_package(destination):
        raise PackageError(f"{destination} exists and is not a package; choose another output path or remove it")
    if not destination.parent.is_dir():
        raise PackageError(f"the folder {destination.parent} does not exist; create it first")


def _fill(
    folder: Path, manifest: Manifest, library: Path, weights: Iterable[Weight], extra_files: Mapping[str, bytes]
) -> Manifest:
    """Write all files but the manifest, and return the manifest with weights and files recorded."""
    shutil.copyfile(library, folder / manifest.library)
    records = _write_weights(folder / manifest.weights_file, weights)
    names = [manifest.library, manifest.weights_file]
    for name, content in sorted(extra_files.items()):
        require_file_name(name)
        if name in names:
            raise PackageError(f"the extra file {name} has the name of another file of the package; rename it")
        (folder / name).write_bytes(content)
        names.append(name)
    return dataclasses.replace(manifest, weights=records, files=tuple(_record(folder / name) for name in names))


def _record(path: Path) -> FileRecord:
    size = path.stat().st_size
    with digesting() as pool:
        return FileRecord(path.name, size, tuple(FileLocation(path, 0, size).digests(pool)))


def _write_weights(path: Path, weights: Iterable[Weight]) -> tuple[WeightRecord, ...]:
    """Write the tensors one after another, those of a page and more on page boundaries."""
    import numpy as np  # noqa: PLC0415 - who loads a package has it imported while files are digested

    records: list[WeightRecord] = []

    def parts() -> Iterator[bytes | memoryview]:
        end = 0
        for weight in weights:
            array = np.ascontiguousarray(weight.array).reshape(weight.array.shape)
            if array.dtype.name not in ITEM_BYTES or array.dtype.name in ("int4", "uint4"):
                raise PackageError(f"weight '{weight.name}' has dtype {array.dtype}: pack or convert it first")
            if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
                array = array.astype(array.dtype.newbyteorder("<"))
            alignment = DATA_ALIGNMENT if array.nbytes >= DATA_ALIGNMENT else WEIGHT_ALIGNMENT
            offset = end + -end % alignment
            yield bytes(offset - end)
            yield array.reshape(-1).view(np.uint8).data
            end = offset + array.nbytes
            records.append(WeightRecord(weight.name, array.dtype.name, array.shape, offset, array.nbytes))

    with path.open("xb") as stream:
        write_in_pieces(stream, parts())
    return tuple(records)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    text = manifest.to_json()
    if len(text) > MAX_MANIFEST_BYTES:
        raise PackageError(f"the manifest would have {len(text)} bytes, over the limit of {MAX_MANIFEST_BYTES}")
    (folder / MANIFEST_NAME).write_bytes(text)
    (folder / DIGEST_NAME).write_bytes(digest_line(text))


def _publish(finished: Path, destination: Path, replaced: Path) -> None:
    """Rename `finished` to `destination`; a folder that stands there moves to `replaced`, and back if that fails."""
    if not destination.is_dir():
        finished.replace(destination)
        return
    destination.rename(replaced)
    try:
        finished.rename(destination)
    except OSError:
        replaced.rename(destination)
        raise
