"""Which ONNX nodes each kernel computes, and which operators: found where TVM fuses bindings into functions.

TVM's fusion forgets what it fused: a group becomes a call of a function that equal groups share. The calls are matched
with the bindings before fusion again, operand by operand.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import tvm
import tvm.ir
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Site
from passes.provenance import Bindings, Nodes, annotate, nodes_of, union
from schedules import KernelReport

# The attribute of a TIR function that lists the operators it computes.
OPERATORS = "operators"

_ENTRY = "main"
_LONGEST_NAME = 48
_MOVES = frozenset(
    ("reshape", "transpose", "expand_dims", "squeeze", "flatten", "broadcast_to", "strided_slice", "layout_transform")
)
_Key = tuple[object, ...]


def carry_into_groups(before: tvm.IRModule, after: tvm.IRModule) -> tvm.IRModule:
    """Return `after`, which TVM's FuseOps made of `before`, with the nodes of all parts of a group at its call."""
    nodes: dict[relax.Var, Nodes] = {}
    for name, function in _functions(before).items():
        nodes |= _Matching(function, after[name], after).nodes()
    return annotate(after, nodes)


def fused_groups(grouped: tvm.IRModule) -> tuple[Site, ...]:
    """Return a site for each call in the functions of a module after FuseOps whose group has several operators."""
    calls = (
        (var, value, _operators(value.op.name_hint, grouped[value.op]))
        for function in _functions(grouped).values()
        for var, value in Bindings(function).values.items()
        if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.GlobalVar)
    )
    return tuple(
        Site(var.name, None, nodes_of(value), f"as {kernel_name(operators)}")
        for var, value, operators in calls
        if len(operators) > 1
    )


def _functions(module: tvm.IRModule) -> dict[str, relax.Function]:
    """Return the Relax functions that are no groups by name: `main`, then those of branches and loops."""
    functions = {variable.name_hint: function for variable, function in module.functions_items()}
    relaxed = {name: f for name, f in functions.items() if isinstance(f, relax.Function) and not _is_group(f)}
    return {_ENTRY: relaxed[_ENTRY], **relaxed}


class _Matching:
    """The bindings of a function before fusion, each found again in the group that it became part of."""

    def __init__(self, before: relax.Function, fused: relax.Function, after: tvm.IRModule) -> None:
        self._after = after
        self._old = Bindings(before)
        self._new = Bindings(fused)
        self._position = {var: position for position, var in enumerate(self._old.values)}
        self._origin: dict[relax.Var, object] = {}  # of variables after fusion: the variable before, or a tuple's parts
        self._unclaimed: dict[_Key, deque[relax.Var]] = {}
        for var, value in self._old.values.items():
            self._unclaimed.setdefault(_key(value, {}), deque()).append(var)

    def nodes(self) -> dict[relax.Var, Nodes]:
        """Return the nodes of all bindings after fusion."""
        return {var: self._nodes(var, value) for var, value in self._new.values.items()}

    def _nodes(self, var: relax.Var, value: relax.Expr) -> Nodes:
        if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            group = self._after[value.op]
            if isinstance(group, relax.Function) and _is_group(group):
                return self._group_nodes(var, value, group)
        if isinstance(value, relax.TupleGetItem):
            results = self._origin.get(value.tuple_value)
            if isinstance(results, tuple):  # of a group with several
                self._origin[var] = results[value.index]
                return ()
        if var not in self._old.values:
            self._claim(var, _key(value, self._origin))
        return nodes_of(value)

    def _group_nodes(self, var: relax.Var, call: tvm.ir.Call, group: relax.Function) -> Nodes:
        inner: dict[relax.Var, object] = {
            parameter: _operand(argument, self._origin)
            for parameter, argument in zip(group.params, call.args, strict=True)
        }
        claimed: list[relax.Var] = []
        for block in group.body.blocks:
            for binding in block.bindings:
                waiting = self._unclaimed.get(_key(binding.value, inner))
                if waiting:
                    claimed.append(waiting.popleft())
                    inner[binding.var] = claimed[-1]
        result = group.body.body
        if isinstance(result, relax.Tuple):
            self._origin[var] = tuple(inner.get(field, field) for field in result.fields)
        else:
            self._origin[var] = inner.get(result, result)
        return union(self._old.nodes(part) for part in sorted(claimed, key=self._position.__getitem__))

    def _claim(self, var: relax.Var, key: _Key) -> None:
        waiting = self._unclaimed.get(key)
        if waiting:
            self._origin[var] = waiting.popleft()


def _key(value: relax.Expr, origin: Mapping[relax.Var, object]) -> _Key:
    """Return what equal computations on the same operands have in common."""
    if isinstance(value, relax.TupleGetItem):
        return ("field", value.index, _operand(value.tuple_value, origin))
    if isinstance(value, tvm.ir.Call):
        return (str(value.op), *(_operand(argument, origin) for argument in value.args))
    return (type(value).__name__, _operand(value, origin))


def _operand(expr: relax.Expr, origin: Mapping[relax.Var, object]) -> object:
    if isinstance(expr, relax.Var):
        return origin.get(expr, expr)
    if isinstance(expr, relax.Tuple):
        return tuple(_operand(field, origin) for field in expr.fields)
    if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.ty, relax.TensorType):
        return ("constant", int(expr.value.data_ptr()), str(expr.ty))
    return str(expr)


