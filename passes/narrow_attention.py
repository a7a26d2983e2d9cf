"""Attention's operands and result stored as bfloat16, where nothing is read of them but numbers rounded to it.

    attention(q, k, v) of r(q), r(k), r(v)  ->  attention(bf16(q), bf16(k), bf16(v))
    bf16(attention(...))                    ->  attention(...) that returns bfloat16

with r the rounding to bfloat16 inside the function (`round-attention`). The same numbers are multiplied: they are
rounded where they are computed, not where they are read, and take half of the memory in between. No kernel is left that
only converts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
import tvm_ffi
from tvm import ir, relax, te, tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site, require
from passes.provenance import Bindings
from passes.round_attention import attention_of
from passes.tensor_types import dtype_of
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.joining import joined

FLOAT = "float32"


@dataclass(frozen=True)
class NarrowAttention(Pass):
    """Store what attention with rounded operands reads and returns as bfloat16, where no one reads more of it."""

    name: ClassVar[str] = "narrow-attention"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        sites: list[Site] = []
        rewriter = _Rewriter(module, sites)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter.builder_.update_func(variable, rewriter.rewritten(function))
        return PassOutcome(relax.transform.DeadCodeElimination()(rewriter.builder_.get()), tuple(sites))


@dataclass(frozen=True)
class _Variant:
    """A function whose parameters at some positions, and whose result if `result`, are bfloat16."""

    function: tvm.ir.GlobalVar
    positions: tuple[int, ...]
    result: bool


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, module: tvm.IRModule, sites: list[Site]) -> None:
        super().__init__(module)
        self._module = module
        self._sites = sites
        self._variants: dict[_Variant, tvm.ir.GlobalVar] = {}
        self._dataflow: Dataflow
        self._conversions: dict[relax.Var, relax.Var] = {}

    def rewritten(self, function: relax.Function) -> relax.Expr:
        """Return `function` with its attentions narrowed."""
        self._dataflow = Dataflow(function)
        ends = ((variable, self._converted(value)) for variable, value in Bindings(function).values.items())
        self._conversions = {variable: source for variable, source in ends if source is not None}
        return self.visit_expr(function)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Bind a narrower attention; leave out a conversion of its result."""
        value = binding.value
        if self._is_attention(value):
            nodes = self._dataflow.nodes(value)
            try:
                variant = self._variant(binding.var, value)
            except Refusal as refusal:
                self._sites.append(Site(binding.var.name, str(refusal), nodes))
            else:
                self._sites.append(Site(binding.var.name, None, nodes))
                # A variable of its own: its type may be another one.
                self.set_var_remap(binding.var, self.builder_.emit(self._call(value, variant), binding.var.name))
                return
        elif binding.var in self._conversions:
            narrow = self.visit_expr(value.args[0])
            if dtype_of(narrow) == BFLOAT16:
                self.set_var_remap(binding.var, narrow)
                return
        super().visit_var_binding_(binding)

    def _converted(self, value: relax.Expr) -> relax.Var | None:
        """Return the attention's result that a conversion to bfloat16 reads, behind reshapes, and nothing else does."""
        call = self._dataflow.call(value, "relax.astype")
        if call is None or dtype_of(call) != BFLOAT16:
            return None
        source = call.args[0]
        while self._dataflow.read_once(source) and isinstance(source, relax.Var):
            producer = self._dataflow.producer(source)
            if self._is_attention(producer):
                return source
            reshape = self._dataflow.call(producer, "relax.reshape")
            if reshape is None:
                return None
            source = reshape.args[0]
        return None

    def _is_attention(self, value: relax.Expr) -> bool:
        """Return whether a value is the call of an attention whose operands are rounded, of fp32 so far."""
        if not isinstance(value, tvm.ir.Call) or value.op != tvm.ir.Op.get("relax.call_tir"):
            return False
        attention = attention_of(self._module[value.args[0]])
        return attention is not None and attention.rounded and len(value.args) == 2 and dtype_of(value) == FLOAT

    def _variant(self, variable: relax.Var, call: tvm.ir.Call) -> _Variant:
        """Return which parts of an attention may be narrower; raises Refusal where none may."""
        function, arguments = call.args[0], list(call.args[1].fields)
        inside = self._module[function]
        positions = tuple(
            position
            for position, (argument, parameter) in enumerate(zip(arguments, inside.params[:-1], strict=True))
            if self._is_own(argument, arguments) and _is_only_rounded(inside, parameter)
        )
        # A conversion joins functions of tensors alone: some read a size, such as that of a cache, as an argument.
        only_tensors = all(map(tirx.is_buffer_var, inside.params))
        result = only_tensors and any(variable.same_as(source) for source in self._conversions.values())
        require(bool(positions) or result, "others read its operands and its result in fp32")
        return _Variant(function, positions, result)

    def _is_own(self, argument: relax.Expr, arguments: Sequence[relax.Expr]) -> bool:
        """Return whether an argument in fp32 is computed by a call, for this attention alone."""
        computed = isinstance(argument, relax.Var) and isinstance(self._dataflow.producer(argument), tvm.ir.Call)
        if not computed or dtype_of(argument) != FLOAT:
            return False
        return self._dataflow.uses(argument) == sum(argument.same_as(other) for other in arguments)

    def _call(self, call: tvm.ir.Call, variant: _Variant) -> relax.Expr:
        """Return the call of a variant, with its arguments converted."""
        arguments = [self.visit_expr(argument) for argument in call.args[1].fields]
        narrow: dict[relax.Var, relax.Var] = {}
        for position in variant.positions:
            argument = arguments[position]
            if argument not in narrow:
                narrow[argument] = self.builder_.emit(relax.op.astype(argument, BFLOAT16), argument.name)
            arguments[position] = narrow[argument]
        if variant not in self._variants:
            function = _narrowed(self._module[variant.function], variant)
            self._variants[variant] = self.builder_.add_func(function, variant.function.name_hint)
        kind = call.ty_args[0]
        result = relax.TensorType(kind.shape, BFLOAT16) if variant.result else kind
        return relax.call_tir(self._variants[variant], relax.Tuple(arguments), result)


