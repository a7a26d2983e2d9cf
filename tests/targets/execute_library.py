"""Executes a compiled library with nothing but the TVM runtime; runs on this machine and under the emulator alike.

Usage: execute_library.py kind library inputs.npz output.npy
`kind` is "kernel" (a TIR function that fills its last argument), "virtual-machine" (a Relax module's main) or "cuda"
(the same on the first GPU).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np
import tvm_ffi

_ALIGNMENT = 64
_DEVICE_CPU, _DEVICE_CUDA, _POOLED_ALLOCATOR = 1, 2, 2


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy at an address that the runtime accepts."""
    memory = np.empty(array.nbytes + _ALIGNMENT, "uint8")
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def load_runtime(*names: str) -> None:
    package = importlib.util.find_spec("tvm")
    assert package is not None
    assert package.origin is not None
    for name in names:
        ctypes.CDLL(str(Path(package.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)


def execute_on_gpu(library: str, arrays: list[np.ndarray]) -> np.ndarray:
    load_runtime("libtvm_runtime_cuda.so")
    import tvm

    tensors = [tvm.runtime.tensor(array, device=tvm.cuda(0)) for array in arrays]
    machine = tvm_ffi.load_module(library).get_function("vm_load_executable")()
    machine.get_function("vm_initialization")(
        *(_DEVICE_CUDA, 0, _POOLED_ALLOCATOR), *(_DEVICE_CPU, 0, _POOLED_ALLOCATOR)
    )
    return machine.get_function("main")(*tensors).numpy()


def main(kind: str, library: str, inputs_file: str, output_file: str) -> None:
    inputs = np.load(inputs_file)
    arrays = [aligned(inputs[name]) for name in inputs.files]
    load_runtime("libtvm_runtime.so")
    if kind == "cuda":
        np.save(output_file, execute_on_gpu(library, arrays))
        return
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
