"""Functions in LLVM's language that a kernel brings along, for instructions that TVM's types cannot express."""

from __future__ import annotations

from tvm import ir, tirx
from tvm.tirx.stmt import Stmt

from targets.base import Target

# `alwaysinline` asks for the same machine as the kernel's: LLVM inlines no function of another one.
_ATTRIBUTES = 'alwaysinline nounwind "target-cpu"="{cpu}" "target-features"="{features}"'


def attributes(target: Target) -> str:
    """Return the attributes of a function that is inlined in kernels for a target."""
    return _ATTRIBUTES.format(cpu=target.llvm_cpu, features=",".join(target.llvm_attributes))


def imported(statement: Stmt, source: str) -> Stmt:
    """Return a statement that calls functions, with them; their linkage lets each kernel of a module bring its own."""
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", ir.StringImm(source), statement)
