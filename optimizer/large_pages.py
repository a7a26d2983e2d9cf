"""Results in large pages: the code asks for them where it allocates memory, before anything touches it.

What a core reads and writes of a few MiB lies in a thousand pages of 4 KiB, more than it keeps addresses of. Linux
gives pages of 2 MiB to memory that was advised so (madvise, MADV_HUGEPAGE; Documentation/admin-guide/mm/transhuge.rst),
and TVM's allocators do not ask. Weights have theirs by the layout of their file (`optimizer.package.writer`).
"""

from __future__ import annotations

import math

import tvm
import tvm.ir
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.cache_append import whole_function
from passes.caches import caches_of
from schedules.intrin.llvm_functions import imported
from schedules.loops import index, load
from targets.base import Target

ADVICE = "advise_large_pages"
LARGE_PAGE = 2 << 20
# Half of what is smaller is beside the whole pages in it.
_LEAST = 2 * LARGE_PAGE
_SOURCE = f"""
declare i32 @madvise(ptr, i64, i32)
define weak_odr i32 @optimizer_advise_large_pages(ptr %memory, i64 %bytes) {{
entry:
  %begin = ptrtoint ptr %memory to i64
  %behind = add i64 %begin, %bytes
  %next = add i64 %begin, {LARGE_PAGE - 1}
  %first = and i64 %next, {-LARGE_PAGE}
  %last = and i64 %behind, {-LARGE_PAGE}
  %size = sub i64 %last, %first
  %some = icmp sgt i64 %size, 0
  br i1 %some, label %advise, label %done
advise:
  %place = inttoptr i64 %first to ptr
  %refused = call i32 @madvise(ptr %place, i64 %size, i32 14)
  br label %done
done:
  ret i32 0
}}
"""


def ask_for_large_pages(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Return the module, whose memory is allocated, with advice to Linux about each allocation of 4 MiB or more.

    It is given at each call, in half a microsecond: the memory may be another one. Where Linux refuses it nothing
    changes. Functions with caches stay as they are: their steps have little memory, and a time of their own between two
    kernels.
    """
    if target.device != "cpu":
        return module
    builder = relax.BlockBuilder(module)
    advise = builder.add_func(_advise(), ADVICE)
    advised = False
    result = builder.get()
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function) and not caches_of(function):
            adviser = _Adviser(result, advise)
            changed = adviser.visit_expr(function)
            if adviser.advised:
                advised = True
                result.update_func(variable, changed)
    return result if advised else module


def _advise() -> tirx.PrimFunc:
    """Return the function (memory) that asks for large pages for a vector of bytes."""
    size = tirx.Var("size", "int64")
    memory = tirx.decl_buffer([size], "uint8", "memory")
    place = tirx.address_of(load(memory, [index(0)]))
    call = tirx.call_extern("int32", "optimizer_advise_large_pages", place, size)
    return whole_function([memory], imported(tirx.Evaluate(call), _SOURCE))


@mutator
class _Adviser(PyExprMutator):
    """Adds the advice behind each allocation of large memory whose size is known."""

    def __init__(self, module: tvm.IRModule, advise: tvm.ir.GlobalVar) -> None:
        super().__init__(module)
        self._advise = advise
        self.advised = False

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        super().visit_var_binding_(binding)
        size = _size(binding.value)
        if size is None or size < _LEAST:
            return
        self.advised = True
        storage = self.visit_expr(binding.var)
        whole = self.builder_.emit(relax.op.memory.alloc_tensor(storage, 0, relax.ShapeExpr([size]), "uint8"), "whole")
        self.builder_.emit(tvm.ir.Call(self._advise, [whole], ret_ty=relax.TupleType([])), "advised")


def _size(value: relax.Expr) -> int | None:
    """Return how many bytes a call allocates, None if it allocates none or that is not known."""
    if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.Op):
        return None
    if value.op.name != "relax.memory.alloc_storage" or not isinstance(value.args[0], relax.ShapeExpr):
        return None
    sizes = [each for each in value.args[0].values if isinstance(each, tirx.IntImm)]
    return math.prod(int(each) for each in sizes) if len(sizes) == len(value.args[0].values) else None
