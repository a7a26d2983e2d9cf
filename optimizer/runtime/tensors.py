"""NumPy and DLPack arrays to TVM tensors and back, without a copy where TVM's demands allow it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from optimizer.errors import InsufficientMemoryError
from optimizer.package.alignment import aligned_copy
from optimizer.package.dtypes import ITEM_BYTES, device_dtype, numpy_dtype
from optimizer.package.manifest import INPUT_ALIGNMENT, WEIGHT_ALIGNMENT
from optimizer.runtime.ffi import tvm_ffi
from optimizer.runtime.library import load_library, runtime_function

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Array = NDArray[np.generic]

# What TVM's allocators say where there is no memory (tvm/src/runtime/cpu_device_api.cc, cuda/cuda_device_api.cc).
_NO_MEMORY = ("std::bad_alloc", "out of memory")


class Tensor(Protocol):
    """The part of `tvm_ffi.Tensor` that is used here; it also speaks DLPack."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> Device: ...
    def data_ptr(self) -> int: ...
    def is_contiguous(self) -> bool: ...
    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


class Device(Protocol):
    """The part of `tvm_ffi.Device` that is used here."""

    @property
    def index(self) -> int: ...
    def dlpack_device_type(self) -> int: ...


class SupportsDLPack(Protocol):
    """Any array that other libraries can take over by DLPack, such as torch.Tensor."""

    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


TVM_TENSOR: type[object] = tvm_ffi.Tensor
CPU: Device = cast("Device", tvm_ffi.device("cpu", 0))


def tensor_over(array: object) -> Tensor:
    """Return a tensor over the array's memory; raises where that is not contiguous and aligned."""
    load_library("tvm_runtime", shared=True)
    make = cast("Callable[..., Tensor]", tvm_ffi.from_dlpack)
    return make(array, require_alignment=INPUT_ALIGNMENT, require_contiguous=True)


def allocate(shape: tuple[int, ...], dtype: str, device: Device) -> Tensor:
    """Return a tensor on a device whose values are not defined; memory is taken as it is written to.

    Raises InsufficientMemoryError where there is not as much.
    """
    make = cast("Callable[..., Tensor]", runtime_function("runtime.TVMTensorAllocWithScope"))
    try:
        return make(shape_of(shape), tvm_ffi.dtype(device_dtype(dtype)), device, None)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        asked = math.prod(shape) * ITEM_BYTES[dtype]
        raise InsufficientMemoryError(
            f"there is too little memory for {asked} bytes; reserve fewer tokens, or free memory"
        ) from error


def lacks_memory(error: RuntimeError) -> bool:
    """Return whether an error of TVM says that there is no memory of the size that it asked for."""
    return any(text in str(error) for text in _NO_MEMORY)


def shape_of(numbers: Sequence[int]) -> object:
    """Return numbers as one argument of compiled code; `tvm_ffi.Shape` does the same, and checks each first."""
    return runtime_function("ffi.Shape")(*numbers)


def elements(array: object) -> list[object]:
    """Return what an array holds that compiled code returned; iterating over it does the same by several calls each."""
    return [element(array, number) for number in range(cast("int", runtime_function("ffi.ArraySize")(array)))]


def element(array: object, place: int) -> object:
    """Return one of the objects in an array that compiled code returned."""
    return runtime_function("ffi.ArrayGetItem")(array, place)


def on_device(tensor: Tensor, device: Device) -> Tensor:
    """Return a copy of a tensor in the memory of a device."""
    make = cast("Callable[..., Tensor]", runtime_function("runtime.TVMTensorAllocWithScope"))
    copy = make(shape_of(tensor.shape), tensor.dtype, device, None)
    runtime_function("runtime.TVMTensorCopyFromTo")(tensor, copy)
    return copy


def is_on_cpu(tensor: SupportsDLPack) -> bool:
    """Return whether an array lies in the memory of the CPU."""
    return tensor.__dlpack_device__()[0] == CPU.dlpack_device_type()


