"""Writing: the same bytes each time, aligned weights, all or nothing."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.errors import CertificateError, PackageError
from optimizer.package.dtypes import numpy_dtype
from optimizer.package.manifest import Certificate, Manifest
from optimizer.package.reader import open_package, verify_package
from optimizer.package.writer import Weight, write_package

WritePackage = Callable[..., Path]
FORMS = pytest.mark.parametrize("name", ["folder", "file.opt"])


def content(path: Path) -> dict[str, bytes]:
    files = path.iterdir() if path.is_dir() else [path]
    return {file.name if path.is_dir() else "": file.read_bytes() for file in files}


@FORMS
def test_same_inputs_give_same_bytes(write: WritePackage, name: str) -> None:
    first = content(write(name))
    assert content(write("again-" + name)) == first


@FORMS
def test_weights_are_aligned_and_have_their_values(write: WritePackage, name: str) -> None:
    package = open_package(write(name))
    location = package.locations["weights.bin"]
    assert location.offset % 4096 == 0
    data = location.read()
    values = {
        weight.name: np.frombuffer(data, numpy_dtype(weight.dtype), np.prod(weight.shape, dtype=int), weight.offset)
        for weight in package.manifest.weights
    }
    np.testing.assert_array_equal(values["embedding"], np.arange(64 * 32))
    np.testing.assert_array_equal(values["big_endian"], [0, 1, 2])
    np.testing.assert_array_equal(values["mask"], [True, False, True])
    assert values["scale"].tolist() == [0.5]
    assert values["empty"].size == 0
    assert package.manifest.weights[0].offset % 4096 == 0
    assert all(weight.offset % 64 == 0 for weight in package.manifest.weights)


def test_single_file_is_a_sound_zip(write: WritePackage) -> None:
    path = write("file.opt")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["manifest.json", "manifest.sha256", "model.so", "weights.bin"]


@FORMS
def test_existing_package_is_replaced(write: WritePackage, tmp_path: Path, name: str) -> None:
    write(name, extra_files={"NOTICE": b"old"})
    path = write(name)
    assert len(verify_package(path).files) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["compiled.so", name])


def test_other_files_and_folders_are_never_replaced(write: WritePackage, tmp_path: Path) -> None:
    (tmp_path / "thesis.opt").write_text("years of work")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "folder.opt").mkdir()
    for name in ("thesis.opt", "photos", "folder.opt"):
        with pytest.raises(PackageError, match="choose another output path"):
            write(name)
    assert (tmp_path / "thesis.opt").read_text() == "years of work"
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_damaged_package_may_be_replaced(write: WritePackage) -> None:
    for name in ("folder", "file.opt"):
        path = write(name)
        victim = path / "model.so" if path.is_dir() else path
        victim.write_bytes(victim.read_bytes()[:-30])
        verify_package(write(name))


def test_missing_output_folder_is_named(write: WritePackage, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=f"the folder {tmp_path / 'none'} does not exist; create it"):
        write("none/package")


@FORMS
def test_failed_certificate_leaves_nothing(write: WritePackage, tmp_path: Path, name: str) -> None:
    def fail(staged: Path) -> Certificate:
        verify_package(staged)
        raise CertificateError("output y differs")

    before = content(write(name))
    with pytest.raises(CertificateError):
        write(name, certify=fail)
    assert content(tmp_path / name) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["compiled.so", name])


def test_certificate_is_recorded(write: WritePackage) -> None:
    certificate = Certificate("onnx", "1.23.2", (0, 1), ({"n": 3}, {"n": 1}), ())
    path = write("file.opt", certify=lambda _: certificate)
    assert verify_package(path).certificate == certificate


def test_four_bit_and_complex_weights_are_refused(draft: Manifest, tmp_path: Path) -> None:
    library = tmp_path / "model.so"
    library.write_bytes(b"code")
    for dtype in (numpy_dtype("int4"), np.dtype("complex64")):
        with pytest.raises(PackageError, match="pack or convert it first"):
            write_package(tmp_path / "p", draft, library, [Weight("w", np.zeros(2, dtype))])
    assert not (tmp_path / "p").exists()
