"""Key-value caches appended to in place, instead of copied with every token.

A decoder takes the keys and values of the tokens so far, `past`, and returns those with the new ones added,
    present = concat(past, new)   along the axis of tokens,
which reads and writes the whole cache to add one token. Here the function takes a buffer with room for more tokens,
    buffer[..., length : length + count, ...] = new;   present = buffer[..., : length + count, ...]
and no longer returns `present`: who owns the buffer has it. The number of tokens in the buffer, which the shape of
`past` said, comes as a shape of its own after the inputs; the room in the buffer is a symbol of its own, so that it is
chosen when the package runs.

GroupQueryAttention puts the new tokens of each row behind its own number of tokens, and zeros behind those.
TensorScatter writes them anywhere in a cache that has room for all tokens from the start: there the number of tokens in
the buffer is that room, before and after. A cache of a sliding window that comes and goes with its newest tokens alone
is appended to where it is one of all tokens; the buffer is a ring, to which its layout means nothing.

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
from tvm import relax, tirx

from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site, require
from passes.cache_append import APPENDS_BY_ROW, CIRCULAR, NEWEST_TOKENS, SCATTERS, TOKENS, WINDOW
from passes.cache_readers import summed_axes
from passes.cache_rewriter import CacheRewriter
from passes.caches import FLOATS, Append, Cache, caches_of, holds_floats
from passes.defined_dimensions import defined_dimensions, without_unused_dimensions
from passes.pipeline import PassOptionError
from passes.tensor_types import shape_of
from schedules.cache_pages import CachePages

MODEL = "model"
BITS = {"int8": 8, "int4": 4}
"""The types of quantized caches (`schedules/cache_pages.py`), and how many bits a code has."""
TYPES = (MODEL, *FLOATS, *BITS)


@dataclass(frozen=True, eq=False)
class _Extension:
    """A tensor with others put behind it along an axis: in each row behind `counts[row]` tokens, if those are given.

    Or, if it `is_scattered_to`, one of the same size with another written into it, in each row from `counts[row]` on.
    Of a past that holds the newest tokens alone it is all tokens that are extended.
    """

    past: relax.Var
    added: tuple[relax.Expr, ...]
    axis: int
    counts: relax.Expr | None = None
    is_scattered_to: bool = False
    is_circular: bool = False
    holds_newest: bool = False


@dataclass(frozen=True)
class RewriteKvCache(Pass):
    """Append the keys and values of new tokens to buffers in place, instead of copying the cache.

    Fires where an input with a symbolic number of tokens is concatenated with something behind it, or extended as
    GroupQueryAttention or TensorScatter does, nobody else reads it, and the function returns the result. The function
    then takes buffers in place of these inputs and one more argument, the number of tokens in them, and does not return
    these outputs.
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
        """Rewrite `main`, without what nobody reads: an append that such code alone reads would go with it."""
        given, module = module, relax.transform.DeadCodeElimination()(module)
        entry = module.get_global_var("main") if "main" in [v.name_hint for v in module.get_global_vars()] else None
        function = None if entry is None else module[entry]
        if not isinstance(function, relax.Function):
            return PassOutcome(given)
        appends, sites = _appends(module, function, self.dtype)
        if not appends:
            return PassOutcome(given, sites)
        rewriter = CacheRewriter(module, function, appends, FLOATS.get(self.dtype), self.can_fail)
        rewriter.builder_.update_func(entry, without_unused_dimensions(rewriter.rewritten()))
        return PassOutcome(relax.transform.DeadCodeElimination()(rewriter.builder_.get()), sites)