def _is_only_rounded(function: tirx.PrimFunc, parameter: Var) -> bool:
    """Return whether a function reads a parameter only to round each element to bfloat16."""
    reads: list[bool] = []

    def cast(value: tirx.Cast, mutate: tvm_ffi.StructuralMutator) -> Expr:
        read = value.value
        if str(value.ty.dtype) == BFLOAT16 and isinstance(read, TensorLoad) and read.source.same_as(parameter):
            reads.append(True)
            return value
        return mutate.default_mutate(value)

    def load(read: TensorLoad, mutate: tvm_ffi.StructuralMutator) -> Expr:
        if read.source.same_as(parameter):
            reads.append(False)
        return mutate.default_mutate(read)

    tvm_ffi.structural_mutate(function.body, [(tirx.Cast, cast), (TensorLoad, load)])
    return bool(reads) and all(reads)


def _narrowed(function: tirx.PrimFunc, variant: _Variant) -> tirx.PrimFunc:
    """Return an attention that reads and returns bfloat16 as `variant` says."""
    parameters = list(function.params)
    narrow: dict[Var, Var] = {}
    for position in variant.positions:
        wide = parameters[position]
        narrow[wide] = tirx.decl_buffer(list(wide.shape), BFLOAT16, wide.name, layout=None)

    def read(load: TensorLoad, mutate: tvm_ffi.StructuralMutator) -> Expr:
        load = mutate.default_mutate(load)
        if load.source not in narrow:
            return load
        return tirx.Cast(FLOAT, tirx.BufferLoad(narrow[load.source], list(load.indices)))

    def region(declared: ir.TensorRegion, mutate: tvm_ffi.StructuralMutator) -> Expr:
        if declared.source not in narrow:
            return mutate.default_mutate(declared)
        return tirx.BufferRegion(narrow[declared.source], list(declared.region))

    body = tvm_ffi.structural_mutate(function.body, [(TensorLoad, read), (ir.TensorRegion, region)])
    parameters = [narrow.get(parameter, parameter) for parameter in parameters]
    narrowed = tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
    if not variant.result:
        return narrowed
    result = te.placeholder(list(parameters[-1].shape), FLOAT, "result")
    rounded = te.compute(result.shape, lambda *place: result(*place).astype(BFLOAT16), "rounded")
    both = joined(narrowed, te.create_prim_func([result, rounded]), [0])
    assert both is not None
    return tirx.PrimFunc(both.params, both.body, function.ret_type, function.attrs)
