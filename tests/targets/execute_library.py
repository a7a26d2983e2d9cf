"""Executes a compiled library with nothing but the TVM runtime; runs on this machine and under the emulator alike.

Usage: execute_library.py kind library inputs.npz output.npy
`kind` is "kernel" (a TIR function that fills its last argument) or "virtual-machine" (a Relax module's main).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np
import tvm_ffi

_ALIGNMENT = 64
_DEVICE_CPU, _POOLED_ALLOCATOR = 1, 2


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy at an address that the runtime accepts."""
    memory = np.empty(array.nbytes + _ALIGNMENT, "uint8")
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def load_runtime() -> None:
    package = importlib.util.find_spec("tvm")
    assert package is not None
    assert package.origin is not None
    ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)


def main(kind: str, library: str, inputs_file: str, output_file: str) -> None:
    inputs = np.load(inputs_file)
    arrays = [aligned(inputs[name]) for name in inputs.files]
    load_runtime()
    module = tvm_ffi.load_module(library)
    tensors = [tvm_ffi.from_dlpack(array) for array in arrays]
    if kind == "kernel":
        module.get_function("main")(*tensors)
        result = arrays[-1]
    else:
        machine = module.get_function("vm_load_executable")()
        machine.get_function("vm_initialization")(_DEVICE_CPU, 0, _POOLED_ALLOCATOR)
        result = np.from_dlpack(machine.get_function("main")(*tensors))
    np.save(output_file, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
