"""Key-value caches appended to in place, instead of copied with every token.

A decoder takes the keys and values of the tokens so far, `past`, and returns those with the new ones added,
    present = concat(past, new)   along the axis of tokens,
which reads and writes the whole cache to add one token. Here the function takes a buffer with room for more tokens,
    buffer[..., length : length + count, ...] = new;   present = buffer[..., : length + count, ...]
and no longer returns `present`: who owns the buffer has it. The number of tokens in the buffer, which the shape of
`past` said, comes as a shape of its own after the inputs; the room in the buffer is a symbol of its own, so that it is
chosen when the package runs.

GroupQueryAttention puts the new tokens of each row behind its own number of tokens, and zeros behind those.

What was read of `past` and `present` reads the same numbers: `past` may have no reader but the concatenation, nothing
writes to the buffer after it, and readers of `present` read its view of the buffer. Where the buffer holds a narrower
type than the model computes with, new tokens are rounded when they are stored, and read rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import tvm
import tvm.ir
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site, require
from passes.cache_append import APPENDS_BY_ROW, TOKENS, append_by_row_function, append_function
from passes.cache_pages import append_to_pages, read_pages
from passes.cache_readers import summed_axes
from passes.defined_dimensions import defined_dimensions, without_unused_dimensions
from passes.pipeline import PassOptionError
from passes.tensor_types import shape_of
from schedules.cache_pages import READS_PAGES, SCALE_DTYPE, CachePages

ATTRIBUTE = "kv_caches"
"""The attribute of a rewritten function: the numbers of each `Cache`. The lengths that come after the inputs, and the
capacities, are in the order of the caches, once for each symbol that was a length."""
LENGTHS = "cache_lengths"
MODEL = "model"
FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The float types of caches, by the names that the command line has for them."""
BITS = {"int8": 8, "int4": 4}
"""The types of quantized caches (`schedules/cache_pages.py`), and how many bits a code has."""
TYPES = (MODEL, *FLOATS, *BITS)


@dataclass(frozen=True)
class Cache:
    """A cache of a function: which input it was and which of the outputs, and the axis that tokens lie along.

    A quantized one has `pages`. Its codes take the place of the input; its scales and recent tokens come after all
    inputs, in the order of the caches.
    """

    parameter: int
    output: int
    axis: int
    pages: CachePages | None = None

    def record(self) -> list[int]:
        """Return the numbers that `caches_of` reads."""
        numbers = [self.parameter, self.output, self.axis]
        return numbers if self.pages is None else [*numbers, self.pages.bits, int(self.pages.by_channel)]

    @staticmethod
    def from_record(numbers: Sequence[int]) -> Cache:
        """Return the cache that `record` describes."""
        parameter, output, axis, *layout = (int(number) for number in numbers)
        return Cache(parameter, output, axis, CachePages(layout[0], bool(layout[1])) if layout else None)


@dataclass(frozen=True, eq=False)
class _Extension:
    """A tensor with others put behind it along an axis: in each row behind `counts[row]` tokens, if those are given."""

    past: relax.Var
    added: tuple[relax.Expr, ...]
    axis: int
    counts: relax.Expr | None = None


@dataclass(frozen=True, eq=False)
class _Append:
    """What a cache of `length` tokens is extended by, and what the result of `total` tokens is bound to.

    `past` is the parameter, from which the extended tensor may be cast.
    """

    cache: Cache
    past: relax.Var
    length: tirx.Var
    new: relax.Expr
    counts: relax.Expr | None
    present: relax.Var
    total: tvm.ir.Expr


