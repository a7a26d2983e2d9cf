"""Weights apart from code: large constants of a module become the fields of one tuple parameter of `main`."""

from __future__ import annotations

import hashlib
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
    """Move the constants of `main` that are large enough into a tuple parameter.

    Equal constants are stored once. `main` always gets the parameter, also when it is empty.
    """
    collector = _ConstantCollector()
    collector.visit_expr(module[ENTRY])
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
    parameter = relax.Var("weights", relax.TupleType(types))
    lifter = _ConstantLifter(module, parameter, fields)
    function = lifter.lifted(module[ENTRY])
    lifted = tvm.IRModule({**dict(module.functions), module.get_global_var(ENTRY): function}, attrs=module.attrs)
    return LiftedModule(lifted, tuple(weights))


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
    def __init__(self, module: tvm.IRModule, parameter: relax.Var, fields: dict[int, int]) -> None:
        super().__init__(module)
        self._parameter = parameter
        self._fields = fields

    def lifted(self, function: relax.Function) -> relax.Function:
        body = self.visit_expr(function.body)
        return relax.Function(
            [*function.params, self._parameter], body, function.ret_ty, function.is_pure, function.attrs
        )

    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> relax.Expr:
        if not isinstance(op.ty, relax.TensorType):
            return op
        field = self._fields.get(_address(op.value))
        return op if field is None else relax.TupleGetItem(self._parameter, field)


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
