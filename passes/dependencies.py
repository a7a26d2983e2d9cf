"""The dependency graph of a function: who produces, who reads, and which bindings may be computed together.

A group of bindings can become one kernel only if it is convex: no path leaves the group and enters it again, for what
lies on such a path would need one half of the kernel before it, and the other half after it.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx
from tvm import relax

from passes.provenance import Bindings


class Dependencies:
    """A directed graph with an edge from each bound variable of a function to each binding that reads it."""

    def __init__(self, function: relax.Function) -> None:
        bindings = Bindings(function)
        self._results = _results(function)
        self.graph: networkx.DiGraph[relax.Var] = networkx.DiGraph()
        self.graph.add_nodes_from(bindings.values)
        for var, operands in bindings.operands.items():
            self.graph.add_edges_from((operand, var) for operand in operands)
        self._position = {var: position for position, var in enumerate(bindings.values)}

    def producers(self, var: relax.Var) -> list[relax.Var]:
        """Return the bound variables that `var` is computed from, in program order."""
        return self._ordered(self.graph.predecessors(var))

    def readers(self, var: relax.Var) -> list[relax.Var]:
        """Return the variables that are computed from `var`, in program order."""
        return self._ordered(self.graph.successors(var))

    def is_result(self, var: relax.Var) -> bool:
        """Return whether the function returns `var`, alone or in a tuple, or renamed."""
        return var in self._results

    def outputs(self, group: Iterable[relax.Var]) -> list[relax.Var]:
        """Return the members of a group that something outside of it reads, or that the function returns."""
        members = set(group)
        return self._ordered(
            var
            for var in members
            if self.is_result(var) or any(reader not in members for reader in self.graph.successors(var))
        )

    def reentry(self, group: Iterable[relax.Var]) -> relax.Var | None:
        """Return the first binding outside of a group on a path from the group back into it; None if it is convex."""
        members = set(group)
        last = max((self._position[var] for var in members), default=-1)
        outside: set[relax.Var] = set()
        pending = [reader for var in members for reader in self.graph.successors(var) if reader not in members]
        while pending:
            var = pending.pop()
            if var not in outside and self._position[var] < last:  # nothing after the last member leads back
                outside.add(var)
                pending += [reader for reader in self.graph.successors(var) if reader not in members]
        back = (var for var in outside if any(reader in members for reader in self.graph.successors(var)))
        return next(iter(self._ordered(back)), None)

    def is_convex(self, group: Iterable[relax.Var]) -> bool:
        """Return whether no path leaves the group and enters it again."""
        return self.reentry(group) is None

    def _ordered(self, variables: Iterable[relax.Var]) -> list[relax.Var]:
        return sorted(variables, key=self._position.__getitem__)


def _results(function: relax.Function) -> set[relax.Var]:
    """Return the variables that a function returns, through renamings and tuples."""
    values = Bindings(function).values
    results: set[relax.Var] = set()
    pending = [function.body.body]
    while pending:
        expr = pending.pop()
        if isinstance(expr, relax.Tuple):
            pending.extend(expr.fields)  # `+=` would make a TVM array of the list
        elif isinstance(expr, relax.Var) and expr not in results:
            results.add(expr)
            if isinstance(values.get(expr), relax.Var | relax.Tuple):
                pending.append(values[expr])
    return results