def _appends(module: tvm.IRModule, function: relax.Function, dtype: str) -> tuple[list[Append], tuple[Site, ...]]:
    """Return the caches that can be rewritten, and the account of all that look like one.

    They are to hold `dtype`, one of the `TYPES`.
    """
    dataflow = Dataflow(function)
    outputs = _outputs(function, dataflow)
    dimensions = defined_dimensions(function)
    parameters = {parameter: index for index, parameter in enumerate(function.params)}
    rooms: dict[int, tirx.Var] = {}
    found: list[Append] = []
    sites: list[Site] = []
    for block in function.body.blocks:
        for binding in block.bindings:
            extension = _extension(module, binding, dataflow)
            if extension is None or extension.past not in parameters:
                continue
            nodes = dataflow.nodes(binding.value)
            try:
                returned = [_returned(output, extension, dataflow, module) for output in outputs]
                append = _checked(binding, extension, parameters, dataflow, outputs, returned)
                if extension.holds_newest:
                    require(_window(append, module, function, dataflow) > 0, "more than its window is read of it")
                    counted_by = _counted_by(append.total, function)
                    append = replace(append, cache=replace(append.cache, counted_by=counted_by))
                if isinstance(append.total, tirx.IntImm):
                    room = int(append.total.value)
                    append = replace(append, length=rooms.setdefault(room, tirx.Var("room", "int64")))
                total = _of_dimensions(dimensions.get(append.total, append.total), function)
            except Refusal as refusal:
                sites.append(Site(binding.var.name, str(refusal), nodes))
                continue
            sites.append(Site(binding.var.name, None, nodes))
            try:
                append = replace(append, cache=_stored(append, dtype, module, function, dataflow))
            except Refusal as refusal:
                kept = "not quantized" if dtype in BITS else f"not stored as {dtype}"
                sites.append(Site(binding.var.name, f"{kept}: {refusal}", nodes))
            found.append(replace(append, total=total))
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
    attributes = module[call.args[0]].attrs or {} if name == "relax.call_tir" else {}
    if not (APPENDS_BY_ROW in attributes or SCATTERS in attributes):
        return None
    past, added, counts = call.args[1].fields
    past = _cast_from(past, dataflow)
    newest = _newest_tokens(past, dataflow, module) if dataflow.read_once(past) else None
    past = past if newest is None else newest
    if not isinstance(past, relax.Var):
        return None
    if APPENDS_BY_ROW in attributes:
        return _Extension(past, (added,), TOKENS, counts, holds_newest=newest is not None)
    return _Extension(past, (added,), int(attributes[SCATTERS]), counts, True, bool(attributes[CIRCULAR]))


def _newest_tokens(expr: relax.Expr, dataflow: Dataflow, module: tvm.IRModule) -> relax.Expr | None:
    """Return the cache that an expression gives the newest tokens of, or that it has them from; else None."""
    call = dataflow.call(expr, "relax.call_tir")
    if call is None or NEWEST_TOKENS not in (module[call.args[0]].attrs or {}):
        return None
    return call.args[1].fields[0]


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
    returned: Sequence[relax.Expr],
) -> Append:
    past, axis = extension.past, extension.axis
    require(len(extension.added) == 1, "more than one tensor is put behind the past")
    (new,) = extension.added
    shape, result = shape_of(past), shape_of(binding.var)
    require(shape is not None and result is not None and shape_of(new) is not None, "a shape is not known")
    assert shape is not None
    assert result is not None
    length = shape[axis]
    is_number = extension.is_scattered_to and isinstance(length, tirx.IntImm)
    require(is_number or isinstance(length, tirx.Var), "the number of tokens in the past is not a symbol")
    others = [extent for place, extent in enumerate(shape) if place != axis]
    require(is_number or not any(length.same_as(extent) for extent in others), "the tokens are on two axes")
    require(dataflow.read_once(past), "the past has another reader, which would see the new tokens")
    places = [place for place, output in enumerate(returned) if output.same_as(binding.value)]
    require(len(places) == 1, "the function does not return the result, or more than once")
    require(len(outputs) > 1, "the function returns nothing else")
    # An append that nothing reads would be eliminated as dead code.
    require(not dataflow.read_once(binding.var), "nothing but the caller reads the result")
    declared = str(past.ty.dtype.dtype)
    require(str(outputs[places[0]].ty.dtype.dtype) == declared, f"the input is {declared} and the output is not")
    cache = Cache(parameters[past], places[0], axis)
    return Append(
        cache,
        past,
        length,
        new,
        extension.counts,
        binding.var,
        result[axis],
        extension.is_scattered_to,
        extension.is_circular,
    )


