"""NumPy and DLPack arrays to TVM tensors and back, without a copy where TVM's demands allow it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import tvm.runtime

from optimizer.package.dtypes import device_dtype, numpy_dtype
from optimizer.package.manifest import WEIGHT_ALIGNMENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Array = NDArray[np.generic]


class Tensor(Protocol):
    """The part of `tvm.runtime.Tensor` that is used here; it also speaks DLPack."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> Device: ...
    def data_ptr(self) -> int: ...
    def is_contiguous(self) -> bool: ...
    def numpy(self) -> Array: ...
    def copyto(self, target: Device) -> Tensor: ...
    def copyfrom(self, source_array: Array) -> Tensor: ...
    def _create_view(self, shape: tuple[int, ...], dtype: str) -> Tensor: ...
    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


class Device(Protocol):
    """The part of `tvm.runtime.Device` that is used here."""

    @property
    def exist(self) -> bool: ...
    @property
    def compute_version(self) -> str: ...
    def dlpack_device_type(self) -> int: ...
    def sync(self) -> None: ...


class SupportsDLPack(Protocol):
    """Any array that other libraries can take over by DLPack, such as torch.Tensor."""

    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


TVM_TENSOR: type[object] = tvm.runtime.Tensor
_from_dlpack = cast("Callable[[object], Tensor]", tvm.runtime.from_dlpack)
_empty = cast("Callable[[tuple[int, ...], str], Tensor]", tvm.runtime.empty)
_empty_on = cast("Callable[[tuple[int, ...], str, Device], Tensor]", tvm.runtime.empty)


def allocate(shape: tuple[int, ...], dtype: str, device: Device) -> Tensor:
    """Return a tensor on a device whose values are not defined; memory is taken as it is written to."""
    return _empty_on(shape, device_dtype(dtype), device)


def host_view(tensor: Tensor, dtype: str) -> Array:
    """Return a tensor's values as an array: on the CPU its memory itself, which the array keeps alive, else a copy."""
    if tensor.device.dlpack_device_type() != tvm.runtime.device("cpu").dlpack_device_type():
        return tensor.numpy().astype(numpy_dtype(dtype), copy=False)
    kind = numpy_dtype(dtype)
    size = math.prod(tensor.shape) * kind.itemsize
    if not size:
        return np.empty(tensor.shape, kind)
    memory = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    vars(memory)["tensor"] = tensor
    return np.ctypeslib.as_array(memory).view(kind).reshape(tensor.shape)


def write_back(tensor: Tensor, array: Array) -> None:
    """Store what was written to the `host_view` of a tensor, unless that was its own memory."""
    if array.size and array.ctypes.data != tensor.data_ptr():
        tensor.copyfrom(array)


def wrap_bytes(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a CPU tensor over `data` (1-d uint8), which it keeps alive.

    Raises ValueError when the data do not begin on a 64-byte boundary: TVM's kernels may fault on less.
    """
    if not data.size:
        return _empty(shape, device_dtype(dtype))
    if data.ctypes.data % WEIGHT_ALIGNMENT:
        raise ValueError(f"tensor data at {data.ctypes.data:#x} are not aligned to {WEIGHT_ALIGNMENT} bytes")
    return _from_dlpack(data)._create_view(shape, device_dtype(dtype))


def from_numpy(array: Array, dtype: str) -> Tensor:
    """Return a CPU tensor with the array's values; shares memory if the array is contiguous, aligned and writeable."""
    if device_dtype(dtype) != dtype:
        array = array.astype(device_dtype(dtype))
    shape = array.shape
    if not (array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % WEIGHT_ALIGNMENT == 0):
        array = _aligned_copy(array)
    if array.size and array.dtype.isbuiltin == 1:
        return _from_dlpack(array)
    return wrap_bytes(array.reshape(-1).view(np.uint8), dtype, shape)


def _aligned_copy(array: Array) -> Array:
    storage = np.empty(array.nbytes + WEIGHT_ALIGNMENT, np.uint8)
    start = -storage.ctypes.data % WEIGHT_ALIGNMENT
    copy = storage[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def from_dlpack(array: SupportsDLPack) -> Tensor:
    """Return a tensor of the same values on the same device.

    Shares memory if the array is contiguous and aligned; otherwise a CPU array is copied, and ValueError raised for
    one on another device.
    """
    try:
        return _from_dlpack(array)
    except (RuntimeError, ValueError, BufferError) as error:
        on_cpu = array.__dlpack_device__()[0] == tvm.runtime.device("cpu").dlpack_device_type()
        if not on_cpu:
            raise ValueError(f"it is not contiguous and aligned in device memory ({error})") from error
        host = cast("Callable[[object], Array]", np.from_dlpack)(array)
        return from_numpy(host, host.dtype.name)


def is_acceptable(tensor: Tensor) -> bool:
    """Return whether kernels may be given this tensor as it is."""
    return tensor.is_contiguous() and tensor.data_ptr() % WEIGHT_ALIGNMENT == 0


def to_numpy(tensor: Tensor, dtype: str) -> Array:
    """Return a copy of the tensor's values in host memory, as the NumPy dtype that `dtype` declares."""
    return tensor.numpy().astype(numpy_dtype(dtype), copy=False)


def shares_memory(tensor: Tensor, regions: Sequence[tuple[int, int]]) -> bool:
    """Return whether the tensor's data begin in one of the address ranges (first, beyond last)."""
    address = tensor.data_ptr()
    return any(first <= address < end for first, end in regions)
