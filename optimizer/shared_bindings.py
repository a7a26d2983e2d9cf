"""Views of memory and sizes made once: what lies between kernels costs a decoder's step as much as some of them.

TVM plans few pieces of memory for many results and then makes a tensor of each at its place, with a shape of its own,
although layers repeat the same few. Here equal ones are bound once, where the first of them was. It also makes a tuple
of the results of every kernel that has several, which nobody reads once they are taken from it: such are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
import tvm.ir
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

# Of equal memory, place, shape and type: two names of one thing, as planned memory always may have.
_VIEWS = frozenset({"relax.memory.alloc_tensor", "relax.reshape"})
# Of places in the heap of sizes, each of which is written once, before what reads it.
_SIZES = frozenset({"vm.builtin.make_shape", "vm.builtin.make_prim_value"})


def share_views(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module, whose memory is allocated, with one tensor for equal views of the same memory.

    It has to come before references are dropped after their last use.
    """
    return _shared(module, lambda call: isinstance(call.op, tvm.ir.Op) and call.op.name in _VIEWS)


def leave_out_tuples(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module, whose tuples are taken apart, without those that nobody reads."""
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            reads = _Reads()
            reads.visit_expr(function)
            result.update_func(variable, _WithoutTuples(module, reads.found).visit_expr(function))
    return result


def share_sizes(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module, whose shapes are lowered, with equal shapes and numbers made once."""

    def is_shared(call: tvm.ir.Call) -> bool:
        if isinstance(call.op, tvm.ir.GlobalVar):
            return _computes_number(module[call.op])
        return isinstance(call.op, relax.ExternFunc) and call.op.global_symbol in _SIZES

    return _shared(module, is_shared)


def _computes_number(function: tvm.ir.BaseFunc) -> bool:
    """Return whether a function takes nothing but numbers and returns one."""
    if not isinstance(function, tirx.PrimFunc) or not isinstance(function.ret_type, tvm.ir.PrimType):
        return False
    return all(isinstance(parameter.ty, tvm.ir.PrimType) for parameter in function.params)


def _shared(module: tvm.IRModule, is_shared: Callable[[tvm.ir.Call], bool]) -> tvm.IRModule:
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            result.update_func(variable, _Sharing(module, is_shared).visit_expr(function))
    return result


@mutator
class _Sharing(PyExprMutator):
    """Binds a call that is to be shared only where no equal one is bound in the same scope or one around it."""

    def __init__(self, module: tvm.IRModule, is_shared: Callable[[tvm.ir.Call], bool]) -> None:
        super().__init__(module)
        self._is_shared = is_shared
        self._known: dict[tvm_ffi.StructuralKey, relax.Var] = {}

    def visit_seq_expr_(self, op: relax.SeqExpr) -> relax.Expr:
        outside = self._known
        self._known = dict(outside)
        result = super().visit_seq_expr_(op)
        self._known = outside
        return result

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = binding.value
        if not isinstance(value, tvm.ir.Call) or not self._is_shared(value):
            super().visit_var_binding_(binding)
            return
        key = tvm_ffi.StructuralKey(self.visit_expr(value))
        known = self._known.get(key)
        if known is not None:
            self.set_var_remap(binding.var, known)
            return
        super().visit_var_binding_(binding)
        self._known[key] = self.visit_expr(binding.var)


@visitor
class _Reads(PyExprVisitor):
    """Finds the variables that are read somewhere."""

    def __init__(self) -> None:
        self.found: set[relax.Var] = set()

    def visit_var_(self, op: relax.Var) -> None:
        self.found.add(op)


@mutator
class _WithoutTuples(PyExprMutator):
    """Binds a tuple only where it is among those that are read."""

    def __init__(self, module: tvm.IRModule, read: set[relax.Var]) -> None:
        super().__init__(module)
        self._read = read

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if not isinstance(binding.value, relax.Tuple) or binding.var in self._read:
            super().visit_var_binding_(binding)
