"""Key-value caches appended to in place, instead of copied with every token.

A decoder takes the keys and values of the tokens so far, `past`, and returns those with the new ones added,
    present = concat(past, new)   along the axis of tokens,
which reads and writes the whole cache to add one token. Here the function takes a buffer with room for more tokens,
    buffer[..., length : length + count, ...] = new;   present = buffer[..., : length + count, ...]
and no longer returns `present`: who owns the buffer has it. The number of tokens in the buffer, which the shape of
`past` said, comes as a shape of its own after the inputs; the room in the buffer is a symbol of its own, so that it is
chosen when the package runs.

What was read of `past` and `present` reads the same numbers: `past` may have no reader but the concatenation, nothing
writes to the buffer after it, and readers of `present` read its view of the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site, require
from passes.tensor_types import shape_of

ATTRIBUTE = "kv_caches"
"""The attribute of a rewritten function: the numbers of each `Cache`. The lengths that come after the inputs, and the
capacities, are in the order of the caches, once for each symbol that was a length."""
LENGTHS = "cache_lengths"


@dataclass(frozen=True)
class Cache:
    """A cache of a function: which input it was and which of the outputs, and the axis that tokens lie along."""

    parameter: int
    output: int
    axis: int


@dataclass(frozen=True, eq=False)
class _Append:
    """The concatenation `present` of a function's parameter with `new`."""

    cache: Cache
    past: relax.Var
    length: tirx.Var
    new: relax.Expr
    present: relax.Var


@dataclass(frozen=True)
class RewriteKvCache(Pass):
    """Append the keys and values of new tokens to buffers in place, instead of copying the cache.

    Fires where an input with a symbolic number of tokens is concatenated with something behind it, nobody else reads
    it, and the function returns the result. The function then takes buffers in place of these inputs and one more
    argument, the number of tokens in them, and does not return these outputs.
    """

    name: ClassVar[str] = "rewrite-kv-cache"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite `main`."""
        entry = module.get_global_var("main") if "main" in [v.name_hint for v in module.get_global_vars()] else None
        function = None if entry is None else module[entry]
        if not isinstance(function, relax.Function):
            return PassOutcome(module)
        appends, sites = _appends(function)
        if not appends:
            return PassOutcome(module, sites)
        rewriter = _Rewriter(module, function, appends)
        rewriter.builder_.update_func(entry, rewriter.rewritten())
        return PassOutcome(rewriter.builder_.get(), sites)


def caches_of(function: relax.Function) -> tuple[Cache, ...]:
    """Return the caches that this pass made buffers of in a function."""
    attributes = function.attrs
    if attributes is None or ATTRIBUTE not in attributes:
        return ()
    return tuple(Cache(*(int(number) for number in record)) for record in attributes[ATTRIBUTE])


def _appends(function: relax.Function) -> tuple[list[_Append], tuple[Site, ...]]:
    """Return the caches that can be rewritten, and the account of all that look like one."""
    dataflow = Dataflow(function)
    outputs = _outputs(function, dataflow)
    parameters = {parameter: index for index, parameter in enumerate(function.params)}
    found: list[_Append] = []
    sites: list[Site] = []
    for block in function.body.blocks:
        for binding in block.bindings:
            past = _concatenated_parameter(binding, parameters)
            if past is None:
                continue
            nodes = dataflow.nodes(binding.value)
            try:
                found.append(_checked(binding, parameters[past], dataflow, outputs))
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


def _concatenated_parameter(binding: relax.Binding, parameters: dict[relax.Var, int]) -> relax.Var | None:
    """Return the parameter that a binding puts first in a concatenation, if it does."""
    if not isinstance(binding, relax.VarBinding) or not isinstance(binding.value, tvm.ir.Call):
        return None
    call = binding.value
    if not isinstance(call.op, tvm.ir.Op) or call.op.name != "relax.concat" or call.attrs.axis is None:
        return None
    first = call.args[0].fields[0] if isinstance(call.args[0], relax.Tuple) else None
    return first if isinstance(first, relax.Var) and first in parameters else None


def _checked(binding: relax.VarBinding, parameter: int, dataflow: Dataflow, outputs: Sequence[relax.Expr]) -> _Append:
    past, *added = binding.value.args[0].fields
    require(len(added) == 1, "more than one tensor is put behind the past")
    shape, new_shape = shape_of(past), shape_of(added[0])
    require(shape is not None and new_shape is not None, "a shape is not known")
    assert shape is not None
    axis = int(binding.value.attrs.axis) % len(shape)
    length = shape[axis]
    require(isinstance(length, tirx.Var), "the number of tokens in the past is not a symbol")
    others = [extent for place, extent in enumerate(shape) if place != axis]
    require(not any(length.same_as(extent) for extent in others), "the tokens are on two axes")
    require(dataflow.read_once(past), "the past has another reader, which would see the new tokens")
    places = [place for place, output in enumerate(outputs) if output.same_as(binding.value)]
    require(len(places) == 1, "the function does not return the result, or more than once")
    require(len(outputs) > 1, "the function returns nothing else")
    return _Append(Cache(parameter, places[0], axis), past, length, added[0], binding.var)


@mutator
class _Rewriter(PyExprMutator):
    """Replaces parameters by buffers, concatenations by appending to them, and leaves out what lies in them."""

    def __init__(self, module: tvm.IRModule, function: relax.Function, appends: Sequence[_Append]) -> None:
        super().__init__(module)
        self._function = function
        self._by_present = {append.present: append for append in appends}
        self._appends = appends
        self._result = function.body.body
        self._functions: list[tuple[tirx.PrimFunc, tvm.ir.GlobalVar]] = []
        self._lengths = list(dict.fromkeys(append.length for append in appends))
        capacities = {length: tirx.Var(f"capacity_{n}", "int64") for n, length in enumerate(self._lengths)}
        self._buffers: dict[relax.Var, relax.Var] = {}
        for append in appends:
            shape = list(append.past.ty.shape.values)
            shape[append.cache.axis] = capacities[append.length]
            self._buffers[append.past] = relax.Var(append.past.name, relax.TensorType(shape, append.past.ty.dtype))

    def rewritten(self) -> relax.Function:
        """Return the function with buffers."""
        old = self._function
        lengths = relax.Var(LENGTHS, relax.ShapeType(self._lengths))
        parameters = [*(self._buffers.get(parameter, parameter) for parameter in old.params), lengths]
        body = self.visit_expr(old.body)
        records = [[a.cache.parameter, a.cache.output, a.cache.axis] for a in self._appends]
        function = relax.Function(parameters, body, body.ty, old.is_pure, old.attrs)
        return function.with_attr(ATTRIBUTE, records)

    def visit_var_(self, op: relax.Var) -> relax.Expr:
        """Put buffers in the place of the parameters that they replace."""
        return self._buffers.get(op) or super().visit_var_(op)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Append, and bind the tokens in use of the buffer; leave them out of what the function returns."""
        append = self._by_present.get(binding.var)
        if append is not None:
            binding = relax.VarBinding(binding.var, self.builder_.normalize(self._appended(append)))
        elif binding.var.same_as(self._result) and isinstance(binding.value, relax.Tuple):
            return self._bind_rest(binding)
        super().visit_var_binding_(binding)
        return None

    def _bind_rest(self, binding: relax.VarBinding) -> None:
        gone = {append.cache.output for append in self._appends}
        kept = [self.visit_expr(field) for place, field in enumerate(binding.value.fields) if place not in gone]
        value = self.builder_.normalize(relax.Tuple(kept))
        kind = relax.DataflowVar if isinstance(binding.var, relax.DataflowVar) else relax.Var
        variable = kind(binding.var.name, value.ty)
        self.set_var_remap(binding.var, variable)
        self.builder_.emit_normalized(relax.VarBinding(variable, value))

    def _appended(self, append: _Append) -> relax.Expr:
        buffer, axis = self._buffers[append.past], append.cache.axis
        new = self.visit_expr(append.new)
        function = self._function_of(append)
        call = relax.op.call_tir_inplace(
            function, relax.Tuple([buffer, new, relax.prim_value(append.length)]), [0], buffer.ty
        )
        after = self.builder_.emit(call, f"{append.past.name}_appended")
        total = append.present.ty.shape.values[axis]
        return relax.op.strided_slice(after, [axis], [0], [total], [1], assume_inbound=True)

    def _function_of(self, append: _Append) -> tvm.ir.GlobalVar:
        function = append_function(self._buffers[append.past].ty, append.new.ty, append.cache.axis)
        for other, variable in self._functions:
            if tvm_ffi.structural_equal(other, function):
                return variable
        variable = self.builder_.add_func(function, "append_to_cache")
        self._functions.append((function, variable))
        return variable


