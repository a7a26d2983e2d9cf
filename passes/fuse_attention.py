"""Attention as one function: softmax(f(q k^T)) v without the matrices of scores and probabilities.

With P = softmax(f(q k^T)) over the keys, row i of the result is
    sum_j exp(l_ij - max_j l_ij) v_j / sum_j exp(l_ij - max_j l_ij),  l_ij = f(sum_d q_id k_jd)
(with exp(sink) among the terms of the sum where rows have a sink: a logit without a value), where f scales a score,
caps it, adds biases and masks it (Vaswani et al., Attention Is All You Need, 2017, section
3.2.1). The function that takes the place of the operators is written in exactly these steps; its schedule computes them
for blocks of queries and keys at a time. Queries, keys and values are read where they are, through the reshapes,
transpositions, slices and repetitions of heads that stand before the products, and the result is written in the order
that the transposition behind it gives. Constant factors of queries and keys are moved to the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
from tvm import relax, te, tirx
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from passes.attention_elements import FLOAT, NARROW, Substitution, Value
from passes.attention_matcher import Attention, Matcher
from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site
from passes.tensor_types import dtype_of
from passes.views import Digit
from schedules.stages import substitute


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make one function of two products with a softmax between them.

    Fires when the products are of fp32, or of fp16 or bf16, which are computed in fp32, the keys' axis is the one that
    the softmax normalizes and the second product adds up, and nobody else reads what lies between the products.
    """

    name: ClassVar[str] = "fuse-attention"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        sites: list[Site] = []
        rewriter = _Rewriter(module, sites)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter.builder_.update_func(variable, rewriter.rewritten(function))
        return PassOutcome(relax.transform.DeadCodeElimination()(rewriter.builder_.get()), tuple(sites))


# What the result of an attention is bound to, in place of the product itself.
_ENDS = ("relax.permute_dims", "relax.astype")


def _is_end(value: tvm.ir.Call) -> bool:
    """Return whether a call is a transposition, or a rounding to 16-bit floats."""
    if not isinstance(value.op, tvm.ir.Op) or value.op.name not in _ENDS:
        return False
    return value.op.name == "relax.permute_dims" or dtype_of(value) in NARROW


