"""The kernels of a decoder's layer in one launch where a step has a single row.

Such a step launches some hundred kernels of a few microseconds, of which each wakes all threads and waits for them, and
the virtual machine checks the arguments of each. Layers repeat the same kernels: here those of each layer after
the first become one function (`schedules/one_launch.py`). That has to come when memory is planned: the kernels then are
a list of calls that write where they are told to, so that nothing has to be known of what they hand on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
import tvm.ir
import tvm_ffi
from tvm import relax, tirx

from optimizer.package.manifest import SEVERAL_KERNELS
from passes.caches import caches_of
from schedules.one_launch import Part, SeveralLaunchesError, in_one_launch
from schedules.report import is_scheduled
from schedules.stages import substitute
from targets.base import Target

ENTRY = "main"
# Kernels that a function may have, and how often at least it has to be called: code has its size and takes its time.
MOST_KERNELS = 64
LEAST_CALLS = 2
# What says where something lies, and what drops a reference: neither computes anything.
_PLACES = frozenset({"relax.memory.alloc_storage", "relax.memory.alloc_tensor", "relax.reshape"})
_ENDS = frozenset({"relax.memory.kill_storage", "relax.memory.kill_tensor", "relax.vm.kill_object"})
_NOTHING = relax.TupleType([])


def launch_layers_once(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Return the module, whose memory is planned and freed, with a second way through layers for a single row.

    Which way to go is asked once a call. What has no caches, repeats no kernels, or makes no single launch of them
    stays as it is.
    """
    if target.device != "cpu" or ENTRY not in {variable.name_hint for variable in module.get_global_vars()}:
        return module
    function = module[ENTRY]
    if not isinstance(function.body, relax.SeqExpr) or not caches_of(function):
        return module
    merger = _Merger(module, target)
    blocks = [relax.BindingBlock(merger.merged(list(block.bindings))) for block in function.body.blocks]
    if merger.module is module:
        return module
    body = relax.SeqExpr(blocks, function.body.body)
    result = tvm.IRModule(dict(merger.module.functions), attrs=module.attrs, global_infos=module.global_infos)
    result.update_func(
        module.get_global_var(ENTRY),
        relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs),
    )
    return relax.transform.Normalize()(result)


@dataclass(frozen=True)
class _Call:
    """A call of a kernel: where it stands among the bindings, and the function."""

    position: int
    call: tvm.ir.Call


@dataclass(frozen=True)
class _Layer:
    """The function that does what the calls of a layer do where `alone` holds."""

    function: tvm.ir.GlobalVar
    alone: tvm.ir.Expr


class _Merger:
    """Merges calls of a function's bindings; `module` gains the functions that they call."""

    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        self.module = module
        self._target = target
        self._made: dict[tvm_ffi.StructuralKey, _Layer | None] = {}

    def merged(self, bindings: Sequence[relax.Binding]) -> list[relax.Binding]:
        """Return the bindings with a choice in the place of the layers of each run: one call for each, or all calls."""
        result: list[relax.Binding] = []
        done = 0
        for calls in self._runs(bindings):
            layers = _layers(calls)
            if LEAST_CALLS * len({_pattern(layer) for layer in layers}) > len(layers):
                continue  # too many of them pass on otherwise than the others
            known = [self._layer(layer) for layer in layers]
            merged = [each for each in known if each is not None]
            if not merged or len(merged) < len(known):
                continue
            apart = [call for layer in layers for call in layer]
            first, last = apart[0].position, apart[-1].position
            own = {call.position for call in apart}
            around = [bindings[place] for place in range(first, last + 1) if place not in own]
            together = [
                tvm.ir.Call(each.function, _arguments(layer)[0], ret_ty=layer[0].call.ty)
                for each, layer in zip(merged, layers, strict=True)
            ]
            alone = relax.Var("alone", tvm.ir.PrimType("bool"))
            choice = relax.If(alone, _branch(together), _branch([call.call for call in apart]))
            result += [*bindings[done:first], *(each for each in around if _operator(each) not in _ENDS)]
            result += [
                relax.VarBinding(alone, merged[0].alone),
                relax.VarBinding(relax.Var("layers", _NOTHING), choice),
            ]
            result += [each for each in around if _operator(each) in _ENDS]
            done = last + 1
        return [*result, *bindings[done:]]

    def _runs(self, bindings: Sequence[relax.Binding]) -> list[list[_Call]]:
        """Return the longest lists of calls between which nothing is computed."""
        runs: list[list[_Call]] = [[]]
        for position, binding in enumerate(bindings):
            value = binding.value if isinstance(binding, relax.VarBinding) else binding
            if isinstance(value, tvm.ir.Call) and self._is_kernel(value.op):
                runs[-1].append(_Call(position, value))
            elif not isinstance(value, relax.TupleGetItem) and _operator(binding) not in _PLACES | _ENDS:
                runs.append([])
        return runs

    def _is_kernel(self, callee: tvm.ir.Expr) -> bool:
        function = self.module[callee] if isinstance(callee, tvm.ir.GlobalVar) else None
        return isinstance(function, tirx.PrimFunc) and is_scheduled(function)

    def _layer(self, layer: Sequence[_Call]) -> _Layer | None:
        """Return the function for the calls of a layer, made once for all that pass on alike; None if there is none."""
        key = _pattern(layer)
        if key not in self._made:
            self._made[key] = self._new_layer(layer)
        return self._made[key]

    def _new_layer(self, layer: Sequence[_Call]) -> _Layer | None:
        arguments, places = _arguments(layer)
        symbols: dict[tirx.Var, tvm.ir.Expr] = {}
        parameters = [_parameter(argument, place, symbols) for place, argument in enumerate(arguments)]
        parts = [
            Part(self.module[each.call.op], tuple(parameters[places[_key(argument)]] for argument in each.call.args))
            for each in layer
        ]
        try:
            ones = _symbols_of_all(parts)
            function = in_one_launch(parts, parameters, ones, self._target)
        except SeveralLaunchesError:
            return None
        alone = [outside.equal(tirx.IntImm("int64", 1)) for outside, own in symbols.items() if own in ones]
        builder = relax.BlockBuilder(self.module)  # it gives the function's variable a type
        variable = builder.add_func(function, f"{SEVERAL_KERNELS}{len(layer)}_kernels")
        self.module = builder.get()
        return _Layer(variable, tirx.all(*alone))


