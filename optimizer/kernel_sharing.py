"""One kernel for quantized layers that differ in scales and zero points alone.

Those are other numbers in every layer, and TVM writes them into the function of each: a transformer of twelve equal
layers then has twelve times as many kernels to schedule, to generate code for and to tune as it needs, and no tuning
decision holds once the model has been calibrated anew. Here functions that are equal but for such numbers become one,
which takes those that differ as tensors without axes.

Only numbers that elements are computed from are taken out. What stands in an index, an extent or a condition decides
what a schedule may do, and so do the limits of what is rounded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
import tvm.ir
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.provenance import Bindings, carry
from schedules.stages import buffers_of
from schedules.workload import identity

_FLOAT, _INTEGER = "float32", "int32"
_BYTES = ("int8", "uint8")
_ZERO_POINTS = range(-128, 256)
_Expr = tvm.ir.Expr


@dataclass(frozen=True)
class _Number:
    """A number that elements are computed from: a float, or what may be a zero point, a small whole number of any type.

    A zero point is added to what an earlier stage has rounded, where schedules look for whole numbers.
    """

    constant: tirx.FloatImm | tirx.IntImm
    is_zero_point: bool

    @property
    def value(self) -> float:
        return float(self.constant.value)


@dataclass(frozen=True)
class _Numbered:
    """A function that is called with `tensors` tensors, and the numbers in it in order."""

    variable: tvm.ir.GlobalVar
    function: tirx.PrimFunc
    tensors: int
    numbers: tuple[_Number, ...]


@dataclass(frozen=True)
class _Shared:
    """The function that takes the place of one, and what it is to be called with after that one's tensors."""

    variable: tvm.ir.GlobalVar
    numbers: tuple[relax.Expr, ...]


@dataclass
class _Parameters:
    """Tensors without axes, one for all numbers that are the same in each of some functions."""

    tensors: dict[tuple[str, tuple[float, ...]], tvm.ir.Var] = field(default_factory=dict)

    def read(self, number: _Number, values: tuple[float, ...]) -> _Expr:
        """Return what to compute in place of a number, which is one of `values` in each of the functions."""
        if len(set(values)) == 1:
            return number.constant
        dtype = _byte_type(values) if number.is_zero_point else _FLOAT
        name = f"{'zero_point' if number.is_zero_point else 'scale'}_{len(self.tensors)}"
        tensor = self.tensors.setdefault((dtype, values), tirx.decl_buffer([], dtype, name, layout=None))
        value: _Expr = tirx.BufferLoad(tensor, [])
        for needed in (_INTEGER, str(number.constant.ty.dtype)) if number.is_zero_point else ():
            value = value.astype(needed)
        return value


def share_kernels(module: tvm.IRModule) -> tvm.IRModule:
    """Return `module`, of fused TIR functions without schedules, with one function for those that differ in numbers."""
    shared: dict[tvm.ir.GlobalVar, _Shared] = {}
    functions = dict(module.functions)
    for group in _groups(module):
        variable, function, numbers = _shared(group)
        shared |= {each.variable: _Shared(variable, own) for each, own in zip(group, numbers, strict=True)}
        functions[variable] = function
    if not shared:
        return module
    functions = {variable: function for variable, function in functions.items() if variable not in shared}
    result = tvm.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            result.update_func(variable, _Rewriter(result, shared).visit_expr(function))
    return carry(module, result)


def _byte_type(values: Sequence[float]) -> str:
    """Return the type of zero points, which are of one type of bytes wherever what they are added to is."""
    if min(values) >= 0:
        return "uint8"
    return "int8" if max(values) < 2**7 else "int16"


def _groups(module: tvm.IRModule) -> Iterator[list[_Numbered]]:
    """Yield functions that differ in numbers alone, two or more, in order of their first calls."""
    groups: dict[tuple[object, ...], list[_Numbered]] = defaultdict(list)
    for each in _quantized(module):
        skeleton = _with_numbers(each.function, lambda number: tirx.const(0, number.constant.ty.dtype))
        kinds = tuple(number.is_zero_point for number in each.numbers)
        groups[identity(skeleton), kinds].append(each)
    return (group for group in groups.values() if len(group) > 1)


def _quantized(module: tvm.IRModule) -> Iterator[_Numbered]:
    """Yield the TIR functions that have bytes in them and take tensors alone, in order of their first calls."""
    calls: dict[tvm.ir.GlobalVar, list[tvm.ir.Call]] = defaultdict(list)
    for function in (each for _, each in module.functions_items() if isinstance(each, relax.Function)):
        for value in Bindings(function).values.values():
            if isinstance(value, tvm.ir.Call) and value.args and isinstance(value.args[0], tvm.ir.GlobalVar):
                calls[value.args[0]].append(value)
    for variable, made in calls.items():
        function = module[variable]
        if all(map(_takes_tensors, made)) and any(str(each.dtype) in _BYTES for each in buffers_of(function.body)):
            numbers: list[_Number] = []
            _with_numbers(function, lambda number, numbers=numbers: _noted(number, numbers))
            yield _Numbered(variable, function, len(made[0].args[1].fields), tuple(numbers))


