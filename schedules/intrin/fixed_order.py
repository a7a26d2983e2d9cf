"""What keeps LLVM from undoing the order of a tile's code on x86: points that it has to pass as they were written.

It adds a cell's products in a row where the tile takes one step of all cells after the other, and spills the operands
that the cells share; and it takes sums in memory, which are added to seldom, into registers, for which there are none.
The points become no instructions.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import attributes, imported
from targets.base import Target

_VALUE, _MEMORY = "optimizer_value_in_order", "optimizer_in_memory"
# Side effects of neither kind are on what other code reads, which may move past them.
_SOURCE = """
define weak_odr <16 x i16> @{value}(<16 x i16> %given) #0 {{
  %known = call <16 x i16> asm sideeffect "", "=x,0"(<16 x i16> %given) #1
  ret <16 x i16> %known
}}
define weak_odr i32 @{memory}(ptr %element) #0 {{
  call void asm sideeffect "", "r"(ptr %element) #2
  ret i32 0
}}
attributes #0 = {{ {attributes} }}
attributes #1 = {{ nounwind memory(inaccessiblemem: readwrite) }}
attributes #2 = {{ nounwind memory(argmem: readwrite) }}
"""


def in_order(value: Expr) -> Expr:
    """Return a vector int16x16 that is computed where it stands among others of this kind."""
    return tirx.call_extern("int16x16", _VALUE, value)


def in_memory(element: Expr) -> Stmt:
    """Return a point at which the buffer of an element that is read is in memory."""
    return tirx.Evaluate(tirx.call_extern("int32", _MEMORY, tirx.address_of(element)))


def with_fixed_order(statement: Stmt, target: Target) -> Stmt:
    """Return a statement that has such points, with the functions that it calls."""
    return imported(statement, _SOURCE.format(value=_VALUE, memory=_MEMORY, attributes=attributes(target)))
