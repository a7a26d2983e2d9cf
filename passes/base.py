"""What every pass keeps to: typed options, and an account of every site: rewritten, or refused and why."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from passes.provenance import Nodes, nodes_of, union

Match = TypeVar("Match")


@dataclass(frozen=True)
class Site:
    """A place where a pass looked: `refusal` is None if it was rewritten, else the reason why not.

    `location` is the variable bound there, `nodes` are the ONNX nodes that what was found there came from. `choice`
    says which form of several it got, and why.
    """

    location: str
    refusal: str | None = None
    nodes: Nodes = ()
    choice: str = ""


@dataclass(frozen=True)
class PassOutcome:
    """The module after a pass, and the sites that the pass considered."""

    module: tvm.IRModule
    sites: tuple[Site, ...] = ()

    @property
    def rewritten(self) -> int:
        """Return how many sites were rewritten."""
        return sum(site.refusal is None for site in self.sites)


# Metadata of a field that is no option: what the driver computed for a pass, which no text can say.
NO_OPTION = {"option": False}


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewriting of Relax modules.

    Subclasses are frozen dataclasses whose fields are the pass's options, but for those with the metadata NO_OPTION.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Return the rewritten module, well-formed again, and the account of the sites."""


def options_of(kind: type[Pass]) -> tuple[dataclasses.Field[object], ...]:
    """Return the fields of a pass that are its options."""
    return tuple(field for field in dataclasses.fields(kind) if field.metadata.get("option", True))


class Refusal(Exception):
    """Raised by `check` when a site may not be rewritten; the message is the reason."""


def require(condition: bool, otherwise: str) -> None:
    """Refuse the site unless the condition holds; `otherwise` is the reason."""
    if not condition:
        raise Refusal(otherwise)


def canonical(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module without names that stand for others, and without what nobody reads."""
    return relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(module))


class Dataflow:
    """Who produces and who reads each variable of a function."""

    def __init__(self, function: relax.Function) -> None:
        collector = _Collector()
        collector.visit_expr(function)
        self._producers: dict[relax.Var, relax.Expr] = collector.producers
        self._uses: Counter[relax.Var] = collector.uses

    def producer(self, expr: relax.Expr) -> relax.Expr:
        """Return what a variable is bound to, through renamings; any other expression is returned as it is."""
        while isinstance(expr, relax.Var) and expr in self._producers:
            expr = self._producers[expr]
        return expr

    def call(self, expr: relax.Expr, *operators: str) -> tvm.ir.Call | None:
        """Return the call that produces `expr` if it is one of the named operators."""
        producer = self.producer(expr)
        if isinstance(producer, tvm.ir.Call) and isinstance(producer.op, tvm.ir.Op) and producer.op.name in operators:
            return producer
        return None

    def read_once(self, expr: relax.Expr) -> bool:
        """Return whether an expression, and each variable that it is another name of, has at most one reader."""
        while isinstance(expr, relax.Var):
            if self._uses[expr] > 1:
                return False
            if expr not in self._producers:
                break
            expr = self._producers[expr]
        return True

    def uses(self, variable: relax.Expr) -> int:
        """Return how often a variable is read."""
        return self._uses[variable]

    def nodes(self, *exprs: relax.Expr) -> Nodes:
        """Return the ONNX nodes that expressions, or what variables are bound to, came from."""
        return union(nodes_of(self.producer(expr)) for expr in exprs)


@visitor
class _Collector(PyExprVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.producers: dict[relax.Var, relax.Expr] = {}
        self.uses: Counter[relax.Var] = Counter()

    def visit_var_(self, op: relax.Var) -> None:
        self.uses[op] += 1

    def visit_dataflow_var_(self, op: relax.Var) -> None:
        self.uses[op] += 1

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self.producers[binding.var] = binding.value
        self.visit_expr(binding.value)


@dataclass(frozen=True)
class PatternPass(Pass, Generic[Match]):
    """A pass that looks at every binding, and rewrites those that match its pattern and pass its check."""

    @abc.abstractmethod
    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> Match | None:
        """Return the parts of the structure that ends in `expr`, or None if it is not the structure looked for."""

    @abc.abstractmethod
    def check(self, match: Match, dataflow: Dataflow) -> None:
        """Raise Refusal with the reason if this match may not be rewritten."""

    @abc.abstractmethod
    def rewrite(self, match: Match) -> relax.Expr:
        """Return the expression, over the variables of the match, that takes its place."""

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        return self.run_first(module, None)

    def run_first(self, module: tvm.IRModule, most: int | None) -> PassOutcome:
        """Rewrite the first `most` sites that may be rewritten, or all for None; none after them is recorded.

        Where there are none the module is the one that was given.
        """
        sites: list[Site] = []
        rewritten = tvm.IRModule(dict(module.functions), attrs=module.attrs)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                left = None if most is None else most - sum(site.refusal is None for site in sites)
                rewriter = _Rewriter(self, module, function, left)
                rewritten.update_func(variable, rewriter.visit_expr(function))
                sites.extend(rewriter.sites)
        outcome = PassOutcome(module, tuple(sites))
        if not outcome.rewritten:
            return outcome
        return dataclasses.replace(outcome, module=relax.transform.DeadCodeElimination()(rewritten))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(
        self, rewriting: PatternPass[Match], module: tvm.IRModule, function: relax.Function, most: int | None
    ) -> None:
        super().__init__(module)
        self._left = most
        self._pass = rewriting
        self._dataflow = Dataflow(function)
        self.sites: list[Site] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Rewrite the value of a binding that matches; the parts of the match are renamed as they are visited."""
        # What a variable merely renames is a site of its own already.
        looked_at = self._left != 0 and not isinstance(binding.value, relax.Var)
        match = self._pass.pattern(binding.value, self._dataflow) if looked_at else None
        if match is not None:
            location = binding.var.name
            nodes = self._dataflow.nodes(*_expressions(match), binding.value)
            try:
                self._pass.check(match, self._dataflow)
            except Refusal as refusal:
                self.sites.append(Site(location, str(refusal), nodes))
            else:
                self.sites.append(Site(location, None, nodes))
                self._left = None if self._left is None else self._left - 1
                binding = relax.VarBinding(binding.var, self.builder_.normalize(self._pass.rewrite(match)))
        super().visit_var_binding_(binding)


def _expressions(match: object) -> Iterator[relax.Expr]:
    """Yield the expressions that a match consists of."""
    if isinstance(match, relax.Expr):
        yield match
    elif dataclasses.is_dataclass(match):
        for field in dataclasses.fields(match):
            yield from _expressions(getattr(match, field.name))
    elif isinstance(match, list | tuple):
        for part in match:
            yield from _expressions(part)