def _noted(number: _Number, numbers: list[_Number]) -> _Expr:
    numbers.append(number)
    return number.constant


def _takes_tensors(call: tvm.ir.Call) -> bool:
    is_tir = isinstance(call.op, tvm.ir.Op) and call.op.name == "relax.call_tir"
    return is_tir and len(call.args) == 2


def _shared(group: Sequence[_Numbered]) -> tuple[tvm.ir.GlobalVar, tirx.PrimFunc, list[tuple[relax.Expr, ...]]]:
    """Return a function for all of a group, named as the first one, and the numbers that each one calls it with."""
    first = group[0]
    values = iter(zip(*([number.value for number in each.numbers] for each in group), strict=True))
    parameters = _Parameters()
    function = _with_numbers(first.function, lambda number: parameters.read(number, next(values)))
    places = [
        *function.params[: first.tensors],
        *parameters.tensors.values(),
        *function.params[first.tensors :],
    ]
    function = tirx.PrimFunc(places, function.body, function.ret_type, function.attrs)
    variable = tvm.ir.GlobalVar(first.variable.name_hint)
    relax.expr._update_type(variable, function.ty)
    numbers = [
        tuple(relax.const(np.array(each[position], dtype)) for dtype, each in parameters.tensors)
        for position in range(len(group))
    ]
    return variable, function, numbers


def _with_numbers(function: tirx.PrimFunc, replace: Callable[[_Number], _Expr]) -> tirx.PrimFunc:
    """Return a function with the numbers that its elements are computed from replaced, in the order of the function."""

    def constant(found: tirx.FloatImm, _mutator: tvm_ffi.StructuralMutator) -> _Expr:
        return replace(_Number(found, is_zero_point=False)) if str(found.ty.dtype) == _FLOAT else found

    def total(found: tirx.Add, mutator: tvm_ffi.StructuralMutator) -> _Expr:
        if not isinstance(found.b, tirx.FloatImm) or found.b.value not in _ZERO_POINTS:
            return mutator.default_mutate(found)
        return tirx.Add(mutator.mutate(found.a), replace(_Number(found.b, is_zero_point=True)))

    def difference(found: tirx.Sub, mutator: tvm_ffi.StructuralMutator) -> _Expr:
        is_code = isinstance(found.a, tirx.Cast | tvm.ir.TensorLoad) and str(found.ty.dtype) == _INTEGER
        if not is_code or not isinstance(found.b, tirx.IntImm) or found.b.value not in _ZERO_POINTS:
            return mutator.default_mutate(found)
        return tirx.Sub(mutator.mutate(found.a), replace(_Number(found.b, is_zero_point=True)))

    def limited(found: tirx.Min | tirx.Max, mutator: tvm_ffi.StructuralMutator) -> _Expr:
        if not isinstance(found.b, tirx.FloatImm):
            return mutator.default_mutate(found)
        return type(found)(mutator.mutate(found.a), found.b)

    def load(found: tvm.ir.TensorLoad, _mutator: tvm_ffi.StructuralMutator) -> _Expr:
        return found

    callbacks = [
        (tirx.FloatImm, constant), (tirx.Add, total), (tirx.Sub, difference), (tirx.Min, limited), (tirx.Max, limited),
        (tvm.ir.TensorLoad, load),
    ]  # fmt: skip

    def store(found: tirx.BufferStore, _mutator: tvm_ffi.StructuralMutator) -> tirx.Stmt:
        return tirx.BufferStore(found.buffer, tvm_ffi.structural_mutate(found.value, callbacks), found.indices)

    return function.with_body(tvm_ffi.structural_mutate(function.body, (tirx.BufferStore, store)))


@mutator
class _Rewriter(PyExprMutator):
    """Calls shared functions where those were called that they take the place of."""

    def __init__(self, module: tvm.IRModule, shared: dict[tvm.ir.GlobalVar, _Shared]) -> None:
        super().__init__(module)
        self._shared = shared

    def visit_call_(self, op: tvm.ir.Call) -> relax.Expr:
        shared = self._shared.get(op.args[0]) if op.args and isinstance(op.args[0], tvm.ir.GlobalVar) else None
        if shared is None:
            return super().visit_call_(op)
        arguments = relax.Tuple([*op.args[1].fields, *shared.numbers])
        return relax.call_tir(shared.variable, arguments, op.ty_args[0])
