"""Calls of TIR functions merged where the schedule computes both in one kernel.

TVM's fusion decides by the kind of an operator; what changes the layout of a product's, a convolution's or a mean's
result (blocked channels, a window's rows put back in order, axes dropped) always becomes a kernel of its own there.
Here the merged function is written down and the schedule asked. A call is merged with the one that it reads where
nothing else reads that, so that no path leaves the two and enters them again. A product and a function of rows
(normalization, softmax) are merged also where others read the first one's result, mostly a residual sum: the kernel
returns both. Every pair of calls of which one reads the other is a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from optimizer.kernel_nodes import OPERATORS, kernel_name
from passes.base import PassOutcome, Refusal, Site, require
from passes.dependencies import Dependencies
from passes.provenance import Bindings, carry, union
from schedules.joining import joined, kind_of, why_apart, why_several
from targets.base import Target


@dataclass(frozen=True)
class _Pair:
    """Two functions, and how one for both is called.

    The second one gets the first one's result at positions `reads`; `shared` are positions, of the second and of the
    first, of the same tensor; `constant` those of constants among the arguments of the function for both.
    """

    first: str
    second: str
    reads: tuple[int, ...]
    shared: tuple[tuple[int, int], ...]
    constant: tuple[int, ...]
    returns_both: bool


@dataclass(frozen=True)
class _Merger:
    """A call of `function` on `arguments` that takes the place of those that `producer` and `reader` are bound to.

    It is bound where `place`, one of the two, was. It returns the reader's result, or the producer's and the reader's.
    """

    producer: relax.Var
    reader: relax.Var
    function: tvm.ir.GlobalVar
    arguments: tuple[relax.Expr, ...]
    place: relax.Var
    returns_both: bool


def merge_kernels(module: tvm.IRModule, target: Target) -> PassOutcome:
    """Return `module`, fused but not scheduled, with calls in `main` merged until no two make one kernel.

    The account has all pairs that were merged, and those that were left.
    """
    if target.device != "cpu":
        return PassOutcome(module)
    known: dict[_Pair, tvm.ir.GlobalVar | str] = {}
    merged: list[Site] = []
    while True:
        finder = _Finder(module, target, known)
        mergers = finder.mergers()
        if not mergers:
            return PassOutcome(module, (*merged, *finder.sites))
        merged.extend(site for site in finder.sites if site.refusal is None)
        rewriter = _Rewriter(finder.module, mergers)
        function = rewriter.visit_expr(finder.module["main"])
        after = tvm.IRModule(dict(finder.module.functions), attrs=module.attrs, global_infos=module.global_infos)
        after.update_func(after.get_global_var("main"), function)
        module = carry(module, relax.transform.DeadCodeElimination()(after))
        known = {pair: found for pair, found in known.items() if isinstance(found, str)}


class _Finder:
    """Looks for calls to merge and keeps the account; `module` gains the functions that they call.

    `known` has for pairs of functions the one that they are merged to, or the reason why they are not.
    """

    def __init__(
        self,
        module: tvm.IRModule,
        target: Target,
        known: dict[_Pair, tvm.ir.GlobalVar | str],
    ) -> None:
        self.module = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
        self._target = target
        self._known = known
        self._bindings = Bindings(module["main"])
        self._dependencies = Dependencies(module["main"])
        self._position = {variable: position for position, variable in enumerate(self._bindings.values)}
        self._block = _blocks(module["main"])
        self._written_in_place = {
            argument for value in self._bindings.values.values() for argument in _arguments_in_place(value)
        }
        self._kinds: dict[str, str | None] = {}
        self.sites: list[Site] = []

    def mergers(self) -> list[_Merger]:
        """Return calls to merge, none of which takes part in another."""
        found: list[_Merger] = []
        taken: set[relax.Var] = set()
        for producer, reader in self._pairs():
            if taken & {reader, producer}:
                continue
            first, second = (_callee(self._bindings.values[variable]) for variable in (producer, reader))
            nodes = union((self._bindings.nodes(producer), self._bindings.nodes(reader)))
            try:
                merger = self._merger(producer, reader)
            except Refusal as refusal:
                self.sites.append(Site(reader.name, f"{first} -> {second}: {refusal}", nodes))
            else:
                found.append(merger)
                self.sites.append(Site(reader.name, None, nodes, f"as {merger.function.name_hint}"))
                taken |= {reader, producer}
        return found

    def _pairs(self) -> list[tuple[relax.Var, relax.Var]]:
        """Return calls of functions and those that read them.

        Two products come first: where a norm took in one of a gate's products, the gate could not be one kernel.
        """
        pairs = [
            (producer, reader)
            for reader, value in self._bindings.values.items()
            for producer in dict.fromkeys(self._bindings.operands[reader])
            if _callee(value) is not None and _callee(self._bindings.values[producer]) is not None
        ]
        return sorted(pairs, key=lambda pair: not self._are_products(*pair))

    def _are_products(self, producer: relax.Var, reader: relax.Var) -> bool:
        """Return whether two variables are results of products with what follows them one to one."""
        calls = [_tir_call(self._bindings.values[variable]) for variable in (producer, reader)]
        return all(call is not None and self._kind(call[0]) == "product" for call in calls)

    def _merger(self, producer: relax.Var, reader: relax.Var) -> _Merger:
        """Return the call that computes both; raises Refusal."""
        first, second = _tir_call(self._bindings.values[producer]), _tir_call(self._bindings.values[reader])
        if first is None or second is None:
            raise Refusal("one of them takes a size, has several results, or writes in place")
        returned = self._dependencies.is_result(producer)
        both = returned or self._bindings.readers.get(producer) != [reader]
        if {self._kind(first[0]), self._kind(second[0])} != {"product", "rows"}:
            require(not returned, "the function returns the first one's result")
            require(not both, "another one reads the first one's result")
        require(self._dependencies.is_convex([producer, reader]), "a path leaves the two and enters them again")
        place = self._place(producer, reader) if both else reader
        moved = first if place is reader else second
        # The call would move past the one that writes what it reads.
        overwritten = any(argument in self._written_in_place for argument in moved[1])
        require(not overwritten, "one of them reads what another one writes in place")
        reads = tuple(position for position, argument in enumerate(second[1]) if argument.same_as(producer))
        shared = _shared(first[1], second[1]) if self._are_products(producer, reader) else ()
        kept = set(range(len(second[1]))).difference(reads, (position for position, _ in shared))
        arguments = (*first[1], *(second[1][position] for position in sorted(kept)))
        constant = tuple(i for i, argument in enumerate(arguments) if isinstance(argument, tvm.ir.GenericConst))
        pair = _Pair(first[0].name_hint, second[0].name_hint, reads, shared, constant, both)
        if pair not in self._known:
            self._known[pair] = self._function(pair)
        function = self._known[pair]
        if isinstance(function, str):
            raise Refusal(function)
        return _Merger(producer, reader, function, arguments, place, both)

    def _kind(self, function: tvm.ir.GlobalVar) -> str | None:
        """Return `kind_of` a function, found once: layers call the same few."""
        if function.name_hint not in self._kinds:
            self._kinds[function.name_hint] = kind_of(self.module[function])
        return self._kinds[function.name_hint]

    def _place(self, producer: relax.Var, reader: relax.Var) -> relax.Var:
        """Return in the place of which of two variables a call that returns both may be bound; raises Refusal."""
        require(self._block.get(producer, -1) == self._block.get(reader), "they lie in different blocks")
        others = [operand for operand in self._bindings.operands[reader] if not operand.same_as(producer)]
        if all(self._position[operand] < self._position[producer] for operand in others):
            return producer
        early = any(self._position[other] < self._position[reader] for other in self._bindings.readers[producer])
        require(not early, "another one reads the first one's result before the second one could be computed")
        return reader

    def _function(self, pair: _Pair) -> tvm.ir.GlobalVar | str:
        """Return the function that computes both of a pair, or the reason why there is none."""
        first, second = self.module[pair.first], self.module[pair.second]
        functions = first, second
        merged = joined(first, second, pair.reads, shared=pair.shared, returned=pair.returns_both)
        if merged is None:
            return why_apart(first, second)
        reason = why_several(merged, self._target, pair.constant)
        if reason is not None:
            return reason
        operators = tuple(str(name) for function in functions for name in function.attrs.get(OPERATORS, ()))
        variable = tvm.ir.GlobalVar(self._free_name(kernel_name(operators)))
        relax.expr._update_type(variable, merged.ty)
        self.module[variable] = merged.with_attr(OPERATORS, list(operators))
        return variable

    def _free_name(self, name: str) -> str:
        taken = {variable.name_hint for variable in self.module.get_global_vars()}
        candidates = (name if number == 1 else f"{name}_{number}" for number in range(1, len(taken) + 2))
        return next(candidate for candidate in candidates if candidate not in taken)


def _blocks(function: relax.Function) -> dict[relax.Var, int]:
    """Return the number of the block that binds each variable of a function's outermost scope."""
    if not isinstance(function.body, relax.SeqExpr):
        return {}
    return {binding.var: number for number, block in enumerate(function.body.blocks) for binding in block.bindings}


