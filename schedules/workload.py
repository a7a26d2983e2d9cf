"""What identifies a TIR function apart from its names: the key by which tuning decisions are kept."""

from __future__ import annotations

import tvm_ffi
from tvm import tirx

_MASK = (1 << 64) - 1


def identity(function: tirx.PrimFunc) -> str:
    """Return 16 hexadecimal digits that are equal for functions of one structure, whatever they are called.

    Names of variables and attributes (the function's symbol, the operators it came from) do not count; shapes, dtypes
    and symbolic dimensions do.
    """
    for key in function.attrs.keys() if function.attrs is not None else ():
        function = function.without_attr(key)
    return f"{tvm_ffi.structural_hash(function) & _MASK:016x}"
