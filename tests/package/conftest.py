"""A manifest without files, and packages that no machine could run: the format does not look into the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from optimizer.package.entry_points import EntryPoint, SymbolRange, TensorSpec
from optimizer.package.manifest import Library, Manifest
from optimizer.package.writer import Weight, write_package
from tests.manifests import draft_manifest

WritePackage = Callable[..., Path]


@pytest.fixture(scope="session")
def draft() -> Manifest:
    """A manifest as the compiler hands it to the writer."""
    main = EntryPoint(
        "main",
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("past_key_values.0.key", "float16", ("batch", 2, "past", 8)),
        ),
        outputs=(TensorSpec("present.0.key", "float16", ("batch", 2, "past + sequence", 8)),),
        symbols=(SymbolRange("batch", 1, 1), SymbolRange("sequence", 1, 512), SymbolRange("past", 0, None)),
    )
    return draft_manifest(
        [main],
        target="x86-avx512",
        architecture="x86_64",
        cpu_features=("avx512f", "avx512_vnni"),
        glibc="2.28",
        libraries=(Library("tvm_runtime", "0.27.0.post1"), Library("tvm_ffi", "0.1.14.post1")),
    )


WEIGHTS = (
    Weight("embedding", np.arange(64 * 32, dtype=np.float32).reshape(64, 32)),
    Weight("scale", np.array(0.5, ml_dtypes.bfloat16)),
    Weight("empty", np.zeros((0, 3), np.int8)),
    Weight("mask", np.array([True, False, True])),
    Weight("big_endian", np.arange(3, dtype=">i4")),
)


@pytest.fixture
def write(tmp_path: Path, draft: Manifest) -> WritePackage:
    """Write a package of the given name into the test's folder."""
    library = tmp_path / "compiled.so"
    library.write_bytes(b"\x7fELF" + bytes(range(256)) * 4)

    def write_to(
        name: str, manifest: Manifest = draft, extra_files: Mapping[str, bytes] | None = None, **options: object
    ) -> Path:
        write_package(tmp_path / name, manifest, library, WEIGHTS, extra_files=extra_files, **options)
        return tmp_path / name

    return write_to