def _tir_call(value: relax.Expr) -> tuple[tvm.ir.GlobalVar, tuple[relax.Expr, ...]] | None:
    """Return the function of a call without scalar arguments that has one result, and its arguments."""
    if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.Op) or value.op.name != "relax.call_tir":
        return None
    if len(value.args) != 2 or not isinstance(value.ty, relax.TensorType):
        return None
    return value.args[0], tuple(value.args[1].fields)


def _shared(first: Sequence[relax.Expr], second: Sequence[relax.Expr]) -> tuple[tuple[int, int], ...]:
    """Return the positions in `second` and in `first` of variables that stand in both."""
    where = {argument: position for position, argument in enumerate(first) if isinstance(argument, relax.Var)}
    return tuple(
        (position, where[argument])
        for position, argument in enumerate(second)
        if isinstance(argument, relax.Var) and argument in where
    )


def _callee(value: relax.Expr) -> str | None:
    """Return the name of the function that a call calls; None for what is no call of a TIR function."""
    if not isinstance(value, tvm.ir.Call) or not value.args or not isinstance(value.args[0], tvm.ir.GlobalVar):
        return None
    return value.args[0].name_hint


def _arguments_in_place(value: relax.Expr) -> list[relax.Expr]:
    """Return what a call may write to besides its result."""
    if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.Op):
        return []
    return list(value.args[1].fields) if value.op.name == "relax.call_tir_inplace" else []


@mutator
class _Rewriter(PyExprMutator):
    """Binds merged calls; those that they took in are left for dead code elimination."""

    def __init__(self, module: tvm.IRModule, mergers: list[_Merger]) -> None:
        super().__init__(module)
        self._mergers = {merger.place: merger for merger in mergers}
        self._bound_together = {
            variable for merger in mergers if merger.returns_both for variable in (merger.producer, merger.reader)
        }

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        merger = self._mergers.get(binding.var)
        if merger is not None and merger.returns_both:
            kinds = [variable.ty for variable in (merger.producer, merger.reader)]
            call = relax.call_tir(merger.function, relax.Tuple(list(merger.arguments)), kinds)
            both = self.builder_.emit(self.visit_expr(call))
            for position, variable in enumerate((merger.producer, merger.reader)):
                field = self.builder_.normalize(relax.TupleGetItem(both, position))
                super().visit_var_binding_(relax.VarBinding(variable, field))
            return
        if merger is not None:
            call = relax.call_tir(merger.function, relax.Tuple(list(merger.arguments)), binding.value.ty_args[0])
            binding = relax.VarBinding(binding.var, self.builder_.normalize(call))
        if binding.var not in self._bound_together:
            super().visit_var_binding_(binding)
