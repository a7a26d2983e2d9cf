"""TIR functions that take the values of symbolic dimensions as scalar arguments, the same way every time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import tvm
from tvm import relax, tirx

_OPAQUE = 8  # TVM's OpPatternKind.kOpaque: never fused


def keep_symbolic_functions_apart(module: tvm.IRModule) -> tvm.IRModule:
    """Keep functions that take the value of a symbol as an argument out of fusion: FuseTIR loses such arguments."""
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and not all(tirx.is_buffer_var(value) for value in function.params):
            module.update_func(variable, function.with_attr("op_pattern", _OPAQUE))
    return module


@contextmanager
def passed_in_order_of_use() -> Iterator[None]:
    """Have TVM pass symbols to the functions it makes in the order of their use.

    `tvm.relax.utils` collects them in a set, whose order is that of their addresses: functions that were one the last
    time would be two this time. It may be entered again inside.
    """
    if hasattr(relax.utils, "set"):
        yield
        return
    relax.utils.set = _OrderedSet
    try:
        yield
    finally:
        delattr(relax.utils, "set")


class _OrderedSet:
    """What `tvm.relax.utils` asks of a set, in the order of insertion."""

    def __init__(self, members: Iterable[tirx.Var] = ()) -> None:
        self._members = dict.fromkeys(members)

    def add(self, member: tirx.Var) -> None:
        self._members[member] = None

    def update(self, members: Iterable[tirx.Var]) -> None:
        self._members.update(dict.fromkeys(members))

    def __sub__(self, other: _OrderedSet) -> list[tirx.Var]:
        return [member for member in self._members if member not in other._members]
