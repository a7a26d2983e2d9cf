"""The rewriting of a function whose caches become buffers: parameters, appending, and what reads the buffers."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
import tvm.ir
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.cache_append import TOKENS, append_by_row_function, append_function, read_ring, scatter_function
from passes.cache_pages import append_to_pages, read_pages
from passes.caches import ATTRIBUTE, LENGTHS, Append, holds_floats
from schedules.cache_pages import READS_IN_PLACE, SCALE_DTYPE, CachePages


@mutator
class CacheRewriter(PyExprMutator):
    """Replaces parameters by buffers, concatenations by appending to them, and leaves out what lies in them."""

    def __init__(
        self,
        module: tvm.IRModule,
        function: relax.Function,
        appends: Sequence[Append],
        dtype: str | None,
        can_fail: bool,
    ) -> None:
        super().__init__(module)
        self._function = function
        self._can_fail = can_fail
        self._by_present = {append.present: append for append in appends}
        self._appends = appends
        self._result = function.body.body
        self._functions: list[tuple[tirx.PrimFunc, tvm.ir.GlobalVar]] = []
        lengths = list(dict.fromkeys(append.length for append in appends))
        paged = [length for length in lengths if any(a.cache.pages and a.length.same_as(length) for a in appends)]
        self._quantized = {length: _symbols(n, "before", "quantized") for n, length in enumerate(paged)}
        self._lengths = [*lengths, *(symbol for pair in self._quantized.values() for symbol in pair)]
        sizes = dict.fromkeys((append.length, append.cache.window) for append in appends)
        capacities = {size: tirx.Var(f"capacity_{n}", "int64") for n, size in enumerate(sizes)}
        rooms = {length: _symbols(n, "codes", "pages", "scales", "recent") for n, length in enumerate(paged)}
        self._buffers: dict[relax.Var, relax.Var] = {}
        self._parts: dict[relax.Var, tuple[relax.Var, relax.Var]] = {}
        for append in appends:
            name, kind, length = append.past.name, append.past.ty, append.length
            if append.cache.pages is None:
                shape = list(kind.shape.values)
                shape[append.cache.axis] = capacities[length, append.cache.window]
                stored = dtype if dtype and holds_floats(append) else kind.dtype
                self._buffers[append.past] = relax.Var(name, relax.TensorType(shape, stored))
            else:
                kinds = _page_types(append, rooms[length])
                self._buffers[append.past] = relax.Var(name, kinds[0])
                self._parts[append.past] = (
                    relax.Var(f"{name}_scales", kinds[1]),
                    relax.Var(f"{name}_recent", kinds[2]),
                )

    def rewritten(self) -> relax.Function:
        """Return the function with buffers."""
        old = self._function
        lengths = relax.Var(LENGTHS, relax.ShapeType(self._lengths))
        inputs = [self._buffers.get(parameter, parameter) for parameter in old.params]
        parts = [part for append in self._appends for part in self._parts.get(append.past, ())]
        parameters = [*inputs, *parts, lengths]
        body = self.visit_expr(old.body)
        records = [append.cache.record() for append in self._appends]
        function = relax.Function(parameters, body, body.ty, old.is_pure, old.attrs)
        return function.with_attr(ATTRIBUTE, records)

    def visit_var_(self, op: relax.Var) -> relax.Expr:
        """Put buffers in the place of the parameters that they replace."""
        buffer = self._buffers.get(op)
        return super().visit_var_(op) if buffer is None else buffer

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Append, and bind the tokens in use of the buffer; leave them out of what the function returns."""
        append = self._by_present.get(binding.var)
        read = self._read_of_ring(binding.value)
        if read is not None:
            self.set_var_remap(binding.var, self.builder_.emit(read, binding.var.name))
        elif append is not None:
            self.set_var_remap(binding.var, self.builder_.emit(self._appended(append), binding.var.name))
        elif binding.var.same_as(self._result) and isinstance(binding.value, relax.Tuple):
            self._bind_rest(binding)
        else:
            super().visit_var_binding_(binding)

    def _bind_rest(self, binding: relax.VarBinding) -> None:
        gone = {append.cache.output for append in self._appends}
        kept = [self.visit_expr(field) for place, field in enumerate(binding.value.fields) if place not in gone]
        value = self.builder_.normalize(relax.Tuple(kept))
        kind = relax.DataflowVar if isinstance(binding.var, relax.DataflowVar) else relax.Var
        variable = kind(binding.var.name, value.ty)
        self.set_var_remap(binding.var, variable)
        self.builder_.emit_normalized(relax.VarBinding(variable, value))

    def _read_of_ring(self, value: relax.Expr) -> relax.Expr | None:
        """Return the read of a ring that takes the place of one of a whole cache."""
        if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        if value.op.name != "relax.call_tir" or READS_IN_PLACE not in (self.builder_.get()[value.args[0]].attrs or {}):
            return None
        present, first = value.args[1].fields[:2]
        append = self._by_present.get(present)
        if append is None or not append.cache.window:
            return None
        ring, dtype = self.visit_expr(present), append.present.ty.dtype.dtype
        read = self.builder_.call_te(
            read_ring,
            ring,
            self.visit_expr(first),
            value.ty_args[0].shape.values[TOKENS],
            primfunc_name_hint="read_ring",
            primfunc_attrs={READS_IN_PLACE: True},
        )
        return read if ring.ty.dtype.dtype == dtype else relax.op.astype(self.builder_.emit(read), dtype)

    def _appended(self, append: Append) -> relax.Expr:
        """Return the tokens in use of the buffer after appending to it."""
        buffer, new = self._buffers[append.past], self.visit_expr(append.new)
        if append.cache.pages is not None:
            return self._appended_to_pages(append, append.cache.pages, new)
        if append.counts is None:
            function = append_function(buffer.ty, new.ty, append.cache.axis)
            arguments = [buffer, new, relax.prim_value(append.length)]
        elif append.is_scattered_to:
            starts = self.visit_expr(append.counts)
            dtype, circular = str(starts.ty.dtype.dtype), append.is_circular
            function = scatter_function(buffer.ty, new.ty, dtype, append.cache.axis, is_circular=circular)
            arguments = [buffer, new, starts, relax.prim_value(append.total)]
        else:
            counts = self.visit_expr(append.counts)
            is_ring = append.cache.window > 0
            function = append_by_row_function(buffer.ty, new.ty, str(counts.ty.dtype.dtype), is_ring=is_ring)
            arguments = [buffer, new, counts, relax.prim_value(append.total)]
        call = relax.op.call_tir_inplace(self._variable_of(function), relax.Tuple(arguments), [0], buffer.ty)
        after = self.builder_.emit(call, f"{append.past.name}_appended")
        if append.cache.window:
            return after
        used = relax.op.strided_slice(after, [append.cache.axis], [0], [append.total], [1], assume_inbound=True)
        dtype = append.present.ty.dtype.dtype
        return used if buffer.ty.dtype.dtype == dtype else relax.op.astype(self.builder_.emit(used), dtype)

    def _appended_to_pages(self, append: Append, pages: CachePages, new: relax.Expr) -> relax.Expr:
        """Return the tokens in use after appending to pages, as floats."""
        buffers = [self._buffers[append.past], *self._parts[append.past]]
        kinds = [buffer.ty for buffer in buffers]
        counts = None if append.counts is None else self.visit_expr(append.counts)
        rows = None if counts is None else str(counts.ty.dtype.dtype)
        function = append_to_pages(pages, kinds, new.ty, rows, self._can_fail)
        before, quantized = self._quantized[append.length]
        numbers = [relax.prim_value(each) for each in (append.length, before, quantized, append.total)]
        arguments = relax.Tuple([*buffers, new, *([] if counts is None else [counts]), *numbers])
        call = relax.op.call_tir_inplace(self._variable_of(function), arguments, [0, 1, 2], kinds)
        after = self.builder_.emit(call, f"{append.past.name}_appended")
        stored = [self.builder_.emit(relax.TupleGetItem(after, place)) for place in range(len(buffers))]
        floats = self.builder_.call_te(
            read_pages(pages),
            *stored,
            quantized,
            append.total,
            primfunc_name_hint="read_cache",
            primfunc_attrs={READS_IN_PLACE: True},
        )
        dtype = append.present.ty.dtype.dtype
        return floats if dtype == "float32" else relax.op.astype(self.builder_.emit(floats), dtype)

    def _variable_of(self, function: tirx.PrimFunc) -> tvm.ir.GlobalVar:
        for other, variable in self._functions:
            if tvm_ffi.structural_equal(other, function):
                return variable
        variable = self.builder_.add_func(function, "append_to_cache")
        self._functions.append((function, variable))
        return variable


def _symbols(number: int, *names: str) -> tuple[tirx.Var, ...]:
    return tuple(tirx.Var(f"{name}_{number}", "int64") for name in names)


def _page_types(append: Append, rooms: Sequence[tirx.Var]) -> list[relax.TensorType]:
    """Return the types of a quantized cache's codes, scales and recent tokens."""
    batch, heads, _, channels = append.past.ty.shape.values
    codes, pages, scales, recent = rooms
    by_channel = append.cache.pages is not None and append.cache.pages.by_channel
    places = [pages, 2, channels] if by_channel else [scales, 2]
    return [
        relax.TensorType([batch, heads, codes, channels], "uint8"),
        relax.TensorType([batch, heads, *places], SCALE_DTYPE),
        relax.TensorType([batch, heads, recent, channels], append.present.ty.dtype),
    ]