@dataclass(frozen=True)
class RewriteKvCache(Pass):
    """Append the keys and values of new tokens to buffers in place, instead of copying the cache.

    Fires where an input with a symbolic number of tokens is concatenated with something behind it, or extended as
    GroupQueryAttention does, nobody else reads it, and the function returns the result. The function then takes buffers
    in place of these inputs and one more argument, the number of tokens in them, and does not return these outputs.
    What is concatenated may be a cast of the input, and the output a cast of the result. `dtype` is what the buffers
    hold: fp32, fp16, bf16, or the type of the model's input; or int8 or int4 with scales, keys by channel and values by
    token, and the newest tokens as they are. `can_fail` says that code can stop with an error, as on a CPU.
    """

    name: ClassVar[str] = "rewrite-kv-cache"
    dtype: str = MODEL
    can_fail: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise PassOptionError(f"a cache cannot hold '{self.dtype}'; choose one of {', '.join(TYPES)}")

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite `main`."""
        entry = module.get_global_var("main") if "main" in [v.name_hint for v in module.get_global_vars()] else None
        function = None if entry is None else module[entry]
        if not isinstance(function, relax.Function):
            return PassOutcome(module)
        appends, sites = _appends(module, function, BITS.get(self.dtype))
        if not appends:
            return PassOutcome(module, sites)
        rewriter = _Rewriter(module, function, appends, FLOATS.get(self.dtype), self.can_fail)
        rewriter.builder_.update_func(entry, without_unused_dimensions(rewriter.rewritten()))
        return PassOutcome(relax.transform.DeadCodeElimination()(rewriter.builder_.get()), sites)


def caches_of(function: relax.Function) -> tuple[Cache, ...]:
    """Return the caches that this pass made buffers of in a function."""
    attributes = function.attrs
    if attributes is None or ATTRIBUTE not in attributes:
        return ()
    return tuple(Cache.from_record(record) for record in attributes[ATTRIBUTE])


def _appends(
    module: tvm.IRModule, function: relax.Function, bits: int | None
) -> tuple[list[_Append], tuple[Site, ...]]:
    """Return the caches that can be rewritten, and the account of all that look like one.

    They are to have codes of `bits`, if that is given.
    """
    dataflow = Dataflow(function)
    outputs = _outputs(function, dataflow)
    dimensions = defined_dimensions(function)
    parameters = {parameter: index for index, parameter in enumerate(function.params)}
    found: list[_Append] = []
    sites: list[Site] = []
    for block in function.body.blocks:
        for binding in block.bindings:
            extension = _extension(module, binding, dataflow)
            if extension is None or extension.past not in parameters:
                continue
            nodes = dataflow.nodes(binding.value)
            try:
                append = _checked(binding, extension, parameters, dataflow, outputs)
                if bits is not None:
                    append = replace(append, cache=_quantized(append, bits, function, dataflow))
                found.append(replace(append, total=dimensions.get(append.total, append.total)))
            except Refusal as refusal:
                sites.append(Site(binding.var.name, str(refusal), nodes))
            else:
                sites.append(Site(binding.var.name, None, nodes))
    return found, tuple(sites)


def _outputs(function: relax.Function, dataflow: Dataflow) -> list[relax.Expr]:
    """Return what a function returns, each as what produces it."""
    result = dataflow.producer(function.body.body)
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    return [dataflow.producer(field) for field in fields]


def _extension(module: tvm.IRModule, binding: relax.Binding, dataflow: Dataflow) -> _Extension | None:
    """Return the extension that a binding's value is, if it is one of a variable, or of a cast of one."""
    if not isinstance(binding, relax.VarBinding) or not isinstance(binding.value, tvm.ir.Call):
        return None
    call = binding.value
    name = call.op.name if isinstance(call.op, tvm.ir.Op) else ""
    if name == "relax.concat" and call.attrs.axis is not None and isinstance(call.args[0], relax.Tuple):
        past, *added = call.args[0].fields
        past, axis = _cast_from(past, dataflow), int(call.attrs.axis) % call.ty.ndim
        return _Extension(past, tuple(added), axis) if isinstance(past, relax.Var) else None
    if name == "relax.call_tir" and APPENDS_BY_ROW in (module[call.args[0]].attrs or {}):
        past, added, counts = call.args[1].fields
        past = _cast_from(past, dataflow)
        return _Extension(past, (added,), TOKENS, counts) if isinstance(past, relax.Var) else None
    return None


def _cast_from(expr: relax.Expr, dataflow: Dataflow) -> relax.Expr:
    """Return what an expression is a cast of, if nothing else reads the cast; else the expression."""
    cast = dataflow.call(expr, "relax.astype")
    return cast.args[0] if cast is not None and dataflow.read_once(expr) else expr


