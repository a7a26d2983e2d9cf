"""Weights apart from code: large constants of a module become the fields of one tuple parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

# Smaller constants (scalars, normalization scales of tiny models) stay in the code: a file offset each would cost more.
SMALLEST_WEIGHT_BYTES = 1024
ENTRY = "main"


@dataclass(frozen=True)
class LiftedModule:
    """A module whose `main` takes its inputs, then one tuple of weights; `weights` are the tuple's fields in order."""

    module: tvm.IRModule
    weights: tuple[tvm.runtime.Tensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Return the size of all weights in bytes."""
        return sum(_byte_count(weight) for weight in self.weights)


def lift_weights(module: tvm.IRModule) -> LiftedModule:
    """Move the constants that are large enough into a tuple parameter of `main`.

    Equal constants are stored once. `main` always gets the parameter, also when it is empty; functions of branches and
    loops get it from their callers where they need it.
    """
    collector = _ConstantCollector()
    functions = _relax_functions(module)
    for function in functions.values():
        collector.visit_expr(function)
    constants = [constant for constant in collector.constants if _byte_count(constant.value) >= SMALLEST_WEIGHT_BYTES]
    fields: dict[int, int] = {}  # address of the constant's storage -> field of the tuple
    stored: dict[tuple[str, tuple[int, ...], bytes], int] = {}  # dtype, shape, content -> the same field
    weights: list[tvm.runtime.Tensor] = []
    types: list[relax.TensorType] = []
    for constant in constants:
        address = _address(constant.value)
        if address in fields:
            continue
        field = stored.setdefault(_identity(constant.value), len(weights))
        fields[address] = field
        if field == len(weights):
            weights.append(constant.value)
            types.append(constant.ty)
    lifter = _ConstantLifter(module, relax.TupleType(types), fields, _readers(functions, fields))
    return LiftedModule(lifter.module(), tuple(weights))


def _relax_functions(module: tvm.IRModule) -> dict[tvm.ir.GlobalVar, relax.Function]:
    """Return the Relax functions, `main` first, so that weights lie in the order of its use."""
    entry = module.get_global_var(ENTRY)
    relaxed = {v: f for v, f in module.functions_items() if isinstance(f, relax.Function)}
    return {entry: relaxed[entry], **relaxed}


def _readers(
    functions: Mapping[tvm.ir.GlobalVar, relax.Function], fields: Mapping[int, int]
) -> dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar]:
    """Return for each function but `main` that reads a weight, or calls one that does, the variable of its new form."""
    readers: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar] = {}
    while True:
        found = [
            variable
            for variable, function in functions.items()
            if variable.name_hint != ENTRY and variable not in readers and _reads(function, fields, readers)
        ]
        if not found:
            return readers
        readers |= {variable: tvm.ir.GlobalVar(variable.name_hint) for variable in found}


def _reads(
    function: relax.Function, fields: Mapping[int, int], readers: Mapping[tvm.ir.GlobalVar, tvm.ir.GlobalVar]
) -> bool:
    if any(variable in readers for variable in relax.analysis.all_global_vars(function)):
        return True
    collector = _ConstantCollector()
    collector.visit_expr(function)
    return any(_address(constant.value) in fields for constant in collector.constants)


@visitor
class _ConstantCollector(PyExprVisitor):
    """Collects tensor constants in order of their first use."""

    def __init__(self) -> None:
        super().__init__()
        self.constants: list[tvm.ir.GenericConst] = []

    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> None:
        if isinstance(op.ty, relax.TensorType):
            self.constants.append(op)


@mutator
class _ConstantLifter(PyExprMutator):
    """Puts fields of a tuple parameter in the place of constants; `readers` are the functions that get it, renewed."""

    def __init__(
        self,
        module: tvm.IRModule,
        kind: relax.TupleType,
        fields: Mapping[int, int],
        readers: Mapping[tvm.ir.GlobalVar, tvm.ir.GlobalVar],
    ) -> None:
        super().__init__(module)
        self._module = module
        self._type = kind
        self._fields = fields
        self._readers = readers
        self._parameter = relax.Var("weights", kind)

    def module(self) -> tvm.IRModule:
        """Return the module with all weights lifted."""
        functions: dict[tvm.ir.GlobalVar, tvm.ir.BaseFunc] = dict(self._module.functions)
        for variable, function in _relax_functions(self._module).items():
            if variable in self._readers:
                relax.expr._update_type(self._readers[variable], self._signature(function))
        for variable, function in _relax_functions(self._module).items():
            lifted = self._lifted(function) if self._takes(variable) else function
            del functions[variable]
            functions[self._readers.get(variable, variable)] = lifted
        return tvm.IRModule(functions, attrs=self._module.attrs, global_infos=self._module.global_infos)

    def _takes(self, variable: tvm.ir.GlobalVar) -> bool:
        return variable.name_hint == ENTRY or variable in self._readers

    def _signature(self, function: relax.Function) -> relax.FuncType:
        parameters = [parameter.ty for parameter in function.params]
        return relax.FuncType([*parameters, self._type], function.ret_ty, bool(function.is_pure))

    def _lifted(self, function: relax.Function) -> relax.Function:
        self._parameter = relax.Var("weights", self._type)
        body = self.visit_expr(function.body)
        return relax.Function(
            [*function.params, self._parameter], body, function.ret_ty, function.is_pure, function.attrs
        )

    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> relax.Expr:
        """Replace a weight."""
        if not isinstance(op.ty, relax.TensorType):
            return op
        field = self._fields.get(_address(op.value))
        return op if field is None else relax.TupleGetItem(self._parameter, field)

    def visit_call_(self, call: tvm.ir.Call) -> relax.Expr:
        """Pass the weights on to functions that need them."""
        visited = super().visit_call_(call)
        if not isinstance(visited, tvm.ir.Call) or visited.op not in self._readers:
            return visited
        renewed = self._readers[visited.op]
        return tvm.ir.Call(renewed, [*visited.args, self._parameter], visited.attrs, visited.ty_args, visited.span)


def _byte_count(tensor: tvm.runtime.Tensor) -> int:
    bits = tvm.DataType(tensor.dtype).bits
    return (int(np.prod(tensor.shape, dtype=np.int64)) * bits + 7) // 8


def _identity(tensor: tvm.runtime.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Return what equal tensors have in common: tied weights become separate constants when a pass converts each."""
    content = hashlib.blake2b(np.ascontiguousarray(tensor.numpy()).view(np.uint8).reshape(-1).data)
    return str(tensor.dtype), tuple(int(size) for size in tensor.shape), content.digest()


def _address(tensor: tvm.runtime.Tensor) -> int:
    """Return what identifies a tensor's storage, so that shared weights are found."""
    return int(tensor.data_ptr())