def name_kernels(grouped: tvm.IRModule, module: tvm.IRModule) -> tvm.IRModule:
    """Return `module` with its TIR functions named after the operators in them, and the operators as an attribute.

    `grouped` is the module after FuseOps, from which FuseTIR made `module`. Functions are numbered in order of their
    first call.
    """
    operators = {
        variable.name_hint: _operators(variable.name_hint, function)
        for variable, function in grouped.functions_items()
        if not isinstance(function, relax.Function) or _is_group(function)
    }
    order = _in_order_of_calls(module)
    taken: dict[str, int] = {_ENTRY: 1}
    renamed: dict[str, str] = {}
    for name in order:
        base = kernel_name(operators.get(name, (name,)))
        taken[base] = taken.get(base, 0) + 1
        renamed[name] = base if taken[base] == 1 else f"{base}_{taken[base]}"
    return _renamed(module, renamed, operators)


def kernel_name(operators: tuple[str, ...]) -> str:
    """Return a readable name of at most 48 characters for a kernel that computes `operators` in order.

    Operators that only move elements are left out where others name the kernel, and a run of equal ones counts once.
    """
    telling = [name for name in operators if name not in _MOVES] or list(operators)
    parts = [name for position, name in enumerate(telling) if position == 0 or telling[position - 1] != name]
    for kept in range(len(parts), 0, -1):
        rest = [] if kept == len(parts) else [f"and_{len(parts) - kept}_more"]
        name = "_".join([*parts[:kept], *rest])
        if len(name) <= _LONGEST_NAME:
            return name
    return parts[0][:_LONGEST_NAME]


def _operators(name: str, function: relax.Expr) -> tuple[str, ...]:
    """Return the operators that a function of the fused module computes, in order."""
    if not isinstance(function, relax.Function):
        return (_operator(name),)
    calls = (binding.value for block in function.body.blocks for binding in block.bindings)
    return tuple(
        _operator(call.args[0].name_hint)
        for call in calls
        if isinstance(call, tvm.ir.Call) and isinstance(call.args[0], tvm.ir.GlobalVar)
    )


def _operator(name: str) -> str:
    """Return the operator that TVM named a function after: without its prefix and the number that tells it apart."""
    return re.sub(r"\d+$", "", name).removeprefix("tir_").strip("_") or "kernel"


def _is_group(function: relax.Function) -> bool:
    return function.attrs is not None and "Primitive" in function.attrs


def _in_order_of_calls(module: tvm.IRModule) -> list[str]:
    order = [name for name, _ in _calls(module)]
    rest = sorted(
        variable.name_hint for variable, function in module.functions_items() if isinstance(function, tirx.PrimFunc)
    )
    return list(dict.fromkeys([*order, *rest]))


def _calls(module: tvm.IRModule) -> Iterator[tuple[str, Nodes]]:
    """Yield the calls of TIR functions with the nodes that they compute, those of `main` first."""
    for function in _functions(module).values():
        for value in Bindings(function).values.values():
            if isinstance(value, tvm.ir.Call) and value.args and isinstance(value.args[0], tvm.ir.GlobalVar):
                yield value.args[0].name_hint, nodes_of(value)


def _renamed(module: tvm.IRModule, names: Mapping[str, str], operators: Mapping[str, tuple[str, ...]]) -> tvm.IRModule:
    variables: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar] = {}
    functions: dict[tvm.ir.GlobalVar, tvm.ir.BaseFunc] = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            name = names[variable.name_hint]
            variables[variable] = tvm.ir.GlobalVar(name)
            relax.expr._update_type(variables[variable], variable.ty)
            listed = list(operators.get(variable.name_hint, (name,)))
            functions[variables[variable]] = function.with_attr(OPERATORS, listed)
        else:
            functions[variable] = function
    renamed = tvm.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            renamed.update_func(variable, _Renamer(variables).visit_expr(function))
    return renamed


@mutator
class _Renamer(PyExprMutator):
    """Puts other global variables in the place of some."""

    def __init__(self, variables: Mapping[tvm.ir.GlobalVar, tvm.ir.GlobalVar]) -> None:
        super().__init__()
        self._variables = variables

    def visit_global_var_(self, op: tvm.ir.GlobalVar) -> relax.Expr:
        return self._variables.get(op, op)


def with_calls(kernels: Iterable[KernelReport], module: tvm.IRModule) -> tuple[KernelReport, ...]:
    """Return the reports in order of the kernels' first calls, with the ONNX nodes of each call and the operators."""
    calls: dict[str, list[Nodes]] = {}
    for name, nodes in _calls(module):
        calls.setdefault(name, []).append(nodes)
    position = {name: index for index, name in enumerate(calls)}
    return tuple(
        replace(
            kernel,
            operators=tuple(str(name) for name in module[kernel.function].attrs.get(OPERATORS, ())),
            nodes=tuple(calls.get(kernel.function, ())),
        )
        for kernel in sorted(kernels, key=lambda kernel: position.get(kernel.function, len(position)))
    )
