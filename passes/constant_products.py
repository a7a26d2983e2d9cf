"""Products with constant matrices: the weights and bias of each, and whether others read them too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprVisitor, visitor

from passes.base import Dataflow
from passes.dependencies import Dependencies
from passes.provenance import Bindings
from passes.tensor_types import constant_of, dtype_of, equal_shapes, shape_of

# Of matrices of one shape, those that differ in this corner are not compared further.
_CORNER = 8


@dataclass(frozen=True, eq=False)
class ConstantProduct:
    """The product of `call` with a constant matrix, and `result`, which is it or the sum of it and a constant bias.

    `addend` is the bias as it is added, of one number or one per column. Products of 16-bit floats are summed in fp32
    and `rounded` to their type, which is what a bias is added to.
    """

    product: relax.Var
    call: tvm.ir.Call
    weight: np.ndarray
    addend: relax.Expr | None
    result: relax.Var
    rounded: relax.Var | None = None

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    @property
    def bias(self) -> np.ndarray | None:
        """Return one number per column, or None where nothing is added."""
        array = None if self.addend is None else constant_of(self.addend)
        return None if array is None else np.broadcast_to(array.reshape(-1), (self.columns,))


class ConstantProducts:
    """The products x [..., K] times a constant matrix [K, N] of one function."""

    def __init__(self, function: relax.Function) -> None:
        self.bindings = Bindings(function)
        self.dataflow = Dataflow(function)
        self.dependencies = Dependencies(function)
        uses = _ConstantUses()
        uses.visit_expr(function)
        self._uses = uses.readings

    def __iter__(self) -> Iterator[ConstantProduct]:
        """Yield all products in order."""
        found = (self.at(variable) for variable in self.bindings.values)
        return (product for product in found if product is not None)

    def at(self, variable: relax.Var) -> ConstantProduct | None:
        """Return the product that a variable is bound to, None for anything else."""
        value = self.bindings.values[variable]
        call = self.dataflow.call(value, "relax.matmul") if isinstance(value, tvm.ir.Call) else None
        if call is None or not isinstance(call.args[0], relax.Var) or call.args[0].ty.ndim < 2:
            return None
        weight = constant_of(call.args[1])
        if weight is None or weight.ndim != 2:
            return None
        rounded = self._rounded(variable)
        result, addend = self._biased(variable if rounded is None else rounded, weight.shape[1])
        return ConstantProduct(variable, call, weight, addend, result, rounded)

    def is_shared(self, constant: relax.Expr) -> bool:
        """Return whether a constant is read more than once, as it is or transposed."""
        if len(self._uses[_storage(constant)]) > 1:
            return True
        array = constant_of(constant)
        others = [uses[0] for storage, uses in self._uses.items() if storage != _storage(constant)]
        return array is not None and any(_are_tied(array, other) for other in others)

    def _rounded(self, product: relax.Var) -> relax.Var | None:
        """Return a product rounded to a 16-bit float, if that is all that it is read by."""
        readers = self.dependencies.readers(product)
        if len(readers) != 1 or self.dependencies.is_result(product):
            return None
        cast = self.dataflow.call(self.bindings.values[readers[0]], "relax.astype")
        return readers[0] if cast is not None and dtype_of(cast) in ("float16", "bfloat16") else None

    def _biased(self, product: relax.Var, columns: int) -> tuple[relax.Var, relax.Expr | None]:
        """Return the sum of a product and a constant bias, and the bias, if that is all that the product is read by."""
        readers = self.dependencies.readers(product)
        if len(readers) != 1 or self.dependencies.is_result(product):
            return product, None
        add = self.dataflow.call(self.bindings.values[readers[0]], "relax.add")
        if add is None or not equal_shapes(shape_of(add), shape_of(product)):
            return product, None
        same = self.dataflow.producer(add.args[0]).same_as(self.dataflow.producer(product))
        addend = add.args[1] if same else add.args[0]
        bias = constant_of(addend)
        if bias is None or bias.size not in (1, columns) or bias.size != (bias.shape or (1,))[-1]:
            return product, None
        return readers[0], addend


def _are_tied(array: np.ndarray, other: tvm.ir.GenericConst) -> bool:
    shape = tuple(int(extent) for extent in other.ty.shape.values)
    if array.ndim != 2 or array.dtype.name != other.ty.dtype.dtype or shape not in (array.shape, array.shape[::-1]):
        return False
    values = other.value.numpy()
    for same in (values, values.T):
        corner = (slice(_CORNER),) * 2
        if same.shape == array.shape and np.array_equal(same[corner], array[corner]) and np.array_equal(same, array):
            return True
    return False


def _storage(constant: relax.Expr) -> int:
    return int(constant.value.data_ptr())


@visitor
class _ConstantUses(PyExprVisitor):
    """Collects where the storage of each constant is read."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: dict[int, list[tvm.ir.GenericConst]] = defaultdict(list)

    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> None:
        if isinstance(op.ty, relax.TensorType):
            self.readings[_storage(op)].append(op)
