"""Which ONNX nodes each expression of a module came from, kept through every pass.

Calls and tuple fields carry the names of their nodes in their span, which TVM's mutators copy. A rewriting makes new
expressions without one: what takes the place of a binding inherits its nodes and those of all the bindings that only
it needed, and what it is computed from inherits in turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

Nodes = tuple[str, ...]

_SEPARATOR = "\n"
# What TVM calls variables that are emitted without a name.
_GENERATED = re.compile(r"[lg]v\d*")
_SPANNED = (tvm.ir.Call, relax.TupleGetItem)


def nodes_of(expr: relax.Expr) -> Nodes:
    """Return the names of the ONNX nodes that an expression came from; none if that is not known."""
    span = expr.span
    return tuple(span.source_name.name.split(_SEPARATOR)) if span is not None else ()


def union(parts: Iterable[Nodes]) -> Nodes:
    """Return all names once, in order of their first occurrence."""
    return tuple(dict.fromkeys(name for part in parts for name in part))


def annotate(module: tvm.IRModule, nodes: Mapping[relax.Var, Nodes]) -> tvm.IRModule:
    """Return the module with the nodes of some variables written to what they are bound to.

    What has none inherits from its readers: the parts of an expression that came from one node.
    """

    def assigned(function: relax.Function) -> dict[relax.Var, Nodes]:
        bindings = Bindings(function)
        known = {var: nodes[var] for var in bindings.values if var in nodes}
        return {**known, **_inherited_from_readers(bindings, known, {})}

    return _annotated(module, {name: assigned(function) for name, function in _functions(module).items()})


def carry(before: tvm.IRModule, after: tvm.IRModule) -> tvm.IRModule:
    """Return `after`, which some rewriting made of `before`, with the nodes of everything that is new in it."""
    old, new = _functions(before), _functions(after)
    changed = [name for name in new if name in old and not new[name].same_as(old[name])]
    assigned = {name: _carried(Bindings(old[name]), Bindings(new[name])) for name in changed}
    return _annotated(after, assigned)


class Bindings:
    """The bindings of a function in order, those of inner scopes among them: values, operands, readers, nodes."""

    def __init__(self, function: relax.Function) -> None:
        collector = _BindingCollector()
        collector.visit_expr(function)
        self.values: dict[relax.Var, relax.Expr] = collector.values
        self.operands: dict[relax.Var, list[relax.Var]] = {}
        self.readers: dict[relax.Var, list[relax.Var]] = {var: [] for var in self.values}
        # The variables themselves, not others that are equal: TVM compares those in Python, a microsecond each.
        own = {var.__chandle__(): var for var in self.values}
        for var, value in self.values.items():
            handles = (used.__chandle__() for used in relax.analysis.free_vars(value))
            self.operands[var] = [own[handle] for handle in handles if handle in own]
            for used in self.operands[var]:
                self.readers[used].append(var)

    def nodes(self, var: relax.Var) -> Nodes:
        """Return the nodes that a bound variable came from."""
        return nodes_of(self.values[var])

    def lacks_nodes(self, var: relax.Var) -> bool:
        """Return whether a variable is bound to what can carry nodes, and carries none."""
        return isinstance(self.values[var], _SPANNED) and not self.nodes(var)

    def by_name(self) -> dict[str, relax.Var]:
        """Return the variables whose name is theirs alone, and was given on purpose."""
        count = Counter(var.name for var in self.values)
        return {var.name: var for var in self.values if count[var.name] == 1 and not _GENERATED.fullmatch(var.name)}


def _carried(old: Bindings, new: Bindings) -> dict[relax.Var, Nodes]:
    """Return the nodes of the bindings of `new` that are not, or not rightly, annotated."""
    names = old.by_name()
    unique = new.by_name()
    origin = {var: var for var in new.values if var in old.values}
    for name, var in unique.items():
        if var not in origin and name in names and names[name] not in new.values:
            origin[var] = names[name]
    replaced = _Replaced(old, set(origin.values()))
    rewritten = {
        var: union((replaced.under(was), old.nodes(was), new.nodes(var)))
        for var, was in origin.items()
        if new.nodes(var) != old.nodes(was) or new.lacks_nodes(var)
    }
    unclaimed = {var: replaced.under(was) or new.nodes(var) for var, was in origin.items() if var not in rewritten}
    written = {var: nodes for var, nodes in rewritten.items() if nodes and nodes != new.nodes(var)}
    return {**written, **_inherited_from_readers(new, rewritten, unclaimed)}


class _Replaced:
    """The old bindings that are gone: which of them each surviving one was computed from."""

    def __init__(self, old: Bindings, surviving: set[relax.Var]) -> None:
        self._old = old
        self._surviving = surviving
        self._position = {var: position for position, var in enumerate(old.values)}

    def under(self, var: relax.Var) -> Nodes:
        """Return the nodes of what `var` was computed from, as far back as nothing survives."""
        found: set[relax.Var] = set()
        pending = list(self._old.operands[var])
        while pending:
            operand = pending.pop()
            if operand not in self._surviving and operand not in found:
                found.add(operand)
                pending += self._old.operands[operand]
        return union(self._old.nodes(part) for part in sorted(found, key=self._position.__getitem__))


def _inherited_from_readers(
    bindings: Bindings, known: Mapping[relax.Var, Nodes], unclaimed: Mapping[relax.Var, Nodes]
) -> dict[relax.Var, Nodes]:
    """Return the nodes of bindings without any: those of their readers, or what their readers have `unclaimed`."""
    flow: dict[relax.Var, Nodes] = {}
    inherited: dict[relax.Var, Nodes] = {}
    for var in reversed(bindings.values):
        nodes = known.get(var, unclaimed.get(var, bindings.nodes(var)))
        if not nodes:
            nodes = union(flow[reader] for reader in bindings.readers[var])
            inherited[var] = nodes
        flow[var] = nodes
    return {var: nodes for var, nodes in inherited.items() if nodes and bindings.lacks_nodes(var)}


def _functions(module: tvm.IRModule) -> dict[str, relax.Function]:
    return {
        variable.name_hint: function
        for variable, function in module.functions_items()
        if isinstance(function, relax.Function)
    }


def _annotated(module: tvm.IRModule, assigned: Mapping[str, Mapping[relax.Var, Nodes]]) -> tvm.IRModule:
    if not any(assigned.values()):
        return module
    annotated = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
    for name, nodes in assigned.items():
        if nodes:
            annotated.update_func(module.get_global_var(name), _Annotator(module, nodes).visit_expr(module[name]))
    return annotated


@visitor
class _BindingCollector(PyExprVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.values: dict[relax.Var, relax.Expr] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Note the value, inner scopes first."""
        self.visit_expr(binding.value)
        self.values[binding.var] = binding.value

    def visit_match_cast_(self, binding: relax.MatchCast) -> None:
        """Note the value whose shape is matched."""
        self.values[binding.var] = binding.value


@mutator
class _Annotator(PyExprMutator):
    """Writes nodes into the spans of the values of some variables."""

    def __init__(self, module: tvm.IRModule, nodes: Mapping[relax.Var, Nodes]) -> None:
        super().__init__(module)
        self._nodes = nodes

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Bind the same value with another span."""
        nodes = self._nodes.get(binding.var)
        if nodes:
            value = self.builder_.normalize(_spanned(binding.value, nodes))
            binding = relax.VarBinding(binding.var, value)
        super().visit_var_binding_(binding)


def _spanned(value: relax.Expr, nodes: Nodes) -> relax.Expr:
    span = tvm.ir.Span(tvm.ir.SourceName(_SEPARATOR.join(nodes)), 0, 0, 0, 0)
    if isinstance(value, tvm.ir.Call):
        return tvm.ir.Call(value.op, value.args, value.attrs, value.ty_args, span)
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(value.tuple_value, value.index, span)
    return value


__all__ = ["Bindings", "Nodes", "annotate", "carry", "nodes_of", "union"]
