"""Load a package: everything that could speak against it is checked before its code is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from optimizer.errors import IncompatibleMachineError
from optimizer.package.manifest import Requirements
from optimizer.package.reader import Package, open_package
from optimizer.runtime import machine

if TYPE_CHECKING:
    from optimizer.runtime.model import CompiledModel

_BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"
_MANY_PAGES = 256 << 20
"""Bytes: 280 MB give the first token 12 ms earlier, 700 MB 37 (Granite Rapids), 78 MB none. What steps never read, such
as angles of positions that no text reaches, is in memory then, 2 MB of these decoders."""


def load(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    mapped: bool = True,
) -> CompiledModel:
    """Return the model of the package at `path`, ready to be called.

    device: "cpu", "cuda" or "cuda:1"; by default what the package was compiled for. threads: CPU threads of the
    kernels; by default one per physical core that this process may use. verify: whether to compare the digests of every
    file first, which reads all of the weights. mapped: whether the weights stay in the file, which processes share;
    else they are read into memory of this process in huge pages, which Linux may have given the file or not.
    Raises PackageError for a missing, malformed or altered package, IncompatibleMachineError listing what the machine
    lacks, OptionError for a device or thread count that cannot be.
    """
    package = open_package(path)
    check_machine(package.manifest.requirements)
    count = machine.resolve_thread_count(threads)
    with ThreadPoolExecutor(1) as verifying, _resting_threads():
        verified = verifying.submit(package.verify, count, in_place=_in_place(package, mapped)) if verify else None
        # Meanwhile NumPy and TVM, which take as long to import as 150 MB to digest; nothing of the package is loaded.
        from optimizer.runtime.library import load_library  # noqa: PLC0415
        from optimizer.runtime.model import CompiledModel  # noqa: PLC0415

        load_library("tvm_runtime", shared=True)
        if verified is not None:
            verified.result()
    return CompiledModel(package, device=device, threads=count, mapped=mapped)


def _in_place(package: Package, mapped: bool) -> list[str]:
    """Return the files to digest where they are mapped: weights of so many pages that the first step waits for them."""
    weights = package.manifest.weights_file
    return [weights] if mapped and package.locations[weights].bytes >= _MANY_PAGES else []


@contextmanager
def _resting_threads() -> Iterator[None]:
    """Have NumPy's threads for products of matrices wait without work asleep, if it is imported inside.

    OpenBLAS has them turn round for 2^26 cycles after each product and when they begin, by which time the first token
    may be there: of two cores they took one for a third of a load.
    """
    if "numpy" in sys.modules or _BLAS_WAIT in os.environ:
        yield
        return
    os.environ[_BLAS_WAIT] = "4"  # the least it takes: 2^4 cycles
    try:
        yield
    finally:
        os.environ.pop(_BLAS_WAIT, None)


def check_machine(requirements: Requirements) -> None:
    """Raise one IncompatibleMachineError that lists all that this machine lacks of architecture, features and glibc."""
    found = machine.architecture()
    if requirements.architecture != found:
        raise IncompatibleMachineError(
            f"the package is for {requirements.architecture}, this machine is {found}; compile for another target"
        )
    problems: list[str] = []
    if missing := sorted(set(requirements.cpu_features) - machine.cpu_features()):
        problems.append("the CPU features " + ", ".join(missing))
    if requirements.glibc:
        have = machine.glibc_version()
        if machine.release(have) < machine.release(requirements.glibc):
            problems.append(f"glibc {requirements.glibc} (it has {have or 'another C library'})")
    if problems:
        raise IncompatibleMachineError(
            f"this machine lacks {' and '.join(problems)}, which target {requirements.target} needs; "
            "compile for a target that suits it ('python -m optimizer targets' lists them)"
        )
