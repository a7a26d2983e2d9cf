"""A point in a kernel at which no vector register holds anything: what is needed after it comes from memory again.

LLVM keeps constants of one loop in registers for as long as an outer loop runs, and in another inner loop spills sums
for them, at each of its iterations. Where such a loop begins and ends, this gives it all registers. It becomes no
instruction.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import attributes, imported
from targets.base import Target

_CALL = "optimizer_free_registers"
_SOURCE = """
define weak_odr i32 @{call}() #0 {{
  call void asm sideeffect "", "{registers}"()
  ret i32 0
}}
attributes #0 = {{ {attributes} }}
"""
# What vector registers of so many bits are called.
_NAMES = {256: "ymm", 512: "zmm"}


def can_free_registers(target: Target) -> bool:
    """Return whether kernels for a target can have such points: whether it has AVX2 or AVX-512."""
    return target.architecture == "x86_64" and target.vector_bits in _NAMES


def free_registers() -> Stmt:
    """Return the statement across which nothing stays in vector registers."""
    return tirx.Evaluate(tirx.call_extern("int32", _CALL))


def with_free_registers(statement: Stmt, target: Target) -> Stmt:
    """Return a statement that frees registers, with the function that it calls."""
    name = _NAMES[target.vector_bits]
    registers = ",".join(f"~{{{name}{number}}}" for number in range(target.vector_registers))
    return imported(statement, _SOURCE.format(call=_CALL, registers=registers, attributes=attributes(target)))