def _stored(append: Append, dtype: str, module: tvm.IRModule, function: relax.Function, dataflow: Dataflow) -> Cache:
    """Return an append's cache as it is best stored: a ring, codes, or as the input is, in one of the `TYPES`.

    Refuses codes for what cannot have them, and another type for what are codes already.
    """
    window = _window(append, module, function, dataflow)
    if window:
        return replace(append.cache, window=window)
    require(dtype == MODEL or holds_floats(append), "the model stores codes of its own")
    return _quantized(append, BITS[dtype], function, dataflow) if dtype in BITS else append.cache


def _window(append: Append, module: tvm.IRModule, function: relax.Function, dataflow: Dataflow) -> int:
    """Return the sliding window of a cache that nothing reads but for those tokens, else 0."""

    def attribute(expr: relax.Expr) -> int:
        call = dataflow.call(expr, "relax.call_tir")
        attributes = {} if call is None else module[call.args[0]].attrs or {}
        return int(attributes[WINDOW]) if WINDOW in attributes else 0

    window = attribute(append.present)
    if not window:
        return 0
    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            reads = isinstance(value, tvm.ir.Call) and any(
                append.present.same_as(variable) for variable in relax.analysis.free_vars(value)
            )
            if reads and attribute(binding.var) != window:
                return 0
    return window


def _quantized(append: Append, bits: int, function: relax.Function, dataflow: Dataflow) -> Cache:
    """Return an append's cache with the layout that fits what reads it; refuses one that is neither keys nor values."""
    ndim, axis = append.past.ty.ndim, append.cache.axis
    require(not append.is_scattered_to, "tokens are written anywhere in it, so none are known to be the newest")
    require(ndim == 4 and axis == TOKENS, "only [batch, heads, tokens, channels] can be quantized")
    summed = summed_axes(function, dataflow, append.present)
    require(summed in ({axis}, {ndim - 1}), "it is read neither as keys nor as values alone")
    return replace(append.cache, pages=CachePages(bits, by_channel=summed == {ndim - 1}))


def _of_dimensions(total: tvm.ir.Expr, function: relax.Function) -> tvm.ir.Expr:
    """Return the number of all tokens; refuses one that is not computed from the inputs' dimensions."""
    known = [symbol for each in function.params for symbol in relax.analysis.definable_tir_vars_in_type(each.ty)]
    symbols = tirx.analysis.undefined_vars(tirx.Evaluate(total), [])
    is_known = all(any(symbol.same_as(other) for other in known) for symbol in symbols)
    require(is_known, "how many tokens there are in all is an input's value, and no dimension")
    return total


def _counted_by(total: tvm.ir.Expr, function: relax.Function) -> tuple[int, int]:
    """Return the input, and the axis of it, whose size is the number of all tokens."""
    for number, parameter in enumerate(function.params):
        for axis, extent in enumerate(shape_of(parameter) or ()):
            if isinstance(extent, tirx.Var) and extent.same_as(total):
                return number, axis
    raise Refusal("no input says by a dimension how many tokens there are in all")


def _returned(output: relax.Expr, extension: _Extension, dataflow: Dataflow, module: tvm.IRModule) -> relax.Expr:
    """Return what an output is a cast of, or what it has the newest tokens of; else the output."""
    if extension.holds_newest:
        tokens = _newest_tokens(output, dataflow, module)
        return output if tokens is None else dataflow.producer(tokens)
    cast = dataflow.call(output, "relax.astype")
    return output if cast is None else dataflow.producer(cast.args[0])


__all__ = ["BITS", "FLOATS", "Cache", "RewriteKvCache", "caches_of"]
