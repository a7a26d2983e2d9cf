"""Operators whose inputs are all constant, computed at compile time.

A constant costs memory and the time to read it, so a result may be at most four times as large as what it is computed
from: that is what int8 codes grow by when they are dequantized. What grows more repeats its operands; it stays an
operator, which its readers compute as they go. Below 1 KiB, where constants are part of the code, any result is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from passes.base import Pass, PassOutcome, Site
from passes.provenance import nodes_of

MOST_GROWTH = 4
ALWAYS_KEPT_BYTES = 1024


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what depends on constants alone, unless the result is much larger than what it is computed from."""

    name: ClassVar[str] = "fold-constants"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Fold by TVM's evaluator, which runs each operator on this machine's CPU."""
        sites: list[Site] = []
        folded: dict[tvm.ir.GlobalVar, relax.Expr] = {}
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                finder = _ConstantBindings()
                finder.visit_expr(function)
                values = _evaluated(finder.bindings, module)
                sites.extend(site for var, site in finder.sites if site.refusal is not None or var in values)
                if values:
                    folded[variable] = _Inserter(module, values).visit_expr(function)
        if not folded:
            return PassOutcome(module, tuple(sites))
        result = tvm.IRModule({**module.functions, **folded}, attrs=module.attrs)
        return PassOutcome(relax.transform.DeadCodeElimination()(result), tuple(sites))


def _evaluated(bindings: Sequence[relax.VarBinding], module: tvm.IRModule) -> dict[relax.Var, tvm.ir.GenericConst]:
    """Return the values of `bindings`, which depend on nothing else, as far as TVM can evaluate them."""
    if not bindings:
        return {}
    builder = relax.BlockBuilder(tvm.IRModule(_tir_functions(module)))
    renamed: dict[relax.Var, relax.Expr] = {}
    splits = {binding.var: binding.value for binding in bindings if _is_split(binding.value)}
    bindings = [binding for binding in bindings if binding.var not in splits]
    with builder.function("evaluated", []):
        with builder.dataflow():
            for binding in bindings:
                value = _renamed(_as_slice(binding.value, splits), renamed)
                renamed[binding.var] = builder.emit_output(value)
        builder.emit_func_output(relax.Tuple(list(renamed.values())))
    evaluated = relax.transform.FoldConstant()(builder.finalize())["evaluated"]
    fields = _Values()
    fields.visit_expr(evaluated)
    results = zip(bindings, evaluated.body.body.fields, strict=True)
    values = {binding.var: fields.values.get(field, field) for binding, field in results}
    return {var: value for var, value in values.items() if isinstance(value, tvm.ir.GenericConst)}


def _is_split(value: relax.Expr) -> bool:
    return isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == "relax.split"


def _as_slice(value: relax.Expr, splits: Mapping[relax.Var, tvm.ir.Call]) -> relax.Expr:
    """Return a part of a split tensor as a slice: TVM evaluates no operator with several results."""
    if not isinstance(value, relax.TupleGetItem) or value.tuple_value not in splits:
        return value
    call = splits[value.tuple_value]
    axis = int(call.attrs.axis) % call.args[0].ty.ndim
    extents = [int(field.shape.values[axis]) for field in call.ty.fields]
    begin = sum(extents[: value.index])
    return relax.op.strided_slice(call.args[0], [axis], [begin], [begin + extents[value.index]])


def _tir_functions(module: tvm.IRModule) -> dict[tvm.ir.GlobalVar, tirx.PrimFunc]:
    return {name: function for name, function in module.functions_items() if isinstance(function, tirx.PrimFunc)}


def _renamed(expr: relax.Expr, names: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    if isinstance(expr, relax.Var):
        return names[expr]
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_renamed(field, names) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(_renamed(expr.tuple_value, names), expr.index)
    if isinstance(expr, tvm.ir.Call):
        operands = [_renamed(operand, names) for operand in expr.args]
        return tvm.ir.Call(expr.op, operands, expr.attrs, expr.ty_args)
    return expr


def _tensors(expr: relax.Expr) -> Iterator[relax.Expr]:
    """Yield the tensors among an operand and, where it is a tuple, its fields."""
    if isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from _tensors(field)
    elif isinstance(expr.ty, relax.TensorType | relax.TupleType):
        yield expr


def _bytes(kind: tvm.ir.Type) -> int | None:
    """Return the size of a value of this type, or None where it is not known."""
    if isinstance(kind, relax.TupleType):
        sizes = [_bytes(field) for field in kind.fields]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None
    if not isinstance(kind, relax.TensorType) or not isinstance(kind.shape, relax.ShapeExpr) or kind.dtype is None:
        return None
    extents = [int(extent) for extent in kind.shape.values if isinstance(extent, tirx.IntImm)]
    return math.prod(extents) * kind.dtype.dtype.bits // 8 if len(extents) == len(kind.shape.values) else None


@visitor
class _Values(PyExprVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.values: dict[relax.Var, relax.Expr] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self.values[binding.var] = binding.value


@visitor
class _ConstantBindings(PyExprVisitor):
    """Finds the bindings of which all operands are constant, and tells those that grow too much."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[tuple[relax.Var, Site]] = []
        self.bindings: list[relax.VarBinding] = []
        self._constant: set[relax.Var] = set()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = binding.value
        operands = [tensor for operand in _operands(value) for tensor in _tensors(operand)]
        if not operands or not all(map(self._is_constant, operands)) or relax.analysis.free_symbolic_vars(value):
            return
        result, given = _bytes(value.ty), sum(_bytes(operand.ty) or 0 for operand in operands)
        if result is None or result > max(ALWAYS_KEPT_BYTES, MOST_GROWTH * given):
            reason = f"{result} bytes of {given}" if result is not None else "its size is not known"
            refusal = f"the constant would grow: {reason}"
            self.sites.append((binding.var, Site(binding.var.name, refusal, nodes_of(value))))
            return
        self._constant.add(binding.var)
        self.bindings.append(binding)
        if isinstance(value, tvm.ir.Call | relax.TupleGetItem):
            self.sites.append((binding.var, Site(binding.var.name, None, nodes_of(value))))

    def _is_constant(self, expr: relax.Expr) -> bool:
        return isinstance(expr, tvm.ir.GenericConst) or expr in self._constant


def _operands(value: relax.Expr) -> list[relax.Expr]:
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op):
        return list(value.args)
    return [value] if isinstance(value, relax.Var) else []


@mutator
class _Inserter(PyExprMutator):
    """Puts values in the place of the variables that have them."""

    def __init__(self, module: tvm.IRModule, values: Mapping[relax.Var, tvm.ir.GenericConst]) -> None:
        super().__init__(module)
        self._values = values

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self._values:
            binding = relax.VarBinding(binding.var, self._values[binding.var])
        super().visit_var_binding_(binding)

    def visit_dataflow_var_(self, op: relax.Var) -> relax.Expr:
        return self._values[op] if op in self._values else super().visit_dataflow_var_(op)
