"""Digests by pieces: the same for any number of threads, and a change of any piece is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimizer.errors import PackageError
from optimizer.package.digests import DIGESTED_BYTES, digesting, digests_of, piece_count
from optimizer.package.reader import FileLocation, open_package

WritePackage = Callable[..., Path]
# Of no bytes, as BLAKE3's own test vectors have it.
EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
SIZES = (0, 1, 4097, DIGESTED_BYTES - 1, DIGESTED_BYTES, DIGESTED_BYTES + 1, 3 * DIGESTED_BYTES + 7)


def content(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@given(st.sampled_from(SIZES), st.sampled_from([0, 1, 4096]), st.integers(1, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_digests_are_those_of_each_piece(tmp_path: Path, size: int, before: int, threads: int) -> None:
    path = tmp_path / "file"
    data = content(size)
    path.write_bytes(bytes(before) + data + b"behind")
    location = FileLocation(path, before, size)
    with digesting(threads) as pool:
        found, in_place = list(location.digests(pool)), list(location.digests(pool, in_place=True))
    pieces = [data[start : start + DIGESTED_BYTES] for start in range(0, max(size, 1), DIGESTED_BYTES)]
    assert found == in_place == [blake3(piece).hexdigest() for piece in pieces]
    assert len(found) == piece_count(size)


def test_a_file_that_ends_early_has_the_digests_of_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(DIGESTED_BYTES + 5))
    with digesting(1) as pool:
        found = list(digests_of(lambda: path.open("rb"), 3 * DIGESTED_BYTES, pool))
    assert found[0] == blake3(content(DIGESTED_BYTES)).hexdigest()
    assert found[1] not in (found[0], EMPTY)
    assert found[2] == EMPTY


def test_an_error_of_one_piece_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), digesting(2) as pool:
        list(FileLocation(tmp_path / "none", 0, 2 * DIGESTED_BYTES).digests(pool))


@pytest.mark.parametrize("name", ["folder", "file.opt"])
@pytest.mark.parametrize("place", [0, DIGESTED_BYTES - 1, DIGESTED_BYTES, 2 * DIGESTED_BYTES + 2])
def test_a_changed_byte_of_any_piece_is_found(write: WritePackage, name: str, place: int) -> None:
    path = write(name, extra_files={"large": content(2 * DIGESTED_BYTES + 3)})
    package = open_package(path)
    package.verify()
    location = package.locations["large"]
    with location.path.open("r+b") as stream:
        stream.seek(location.offset + place)
        byte = stream.read(1)[0]
        stream.seek(location.offset + place)
        stream.write(bytes([byte ^ 0x10]))
    for threads in (1, 3):
        with pytest.raises(PackageError, match="large was altered"):
            package.verify(threads, in_place=[] if threads == 1 else ["large"])


def test_exchanged_pieces_are_found(write: WritePackage) -> None:
    large = content(2 * DIGESTED_BYTES)
    path = write("folder", extra_files={"large": large})
    package = open_package(path)
    (path / "large").write_bytes(large[DIGESTED_BYTES:] + large[:DIGESTED_BYTES])
    with pytest.raises(PackageError, match="large was altered"):
        package.verify()


def test_a_file_that_was_truncated_after_opening_is_found(write: WritePackage) -> None:
    path = write("folder", extra_files={"large": content(DIGESTED_BYTES + 9)})
    package = open_package(path)
    (path / "large").write_bytes(content(DIGESTED_BYTES))
    with pytest.raises(PackageError, match="large was altered"):
        package.verify()
