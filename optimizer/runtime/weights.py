"""The weights of a package as TVM tensors, mapped from disk rather than read."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, cast

import numpy as np

from optimizer.errors import PackageError
from optimizer.package.reader import FileLocation, Package
from optimizer.runtime.tensors import Tensor, wrap_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


def map_file(location: FileLocation) -> NDArray[np.uint8]:
    """Return the bytes of a package file as memory mapped read-only; the mapping lives as long as any view of it.

    The array passes for writeable because DLPack cannot express read-only memory to TVM; a write faults.
    """
    if not location.bytes:
        return np.empty(0, np.uint8)
    mapping, skipped = location.map()
    view = np.frombuffer(mapping, np.uint8)
    memory = (ctypes.c_uint8 * view.size).from_address(view.ctypes.data)
    vars(memory)["mapping"] = view
    return cast("NDArray[np.uint8]", np.ctypeslib.as_array(memory)[skipped:])


def map_weights(package: Package) -> tuple[list[Tensor], tuple[int, int]]:
    """Return all weights as CPU tensors over one mapping, in manifest order, and the mapping's address range."""
    manifest = package.manifest
    data = map_file(package.locations[manifest.weights_file])
    try:
        tensors = [
            wrap_bytes(data[weight.offset : weight.offset + weight.bytes], weight.dtype, weight.shape)
            for weight in manifest.weights
        ]
    except ValueError as error:
        raise PackageError(f"{package.path}: {manifest.weights_file}: {error}; build the package again") from error
    return tensors, (data.ctypes.data, data.ctypes.data + data.size)
