"""From compiled modules to a shared library for any target, with one linker for all of them.

The linker is that of the `ziglang` wheel: it brings every target's C library stubs and compiler support routines
(half-precision conversions), so nothing has to be installed for cross-linking, and x86 and Arm go the same road.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from targets.base import Target
from targets.cache import cache_directory
from targets.device_code import pack_with_device_code
from targets.errors import ToolchainError

# The first link for an architecture builds its support library, which takes a slow machine a minute.
_TIMEOUT_SECONDS = 600

# Same objects, same bytes: no build id, no symbol table (which would name temporary files).
# Optimization is asked for only so that the support library comes without its undefined-behaviour checks.
_LINK_OPTIONS = ("-shared", "-fPIC", "-O2", "-s", "-Wl,--build-id=none")


class ExportableModule(Protocol):
    """What of tvm.runtime.Module the linker uses."""

    def export_library(self, file_name: str, **options: object) -> object:
        """Write the objects of the module tree and hand them to `fcompile`."""
        ...


class Executable(Protocol):
    """What tvm.compile returns: a Relax VM executable or a TIR one."""

    @property
    def mod(self) -> ExportableModule:
        """The root of the module tree."""
        ...


def export_library(executable: Executable, target: Target, path: Path) -> None:
    """Write `executable` (the result of tvm.compile) as a shared library that the target loads.

    The same executable gives the same bytes. A CUDA target's library holds device code for each of its GPU
    architectures instead of the generated source. Raises ToolchainError when a tool is missing or refuses.
    """
    options: dict[str, object] = {"fcompile": lambda output, objects, **_: link(objects, target, Path(output))}
    if target.device == "cuda":
        options["fpack_imports"] = functools.partial(pack_with_device_code, target)
    executable.mod.export_library(str(path), **options)


def link(objects: Sequence[str | Path], target: Target, output: Path) -> None:
    """Link object files of the target into the shared library `output`; raises ToolchainError."""
    command = [
        str(linker_executable()), "cc", "-target", target.linker_triple, *_LINK_OPTIONS, "-o", str(output),
        *(str(file) for file in objects),
    ]  # fmt: skip
    # The support libraries are kept for all links, the record of this one is not.
    with tempfile.TemporaryDirectory(prefix="optimizer-link-") as scratch:
        caches = {"ZIG_GLOBAL_CACHE_DIR": str(cache_directory("zig")), "ZIG_LOCAL_CACHE_DIR": scratch}
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **caches},
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolchainError(
                f"linking {output.name} for {target.name} took over {_TIMEOUT_SECONDS} s; retry on a less busy machine"
            ) from error
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise ToolchainError(f"linking {output.name} for {target.name} failed: {reason}")


def linker_executable() -> Path:
    """Return the linker's path; raises ToolchainError when it is not installed."""
    package = importlib.util.find_spec("ziglang")
    if package is None or not package.submodule_search_locations:
        raise ToolchainError("the linker is missing: run 'python -m pip install ziglang'")
    return Path(package.submodule_search_locations[0]) / "zig"
