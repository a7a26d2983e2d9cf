"""The weights of a package as TVM tensors: mapped from disk, or on request read into this process's own memory."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, cast

import numpy as np

from optimizer.errors import InsufficientMemoryError, PackageError
from optimizer.package.pieces import PIECE_BYTES, ask_for_huge_pages
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
    mapping, skipped = location.mapping
    view = np.frombuffer(mapping, np.uint8)
    memory = (ctypes.c_uint8 * view.size).from_address(view.ctypes.data)
    vars(memory)["mapping"] = view
    return cast("NDArray[np.uint8]", np.ctypeslib.as_array(memory)[skipped:])


def copy_file(location: FileLocation) -> NDArray[np.uint8]:
    """Return the bytes of a package file in memory of this process alone, in huge pages where Linux has them.

    Raises PackageError where the file ends early, InsufficientMemoryError where there is too little.
    """
    if not location.bytes:
        return np.empty(0, np.uint8)
    # Linux has other rules, and seldom huge pages, for memory that may be shared, as mmap's is by default.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, location.bytes + PIECE_BYTES, flags=private)
    except OSError as error:
        raise InsufficientMemoryError(
            f"there is too little memory for {location.bytes} bytes of weights; leave them in the file, or free memory"
        ) from error
    ask_for_huge_pages(memory)
    room = np.frombuffer(memory, np.uint8)
    begin = -room.ctypes.data % PIECE_BYTES
    data = room[begin : begin + location.bytes]
    with location.open() as stream:
        if stream.readinto(data.data) != location.bytes:
            raise PackageError(f"{location.path} is truncated; copy or build it again")
    return data


def weights_of(package: Package, *, mapped: bool = True) -> tuple[list[Tensor], tuple[int, int]]:
    """Return all weights as CPU tensors over one piece of memory, in manifest order, and its address range.

    It is the file, `mapped`, or a copy of it that this process alone has. Raises PackageError for weights that do not
    fit the file.
    """
    manifest = package.manifest
    data = (map_file if mapped else copy_file)(package.locations[manifest.weights_file])
    try:
        tensors = [
            wrap_bytes(data[weight.offset : weight.offset + weight.bytes], weight.dtype, weight.shape)
            for weight in manifest.weights
        ]
    except ValueError as error:
        raise PackageError(f"{package.path}: {manifest.weights_file}: {error}; build the package again") from error
    return tensors, (data.ctypes.data, data.ctypes.data + data.size)
