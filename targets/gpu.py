"""The NVIDIA GPUs of this machine, asked of the driver itself."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute of the CUDA driver API

# TVM's CUDA runtime is linked with CUDA 13, which the drivers from release 580 on serve.
REQUIRED_DRIVER_VERSION = 13000


@dataclass(frozen=True)
class Gpu:
    """A GPU: the name that the driver gives it and its architecture, such as "sm_90"."""

    name: str
    architecture: str


def driver_version() -> int | None:
    """Return the newest CUDA version that the driver serves (13000 for CUDA 13.0), None without a driver."""
    driver = _driver()
    if driver is None:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine, none where there is no driver."""
    driver, count = _driver(), ctypes.c_int()
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_describe(driver, index) for index in range(count.value))


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}")


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
