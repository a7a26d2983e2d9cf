"""Fused attention with the operands of both its products rounded to bfloat16, and sums and softmax in fp32.

    softmax(f(q k^T)) v  ->  softmax(f(r(q) r(k)^T)) r(v), with r the rounding to bfloat16, also of the exponentials

It is for targets that add up products of pairs of bfloat16 in one instruction; on others rounding would only cost time.
Where a model's products with quantized weights round their rows to int8, or in tile registers to bfloat16, attention
may be as coarse without having been asked for bfloat16.
Attention of few queries takes the time of reading keys and values, which rounding does not shorten: where their number
is known only when the kernel runs, it chooses, and computes few of them without rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import TensorLoad
from tvm.relax.expr_functor import PyExprVisitor, visitor

import targets
from passes.base import Pass, PassOutcome, Refusal, Site, require
from passes.provenance import Nodes, nodes_of
from schedules.attention import LEAST_QUERIES
from schedules.attention_mask import choice_of
from schedules.attention_structure import AttentionAnalysis, analyse, whole
from schedules.intrin.bf16_pairs import PAIR, bf16_pairs
from schedules.quantized_structure import operands_of
from schedules.stage_parsing import parse
from schedules.stages import Stage


@dataclass(frozen=True)
class RoundAttention(Pass):
    """Compute the products of fused attention with operands of bfloat16, where `target` has an instruction for it.

    `with_quantized`: only in modules with products of rows in int8 by quantized weights.
    """

    name: ClassVar[str] = "round-attention"
    target: str = "host"
    with_quantized: bool = False

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite the functions of all attentions of the module."""
        calls = _Calls()
        if self.with_quantized and not has_quantized_products(module):
            return PassOutcome(module)
        for _, function in module.functions_items():
            if isinstance(function, relax.Function):
                calls.visit_expr(function)
        sites: list[Site] = []
        functions = dict(module.functions_items())
        for location, function, nodes in calls.found:
            # Calls may share a function.
            attention = attention_of(module[function])
            if attention is None:
                continue
            try:
                self._check(attention)
            except Refusal as refusal:
                sites.append(Site(location, str(refusal), nodes))
            else:
                sites.append(Site(location, None, nodes))
                functions[function] = _with_rounded_products(module[function])
        return PassOutcome(tvm.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos), tuple(sites))

    def _check(self, attention: AttentionAnalysis) -> None:
        """Refuse what gains nothing, or has no pairs."""
        pairs = bf16_pairs(targets.get(self.target))
        require(pairs is not None, "the target has no dot product of bfloat16")
        require(not attention.rounded, "the operands are rounded already")
        lane, depth = attention.lane, attention.depth.extent
        few = lane is None or (isinstance(lane.extent, int) and lane.extent < LEAST_QUERIES)
        require(not few, "reading the keys of so few queries takes the time")
        require(isinstance(depth, int) and depth % PAIR == 0, "the products' terms do not come in pairs")
        require(isinstance(attention.column.extent, int), "the number of columns is not known")
        in_cache = any(choice_of(element) is not None for element in (attention.keys, attention.values))
        require(not in_cache, "keys and values are in a cache and beside it")


@visitor
class _Calls(PyExprVisitor):
    """Collects the calls of TIR functions: what each is bound to, the function, and the ONNX nodes it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tvm.ir.GlobalVar, Nodes]] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = binding.value
        if isinstance(value, tvm.ir.Call) and value.op == tvm.ir.Op.get("relax.call_tir"):
            self.found.append((binding.var.name, value.args[0], nodes_of(value)))


def has_quantized_products(module: tvm.IRModule) -> bool:
    """Return whether a function of the module multiplies rows in int8 by quantized weights."""
    functions = (function for _, function in module.functions_items() if isinstance(function, tirx.PrimFunc))
    stages = (stage for function in functions if (staged := parse(function)) is not None for stage in staged.stages)
    reductions = (stage for stage in stages if isinstance(stage, Stage) and stage.is_reduction and stage.spatial)
    return any(operands_of(stage) is not None for stage in reductions)


def attention_of(function: tirx.PrimFunc) -> AttentionAnalysis | None:
    """Return the analysis of a function that is one attention; None for any other."""
    staged = parse(function)
    kernel = None if staged is None else whole(staged)
    return None if kernel is None else analyse(kernel.stages)


def _with_rounded_products(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return an attention with the factors of the products that it adds up rounded: no other sums are of products."""

    def visit(store: tirx.BufferStore, mutator: tvm_ffi.StructuralMutator) -> tirx.BufferStore:
        total = store.value
        if not isinstance(total, tirx.Add) or not isinstance(total.a, TensorLoad) or not isinstance(total.b, tirx.Mul):
            return mutator.default_mutate(store)
        if not total.a.source.same_as(store.buffer):
            return mutator.default_mutate(store)
        product = total.b
        return tirx.BufferStore(store.buffer, total.a + _rounded(product.a) * _rounded(product.b), store.indices)

    return function.with_body(tvm_ffi.structural_mutate(function.body, (tirx.BufferStore, visit)))


def _rounded(factor: tvm.ir.Expr) -> tvm.ir.Expr:
    return tirx.Cast("float32", tirx.Cast("bfloat16", factor))