def _checked(
    binding: relax.VarBinding,
    extension: _Extension,
    parameters: Mapping[relax.Var, int],
    dataflow: Dataflow,
    outputs: Sequence[relax.Expr],
) -> _Append:
    past, axis = extension.past, extension.axis
    require(len(extension.added) == 1, "more than one tensor is put behind the past")
    (new,) = extension.added
    shape, result = shape_of(past), shape_of(binding.var)
    require(shape is not None and result is not None and shape_of(new) is not None, "a shape is not known")
    assert shape is not None
    assert result is not None
    length = shape[axis]
    require(isinstance(length, tirx.Var), "the number of tokens in the past is not a symbol")
    others = [extent for place, extent in enumerate(shape) if place != axis]
    require(not any(length.same_as(extent) for extent in others), "the tokens are on two axes")
    require(dataflow.read_once(past), "the past has another reader, which would see the new tokens")
    returned = (_uncast(output, dataflow) for output in outputs)
    places = [place for place, output in enumerate(returned) if output.same_as(binding.value)]
    require(len(places) == 1, "the function does not return the result, or more than once")
    require(len(outputs) > 1, "the function returns nothing else")
    declared = str(past.ty.dtype.dtype)
    require(str(outputs[places[0]].ty.dtype.dtype) == declared, f"the input is {declared} and the output is not")
    cache = Cache(parameters[past], places[0], axis)
    return _Append(cache, past, length, new, extension.counts, binding.var, result[axis])


def _quantized(append: _Append, bits: int, function: relax.Function, dataflow: Dataflow) -> Cache:
    """Return an append's cache with the layout that fits what reads it; refuses one that is neither keys nor values."""
    ndim, axis = append.past.ty.ndim, append.cache.axis
    require(ndim == 4 and axis == TOKENS, "only [batch, heads, tokens, channels] can be quantized")
    summed = summed_axes(function, dataflow, append.present)
    require(summed in ({axis}, {ndim - 1}), "it is read neither as keys nor as values alone")
    return replace(append.cache, pages=CachePages(bits, by_channel=summed == {ndim - 1}))


def _uncast(output: relax.Expr, dataflow: Dataflow) -> relax.Expr:
    cast = dataflow.call(output, "relax.astype")
    return output if cast is None else dataflow.producer(cast.args[0])


@mutator
class _Rewriter(PyExprMutator):
    """Replaces parameters by buffers, concatenations by appending to them, and leaves out what lies in them."""

    def __init__(
        self,
        module: tvm.IRModule,
        function: relax.Function,
        appends: Sequence[_Append],
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
        capacities = {length: tirx.Var(f"capacity_{n}", "int64") for n, length in enumerate(lengths)}
        rooms = {length: _symbols(n, "codes", "pages", "scales", "recent") for n, length in enumerate(paged)}
        self._buffers: dict[relax.Var, relax.Var] = {}
        self._parts: dict[relax.Var, tuple[relax.Var, relax.Var]] = {}
        for append in appends:
            name, kind, length = append.past.name, append.past.ty, append.length
            if append.cache.pages is None:
                shape = list(kind.shape.values)
                shape[append.cache.axis] = capacities[length]
                self._buffers[append.past] = relax.Var(name, relax.TensorType(shape, dtype or kind.dtype))
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
        if append is not None:
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

    def _appended(self, append: _Append) -> relax.Expr:
        """Return the tokens in use of the buffer after appending to it."""
        buffer, new = self._buffers[append.past], self.visit_expr(append.new)
        if append.cache.pages is not None:
            return self._appended_to_pages(append, append.cache.pages, new)
        if append.counts is None:
            function = append_function(buffer.ty, new.ty, append.cache.axis)
            arguments = [buffer, new, relax.prim_value(append.length)]
        else:
            counts = self.visit_expr(append.counts)
            function = append_by_row_function(buffer.ty, new.ty, str(counts.ty.dtype.dtype))
            arguments = [buffer, new, counts, relax.prim_value(append.total)]
        call = relax.op.call_tir_inplace(self._variable_of(function), relax.Tuple(arguments), [0], buffer.ty)
        after = self.builder_.emit(call, f"{append.past.name}_appended")
        used = relax.op.strided_slice(after, [append.cache.axis], [0], [append.total], [1], assume_inbound=True)
        dtype = append.present.ty.dtype.dtype
        return used if buffer.ty.dtype.dtype == dtype else relax.op.astype(self.builder_.emit(used), dtype)

    def _appended_to_pages(self, append: _Append, pages: CachePages, new: relax.Expr) -> relax.Expr:
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
            primfunc_attrs={READS_PAGES: [pages.bits, int(pages.by_channel)]},
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


def _page_types(append: _Append, rooms: Sequence[tirx.Var]) -> list[relax.TensorType]:
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


__all__ = ["ATTRIBUTE", "BITS", "FLOATS", "Cache", "RewriteKvCache", "caches_of"]
