"""Element types that entry points and weights may have, named as in NumPy and ml_dtypes.

Both are imported when something asks for a dtype, so that a package is read, and begins to be digested, before.
int4 and uint4 are only for inputs and outputs: the compiled function takes and returns them as int8 and uint8, one
element a byte, because TVM's own packing of four-bit tensors is not part of its interface.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

    NumpyDType = np.dtype[np.generic]

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "int4": 1,
    "uint4": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
_WIDENED = {"int4": "int8", "uint4": "uint8"}
_BEYOND_NUMPY = frozenset(name for name in ITEM_BYTES if name.startswith(("float8", "bfloat"))) | set(_WIDENED)


def device_dtype(name: str) -> str:
    """Return the dtype of the tensor that the compiled function sees for a declared dtype."""
    return _WIDENED.get(name, name)


@functools.cache
def numpy_dtype(name: str) -> NumpyDType:
    """Return the NumPy dtype called `name`; types that NumPy lacks come from ml_dtypes, imported only then."""
    import numpy as np  # noqa: PLC0415 - see above

    if name in _BEYOND_NUMPY:
        import ml_dtypes  # noqa: PLC0415 - most packages do without

        dtype: DTypeLike = getattr(ml_dtypes, name)
        return np.dtype(dtype)
    return np.dtype(name)


def lowest(name: str) -> float:
    """Return the lowest finite number of a float type."""
    import numpy as np  # noqa: PLC0415 - see above

    if name not in _BEYOND_NUMPY:
        return float(np.finfo(name).min)
    import ml_dtypes  # noqa: PLC0415 - most packages do without

    return float(ml_dtypes.finfo(numpy_dtype(name)).min)
