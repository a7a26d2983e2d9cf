"""Symbolic shapes lowered to a heap of integers, the same way every time.

TVM's VMShapeLower collects the expressions of a module in a table hashed by the addresses of their variables, and
writes them to the heap in the table's order: two runs of the compiler give equal meaning and different bytes.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx


def lower_shapes(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with its shapes lowered by VMShapeLower, each shape function writing the heap in order."""
    known = {variable.name_hint for variable in module.get_global_vars()}
    lowered = relax.transform.VMShapeLower()(module)
    for variable, function in lowered.functions_items():
        if isinstance(function, tirx.PrimFunc) and variable.name_hint not in known:
            lowered.update_func(variable, function.with_body(_in_heap_order(function.body)))
    return lowered


def _in_heap_order(body: tirx.Stmt) -> tirx.Stmt:
    # A shape function reads the places of variables alone, which matching fills before, and writes those of
    # expressions: its stores are independent of each other.
    return tirx.SeqStmt(sorted(body.seq, key=_place)) if isinstance(body, tirx.SeqStmt) else body


def _place(store: tirx.BufferStore) -> int:
    return int(store.indices[0])