def append_function(buffer: relax.TensorType, new: relax.TensorType, axis: int) -> tirx.PrimFunc:
    """Return the function (buffer, new, length) that stores `new` in `buffer` from `length` on along `axis`."""
    symbols: dict[tirx.Var, tirx.Var] = {}

    def own(extent: tvm.ir.Expr) -> tvm.ir.Expr:
        if isinstance(extent, tirx.IntImm):
            return extent
        if isinstance(extent, tirx.Var):
            return symbols.setdefault(extent, tirx.Var(extent.name, "int64"))
        return tirx.Var("extent", "int64")

    target = tirx.decl_buffer([own(extent) for extent in buffer.shape.values], str(buffer.dtype.dtype), "buffer")
    source = tirx.decl_buffer([own(extent) for extent in new.shape.values], str(new.dtype.dtype), "new")
    length = tirx.Var("length", "int64")
    loops = [tirx.Var(f"i{n}", "int64") for n in range(new.ndim)]
    axes = [
        tirx.IterVar(tvm.ir.Range(tirx.IntImm("int64", 0), extent), tirx.Var(f"v{n}", "int64"), tirx.IterVar.DataPar)
        for n, extent in enumerate(source.shape)
    ]
    point = [each.var for each in axes]
    place = [length + value if n == axis else value for n, value in enumerate(point)]
    body: tirx.Stmt = tirx.BufferStore(target, tirx.BufferLoad(source, point), place)
    reads, writes = (
        [tirx.BufferRegion(each, [tvm.ir.Range.from_min_extent(i, 1) for i in indices])]
        for each, indices in ((source, point), (target, place))
    )
    body = s_tir.SBlockRealize(loops, True, s_tir.SBlock(axes, reads, writes, "append", body))
    for variable, each in zip(reversed(loops), reversed(axes), strict=True):
        body = tirx.For(variable, tirx.IntImm("int64", 0), each.dom.extent, tirx.ForKind.SERIAL, body)
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body))
    function = tirx.PrimFunc([target, source, length], root)
    return function.with_attrs({"tirx.noalias": True, "s_tir": True})


__all__ = ["ATTRIBUTE", "Cache", "RewriteKvCache", "append_function", "caches_of"]
