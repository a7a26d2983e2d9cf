"""Named arrays in .npz files, element types beyond NumPy's included."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimizer.package.dtypes import numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimizer.package.entry_points import TensorSpec

    Array = NDArray[np.generic]


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Array]) -> None:
    """Write arrays by name; a type that .npz does not know (bfloat16, ...) is stored as unsigned integers."""
    with zipfile.ZipFile(path, "w") as archive:  # numpy.savez cannot write an array called "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _plain(array), allow_pickle=False)


def _plain(array: Array) -> Array:
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.itemsize}")


def read_arrays(path: str | os.PathLike[str], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Return the arrays that `specs` name, in their declared types; raises KeyError for one that is missing."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {spec.name: stored[spec.name] for spec in specs}
    return {spec.name: _typed(arrays[spec.name], spec) for spec in specs}


def _typed(array: Array, spec: TensorSpec) -> Array:
    dtype = numpy_dtype(spec.dtype)
    return array if dtype.isbuiltin == 1 else array.view(dtype)