def _pattern(layer: Sequence[_Call]) -> tvm_ffi.StructuralKey:
    """Return what layers have in common that one function can do: kernels, what these pass on, and types."""
    arguments, places = _arguments(layer)
    names = [each.call.op.name_hint for each in layer]
    passed = [[places[_key(argument)] for argument in each.call.args] for each in layer]
    return tvm_ffi.StructuralKey(tvm_ffi.convert([names, passed, [argument.ty for argument in arguments]]))


def _branch(calls: Sequence[tvm.ir.Call]) -> relax.SeqExpr:
    bindings = [relax.VarBinding(relax.Var("_", call.ty), call) for call in calls]
    return relax.SeqExpr([relax.BindingBlock(bindings)], relax.Tuple([]))


def _operator(binding: relax.Binding) -> str:
    """Return the name of the operator that a binding applies; none where it applies none."""
    value = binding.value if isinstance(binding, relax.VarBinding) else binding
    return value.op.name if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op) else ""


def _layers(calls: Sequence[_Call]) -> list[Sequence[_Call]]:
    """Return the longest part of a list that repeats the same functions, by its repetitions; empty if none does."""
    names = [each.call.op.name_hint for each in calls]
    best, layers = 0, []
    for period in range(2, min(MOST_KERNELS, len(names) // LEAST_CALLS) + 1):
        equal = 0  # how many functions before a position are those of a period earlier
        for position in range(period, len(names) + 1):
            if position < len(names) and names[position] == names[position - period]:
                equal += 1
                continue
            times = equal // period + 1
            if times >= LEAST_CALLS and times * period > best:
                begin = position - equal - period
                best = times * period
                layers = [calls[begin + i * period : begin + (i + 1) * period] for i in range(times)]
            equal = 0
    return layers


def _arguments(layer: Sequence[_Call]) -> tuple[list[tvm.ir.Expr], dict[object, int]]:
    """Return what the calls take, each once, and the position of each."""
    arguments: list[tvm.ir.Expr] = []
    numbers: dict[object, int] = {}
    for each in layer:
        for argument in each.call.args:
            key = _key(argument)
            if key not in numbers:
                numbers[key] = len(arguments)
                arguments.append(argument)
    return arguments, numbers


def _key(argument: tvm.ir.Expr) -> object:
    return argument if isinstance(argument, tvm.ir.Var) else tvm_ffi.StructuralKey(argument)


def _parameter(argument: tvm.ir.Expr, place: int, symbols: dict[tirx.Var, tvm.ir.Expr]) -> tirx.Var:
    """Return the parameter for an argument; symbols of shapes get variables of the function's own."""
    if not isinstance(argument.ty, relax.TensorType):
        return tirx.Var(f"number_{place}", argument.ty)
    shape = argument.ty.shape.values
    for symbol in _symbols_in(shape):
        symbols.setdefault(symbol, tirx.Var(symbol.name, symbol.ty))
    return tirx.decl_buffer(
        [substitute(extent, symbols) for extent in shape], str(argument.ty.dtype), f"tensor_{place}"
    )


def _symbols_of_all(parts: Sequence[Part]) -> list[tirx.Var]:
    """Return the symbols that the shapes of every part have, which are those of its rows."""
    shapes = [
        [extent for argument in part.arguments if tirx.is_buffer_var(argument) for extent in argument.shape]
        for part in parts
    ]
    first, *others = [_symbols_in(extents) for extents in shapes]
    common = [each for each in first if all(each in other for other in others)]
    if not common:
        raise SeveralLaunchesError("no size is one of all kernels")
    return common


def _symbols_in(extents: Sequence[tvm.ir.Expr]) -> list[tirx.Var]:
    """Return the symbols of some expressions, in order of their first occurrence."""
    found = [tirx.analysis.undefined_vars(tirx.Evaluate(extent), []) for extent in extents]
    return list(dict.fromkeys(symbol for symbols in found for symbol in symbols))
