"""TVM's runtime libraries, loaded without its compiler and its Python modules.

Importing `tvm` takes a second and maps hundreds of megabytes, most of which is the compiler. What a package needs is
`libtvm_runtime`, whose functions `tvm_ffi` calls. Where the program has imported `tvm` before, its libraries are used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from optimizer.errors import IncompatibleMachineError
from optimizer.runtime.ffi import tvm_ffi

_loaded: dict[str, ctypes.CDLL] = {}


def load_library(name: str, *, shared: bool = False) -> None:
    """Load one of TVM's libraries unless it is; `shared` lets libraries loaded later find its symbols.

    Raises IncompatibleMachineError where it or something that it needs is not there.
    """
    if name in _loaded:
        return
    try:
        mode = "RTLD_GLOBAL" if shared else "RTLD_LOCAL"
        _loaded[name] = tvm_ffi.libinfo.load_lib_ctypes("tvm", name, mode, extra_lib_paths=_folders())
    except (OSError, RuntimeError) as error:
        raise IncompatibleMachineError(f"lib{name}.so cannot be loaded ({error}); install it and its driver") from error


@functools.cache
def runtime_function(name: str) -> Callable[..., object]:
    """Return a function of TVM's runtime by its global name."""
    load_library("tvm_runtime", shared=True)
    function = tvm_ffi.get_global_func(name)
    assert function is not None
    return function


def tvm_version() -> str:
    """Return the version of the installed TVM."""
    return importlib.metadata.version("apache-tvm")


def _folders() -> list[Path]:
    """Return where TVM's libraries may lie: where the environment says, then in its Python package."""
    package = importlib.util.find_spec("tvm")
    locations = (package.submodule_search_locations or ()) if package else ()
    given = os.environ.get("TVM_LIBRARY_PATH")
    return [*([Path(given)] if given else []), *(Path(location) / "lib" for location in locations)]