def host_view(tensor: Tensor, dtype: str) -> Array:
    """Return a tensor's values as an array: on the CPU its memory itself, which the array keeps alive, else a copy."""
    kind = numpy_dtype(device_dtype(dtype))
    if _is_viewed(tensor, kind):
        return viewed(tensor)
    size = math.prod(tensor.shape) * kind.itemsize
    if not size or not is_on_cpu(tensor):
        copy = np.empty(tensor.shape, kind)
        runtime_function("runtime.TVMTensorCopyToBytes")(tensor, ctypes.c_void_p(copy.ctypes.data), size)
        return copy
    memory = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    vars(memory)["tensor"] = tensor
    return np.ctypeslib.as_array(memory).view(kind).reshape(tensor.shape)


def viewed(tensor: Tensor) -> Array:
    """Return the memory of a tensor on the CPU, of a type that NumPy has itself, as an array that keeps it alive."""
    return cast("Callable[[object], Array]", np.from_dlpack)(tensor)


def _is_viewed(tensor: Tensor, kind: np.dtype[np.generic]) -> bool:
    """Return whether NumPy takes the memory of a tensor, whose elements are of this kind, as it is."""
    return kind.isbuiltin == 1 and tensor.device == CPU


def write_back(tensor: Tensor, array: Array) -> None:
    """Store what was written to the `host_view` of a tensor, unless that was its own memory."""
    if not _is_viewed(tensor, array.dtype) and array.size and array.ctypes.data != tensor.data_ptr():
        data = np.ascontiguousarray(array)
        runtime_function("runtime.TVMTensorCopyFromBytes")(tensor, ctypes.c_void_p(data.ctypes.data), data.nbytes)


def wrap_bytes(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a CPU tensor over the bytes of a weight (1-d uint8), which it keeps alive.

    Raises ValueError when they do not begin on a boundary of 64 bytes, which a package says they do.
    """
    if data.size and data.ctypes.data % WEIGHT_ALIGNMENT:
        raise ValueError(f"tensor data at {data.ctypes.data:#x} are not aligned to {WEIGHT_ALIGNMENT} bytes")
    return _wrap(data, dtype, shape)


def _wrap(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if not data.size:
        return allocate(shape, dtype, CPU)
    view = cast("Callable[..., Tensor]", runtime_function("runtime.TVMTensorCreateView"))
    return view(tensor_over(data), shape_of(shape), tvm_ffi.dtype(device_dtype(dtype)), 0)


def from_numpy(array: Array, dtype: str) -> Tensor:
    """Return a CPU tensor with the array's values; shares memory if the array is contiguous, aligned and writeable."""
    if device_dtype(dtype) != dtype:
        array = array.astype(device_dtype(dtype))
    whole = array.flags.c_contiguous and array.flags.writeable
    if not array.size or array.dtype.isbuiltin != 1:
        usable = whole and array.ctypes.data % INPUT_ALIGNMENT == 0
        return _wrap((array if usable else aligned_copy(array)).reshape(-1).view(np.uint8), dtype, array.shape)
    if whole:
        tensor = cast("Callable[[object], Tensor]", tvm_ffi.from_dlpack)(array)
        if tensor.data_ptr() % INPUT_ALIGNMENT == 0:  # a tenth of the time that NumPy takes to tell an address
            return tensor
    return tensor_over(aligned_copy(array))


def from_dlpack(array: SupportsDLPack) -> Tensor:
    """Return a tensor of the same values on the same device.

    Shares memory if the array is contiguous and aligned; otherwise a CPU array is copied, and ValueError raised for
    one on another device.
    """
    try:
        return tensor_over(array)
    except (RuntimeError, ValueError, BufferError) as error:
        if not is_on_cpu(array):
            raise ValueError(f"it is not contiguous and aligned in device memory ({error})") from error
        host = cast("Callable[[object], Array]", np.from_dlpack)(array)
        return from_numpy(host, host.dtype.name)


def is_acceptable(tensor: Tensor) -> bool:
    """Return whether kernels may be given this tensor as it is."""
    return tensor.is_contiguous() and tensor.data_ptr() % INPUT_ALIGNMENT == 0


def to_numpy(tensor: Tensor, dtype: str) -> Array:
    """Return a copy of the tensor's values in host memory, as the NumPy dtype that `dtype` declares."""
    copy = np.array(host_view(tensor, dtype))
    kind = numpy_dtype(dtype)
    return copy if copy.dtype == kind else copy.astype(kind)
