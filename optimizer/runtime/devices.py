"""The device and the TVM libraries that a package runs with."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from optimizer.errors import IncompatibleMachineError, OptionError
from optimizer.package.manifest import Requirements
from optimizer.runtime import machine
from optimizer.runtime.ffi import tvm_ffi
from optimizer.runtime.library import load_library, runtime_function, tvm_version
from optimizer.runtime.tensors import Device

_DEVICE = re.compile(r"(cpu|cuda)(?::(\d{1,3}))?")
_open_device = cast("Callable[[str, int], Device]", tvm_ffi.device)
# Numbers of what `runtime.GetDeviceAttr` tells of a device (tvm/runtime/device_api.h).
_EXISTS, _COMPUTE_VERSION = 0, 4


def open_device(requirements: Requirements, name: str | None) -> Device:
    """Return the device to run on, with the TVM libraries that its packages need loaded.

    Raises OptionError for a name that does not fit the package, IncompatibleMachineError when versions, driver or GPU
    do not.
    """
    match = _DEVICE.fullmatch(name or requirements.device)
    if match is None or match[1] != requirements.device:
        raise OptionError(f"device '{name}' does not fit this package, which was compiled for {requirements.device}")
    check_library_versions(requirements)
    load_library("tvm_runtime", shared=True)
    load_library("tvm_runtime_extra")
    if requirements.device == "cpu":
        return _open_device("cpu", 0)
    _load_cuda_runtime()
    load_library("tvm_runtime_cuda")
    device = _open_device("cuda", int(match[2] or 0))
    attribute = runtime_function("runtime.GetDeviceAttr")
    if not attribute(device.dlpack_device_type(), device.index, _EXISTS):
        raise IncompatibleMachineError(
            f"the package needs an NVIDIA GPU, and {match[0]} is not there; check the driver"
        )
    architecture = "sm_" + str(attribute(device.dlpack_device_type(), device.index, _COMPUTE_VERSION)).replace(".", "")
    if not runs_on(requirements.gpu_architectures, architecture):
        built = ", ".join(requirements.gpu_architectures)
        raise IncompatibleMachineError(f"the package has code for {built}, the GPU is {architecture}; compile for it")
    return device


def check_library_versions(requirements: Requirements) -> None:
    """Raise IncompatibleMachineError unless TVM is of the release series (first two numbers) that built the package.

    TVM promises no more: its executable format and its calling convention change between series.
    """
    installed = {"tvm_runtime": tvm_version(), "tvm_ffi": str(tvm_ffi.__version__)}
    for library in requirements.libraries:
        have = installed.get(library.name)
        if have is not None and machine.release(have)[:2] != machine.release(library.version)[:2]:
            raise IncompatibleMachineError(
                f"the package needs {library.name} {library.version}, installed is {have}; install that version"
            )


def runs_on(code: Sequence[str], gpu: str) -> bool:
    """Return whether a GPU such as "sm_89" runs device code for any of the architectures.

    Machine code ("sm_80") runs on the same major version from its minor version on, PTX ("compute_80") on all later
    ones, architecture-specific code ("sm_90a") on that version alone (CUDA C++ Programming Guide, 3.1.2 to 3.1.4).
    """
    have = _architecture(gpu)
    return any(_runs(_architecture(each), have) for each in code)


def _architecture(name: str) -> tuple[str, int, int, str]:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
    return (match[1], int(match[2]), int(match[3]), match[4]) if match else ("", 0, 0, "")


def _runs(code: tuple[str, int, int, str], gpu: tuple[str, int, int, str]) -> bool:
    kind, major, minor, suffix = code
    if suffix:
        return (major, minor) == gpu[1:3]
    if kind == "compute":
        return (major, minor) <= gpu[1:3]
    return kind == "sm" and major == gpu[1] and minor <= gpu[2]


def _load_cuda_runtime() -> None:
    """Load the CUDA runtime of NVIDIA's wheel, where there is one, for TVM's library to find; else the system's is."""
    package = importlib.util.find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        library = Path(location) / "cu13" / "lib" / "libcudart.so.13"
        if library.exists():
            ctypes.CDLL(str(library))
