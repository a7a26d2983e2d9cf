"""A point in a kernel that LLVM moves no load across: what is read after it is read then, not kept from before.

Neighbouring columns of a convolution read the same elements at neighbouring taps. LLVM would keep each as a vector of
its own from one tap to the next, in registers that the sums need, where reading it again costs nothing. The fence is
one for a single thread: it becomes no instruction.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import attributes, imported
from targets.base import Target

_CALL = "optimizer_fence"
_SOURCE = """
define weak_odr i32 @{call}() #0 {{
  fence syncscope("singlethread") seq_cst
  ret i32 0
}}
attributes #0 = {{ {attributes} }}
"""


def fence() -> Stmt:
    """Return the statement that keeps loads apart."""
    return tirx.Evaluate(tirx.call_extern("int32", _CALL))


def with_fences(statement: Stmt, target: Target) -> Stmt:
    """Return a statement that has fences, with the function that it calls."""
    return imported(statement, _SOURCE.format(call=_CALL, attributes=attributes(target)))