@visitor
class _Readers(PyExprVisitor):
    """Collects what each variable is bound to, and which bindings read it."""

    def __init__(self) -> None:
        super().__init__()
        self.bindings: dict[relax.Var, list[relax.Var]] = {}
        self.values: dict[relax.Var, relax.Expr] = {}
        self._current: relax.Var | None = None

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self._current = binding.var
        self.values[binding.var] = binding.value
        self.visit_expr(binding.value)
        self._current = None

    def visit_var_(self, op: relax.Var) -> None:
        self._note(op)

    def visit_dataflow_var_(self, op: relax.Var) -> None:
        self._note(op)

    def _note(self, variable: relax.Var) -> None:
        if self._current is not None:
            self.bindings.setdefault(variable, []).append(self._current)


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, module: tvm.IRModule, sites: list[Site]) -> None:
        super().__init__(module)
        self._sites = sites
        self._dataflow: Dataflow
        self._readers: dict[relax.Var, list[relax.Var]] = {}
        self._values: dict[relax.Var, relax.Expr] = {}

    def rewritten(self, function: relax.Function) -> relax.Expr:
        """Return `function` with its attentions fused."""
        self._dataflow = Dataflow(function)
        readers = _Readers()
        readers.visit_expr(function)
        self._readers, self._values = readers.bindings, readers.values
        return self.visit_expr(function)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Bind the result of an attention, in the order of its last transposition, to one call."""
        product = self._product_behind(binding.var, binding.value)
        if product is not None:
            try:
                attention = Matcher(self._dataflow, self.builder_.get()).match(binding.var, product)
            except Refusal as refusal:
                self._sites.append(Site(binding.var.name, str(refusal), self._dataflow.nodes(product, binding.value)))
            else:
                if attention is not None:
                    self._sites.append(Site(binding.var.name, None, self._dataflow.nodes(*attention.parts)))
                    binding = relax.VarBinding(binding.var, self._call(attention))
        super().visit_var_binding_(binding)

    def _product_behind(self, variable: relax.Var, value: relax.Expr) -> relax.Var | None:
        """Return the product that `variable` is, behind views and a rounding, if no more of these stand behind it."""
        if not isinstance(value, tvm.ir.Call) or self._goes_on(variable):
            return None
        if self._dataflow.call(value, "relax.matmul") is not None:
            return variable
        if not _is_end(value):
            return None
        source = value.args[0]
        while isinstance(source, relax.Var) and self._dataflow.read_once(source):
            call = self._dataflow.call(source, "relax.matmul", "relax.reshape", *_ENDS)
            if call is None:
                return None
            if call.op.name == "relax.matmul":
                return source
            source = call.args[0]
        return None

    def _goes_on(self, variable: relax.Var) -> bool:
        """Return whether a transposition or rounding of `variable`, behind reshapes, is all that reads it."""
        while self._dataflow.read_once(variable) and variable in self._readers:
            (variable,) = self._readers[variable]
            value = self._values[variable]
            if isinstance(value, tvm.ir.Call):
                if self._dataflow.call(value, "relax.reshape") is None:
                    return _is_end(value)
            elif not isinstance(value, relax.Var):
                return False
        return False

    def _call(self, attention: Attention) -> relax.Expr:
        """Return the call of the function that computes `attention`."""
        tensors = [self.builder_.normalize(self.visit_expr(tensor)) for tensor in attention.tensors]

        def compute(tensors: Sequence[te.Tensor], actual: Sequence[tvm.ir.Expr]) -> te.Tensor:
            return _computed(attention, tensors, dict(zip(attention.symbols, actual, strict=True)))

        return self.builder_.call_te(compute, tensors, list(attention.symbols), primfunc_name_hint="attention")


def _computed(attention: Attention, tensors: Sequence[te.Tensor], symbols: Substitution) -> te.Tensor:
    """Return the attention as tensor expressions, one for each step."""

    def extent(digit: Digit) -> tvm.ir.Expr:
        return substitute(digit.extent, symbols)

    outer = [axis for axis in attention.axes if axis is not attention.column]
    rows = [extent(axis) for axis in outer]

    def at(row: Sequence[tvm.ir.Expr], **others: tvm.ir.Expr) -> dict[tvm.ir.Var, tvm.ir.Expr]:
        values = {axis.value: value for axis, value in zip(outer, row, strict=True)}
        named = {"key": attention.key, "depth": attention.depth, "column": attention.column}
        return {**symbols, **values, **{named[name].value: value for name, value in others.items()}}

    def product(left: Value, right: Value, values: Substitution) -> tvm.ir.Expr:
        return left(tensors, values).astype(FLOAT) * right(tensors, values).astype(FLOAT)

    keys = extent(attention.key)
    depth = te.reduce_axis((0, extent(attention.depth)), "depth")
    scores = te.compute(
        (*rows, keys),
        lambda *p: te.sum(product(attention.query, attention.keys, at(p[:-1], key=p[-1], depth=depth.var)), axis=depth),
        "scores",
    )
    score = lambda values: scores(*(values[axis.value] for axis in (*outer, attention.key)))  # noqa: E731
    logits = te.compute((*rows, keys), lambda *p: attention.logit([*tensors, score], at(p[:-1], key=p[-1])), "logits")
    key = te.reduce_axis((0, keys), "key")
    largest = te.compute(rows, lambda *p: te.max(logits(*p, key), axis=key), "largest")
    sink = attention.sink
    if sink is not None:
        of_keys = largest
        largest = te.compute(rows, lambda *p: tirx.max(of_keys(*p), sink(tensors, at(p))), "largest_or_sink")
    exponentials = te.compute((*rows, keys), lambda *p: te.exp(logits(*p) - largest(*p[:-1])), "exponentials")
    term = te.reduce_axis((0, keys), "term")
    total = te.compute(rows, lambda *p: te.sum(exponentials(*p, term), axis=term), "total")
    if sink is not None:
        of_terms = total
        total = te.compute(rows, lambda *p: of_terms(*p) + te.exp(sink(tensors, at(p)) - largest(*p)), "total_and_sink")

    def probability(*p: tvm.ir.Expr) -> tvm.ir.Expr:
        quotient = exponentials(*p) / total(*p[:-1])
        zero = tirx.const(0, FLOAT)
        return tirx.Select(total(*p[:-1]) > zero, quotient, zero) if attention.zero_if_empty else quotient

    probabilities = te.compute((*rows, keys), probability, "probabilities")
    member = te.reduce_axis((0, keys), "member")
    place = next(n for n, axis in enumerate(attention.axes) if axis is attention.column)

    def weighted(*p: tvm.ir.Expr) -> tvm.ir.Expr:
        row = [*p[:place], *p[place + 1 :]]
        value = attention.values(tensors, at(row, key=member.var, column=p[place])).astype(FLOAT)
        return te.sum(probabilities(*row, member) * value, axis=member)

    result = te.compute([extent(axis) for axis in attention.axes], weighted, "attention")
    if attention.dtype == FLOAT:
        return result
    return te.compute(result.shape, lambda *p: result(*p).astype(attention.dtype), "rounded")
