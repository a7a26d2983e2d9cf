"""Parallel products over one input, computed as one.

    x @ A + a,  x @ B + b   =   slices of  x @ [A B] + [a b]

Queries, keys and values of a decoder are the case that matters: one kernel instead of three, which counts where a step
has one row. A missing bias is -0.0, which changes no number.

It pays only where the slices cost nothing: where kernels of element-wise operators, concatenations or transpositions
take them in place, such as that which turns values on their way to a cache in buffers. A result that the function
returns would have to be copied out, and so would one that another product, a convolution or a reduction reads.
Attention would read it in place, too, but its rows would lie as far apart as those of the combined product, on pages of
their own: with 128 rows that took 2 % longer than separate products, with 1500 rows 10 to 25 %. Where a product's only
reader is element-wise (an activation, a residual sum) it is computed in the product's kernel already, which the slice
would undo; all but the rounding of a sum to 16 bits, which is the combined product's as well. Products that lie apart,
with products over other inputs between them, stay apart: such as the keys and values of all the layers that attend to
one encoder's output, whose results would have to live until the last layer has read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Pass, PassOutcome, Refusal, Site, require
from passes.constant_products import ConstantProduct, ConstantProducts
from passes.rotary_embedding import NAME as ROTARY_EMBEDDING
from passes.tensor_types import constant, constant_of, dtype_of, is_float

_VIEWS = frozenset(
    {"relax.permute_dims", "relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.strided_slice", "relax.split"}
)
_ELEMENTWISE = frozenset(
    {
        *(f"relax.{name}" for name in ("abs", "add", "astype", "clip", "divide", "erf", "exp", "maximum", "minimum")),
        *(f"relax.{name}" for name in ("multiply", "negative", "power", "sigmoid", "subtract", "tanh", "where")),
        *(f"relax.nn.{name}" for name in ("gelu", "gelu_tanh", "leakyrelu", "relu", "silu")),
    }
)
# Moves of elements, among channels and turned too, that become part of the kernel of what they move to.
_MOVES = frozenset({"relax.concat", "relax.take", ROTARY_EMBEDDING})
_TURN = "relax.permute_dims"
_APPEND = "relax.call_tir_inplace"


@dataclass(frozen=True)
class CombineProducts(Pass):
    """Make one product of parallel products with constant matrices over one input, where its slices cost no kernel."""

    name: ClassVar[str] = "combine-products"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        sites: list[Site] = []
        rewritten = tvm.IRModule(dict(module.functions), attrs=module.attrs)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                finder = _Finder(function)
                groups = list(finder.groups())
                sites.extend(finder.sites)
                rewritten.update_func(variable, _Rewriter(module, groups).visit_expr(function))
        return PassOutcome(relax.transform.DeadCodeElimination()(rewritten), tuple(sites))


class _Finder:
    """Looks for groups of products in one function, and keeps the account of the sites."""

    def __init__(self, function: relax.Function) -> None:
        self._products = ConstantProducts(function)
        self._bindings = self._products.bindings
        self._dataflow = self._products.dataflow
        self._dependencies = self._products.dependencies
        self.sites: list[Site] = []

    def groups(self) -> Iterator[list[ConstantProduct]]:
        """Yield products over one input that are to become one, and record every product that has a parallel one."""
        for _, run in itertools.groupby(self._products, key=_kind):
            parallel = list(run)
            if len(parallel) < 2:
                continue
            refusals = {product: self._refusal(product) for product in parallel}
            group = [product for product in parallel if refusals[product] is None]
            alone = len(group) == 1
            for product in parallel:
                refusal = "no parallel product can be combined with it" if alone else None
                nodes = self._dataflow.nodes(product.product, product.result)
                self.sites.append(Site(product.product.name, refusals[product] or refusal, nodes))
            if not alone and group:
                yield group

    def _refusal(self, product: ConstantProduct) -> str | None:
        try:
            shared = self._products.is_shared(product.call.args[1])
            require(not shared, "others read its weights too: combined, they would be stored twice")
            self._check_readers(product.result)
        except Refusal as refusal:
            return str(refusal)
        return None

    def _check_readers(self, result: relax.Var) -> None:
        """Refuse where a slice in the place of `result` would be a kernel of its own."""
        readers = self._dependencies.readers(result)
        if len(readers) == 1:
            fused = self._operator(readers[0])
            scaled = self._is_scaling(readers[0])
            require(fused not in _ELEMENTWISE or scaled, f"{fused} is computed in its kernel, which a slice would undo")
        pending = [(result, False)]
        while pending:
            variable, is_turned = pending.pop()
            require(not self._dependencies.is_result(variable), "its result is returned: the slice would be copied")
            for reader in self._dependencies.readers(variable):
                operator = self._operator(reader)
                if operator is None or operator in _VIEWS or self._is_scaling(reader):
                    pending.append((reader, is_turned or operator == _TURN))
                    continue
                require(not self._is_product_of_two(reader), "attention would read rows that lie apart")
                takes = operator in _ELEMENTWISE | _MOVES or (is_turned and operator == _APPEND)
                require(takes, f"{operator} does not take a slice in place")

    def _operator(self, variable: relax.Var) -> str | None:
        """Return the name of the operator that a variable is bound to, None for a renaming or a field of a tuple."""
        value = self._bindings.values[variable]
        if not isinstance(value, tvm.ir.Call):
            return None
        return value.op.name if isinstance(value.op, tvm.ir.Op) else str(value.op)

    def _is_scaling(self, variable: relax.Var) -> bool:
        """Return whether a variable is another one times a constant number, which fused attention takes up."""
        call = self._dataflow.call(self._bindings.values[variable], "relax.multiply", "relax.divide")
        factors = [] if call is None else [constant_of(operand) for operand in call.args]
        return any(factor is not None and factor.size == 1 for factor in factors)

    def _is_product_of_two(self, variable: relax.Var) -> bool:
        """Return whether a variable is a product of two tensors that are not constant, as in attention."""
        call = self._dataflow.call(self._bindings.values[variable], "relax.matmul")
        return call is not None and all(constant_of(operand) is None for operand in call.args)


def _kind(product: ConstantProduct) -> tuple[object, ...]:
    """Return what parallel products have in common."""
    out_dtype = product.call.attrs.out_dtype if product.call.attrs is not None else None
    rounded = None if product.rounded is None else dtype_of(product.rounded)
    return product.call.args[0], product.weight.dtype.name, str(out_dtype), rounded, dtype_of(product.result)


@mutator
class _Rewriter(PyExprMutator):
    """Computes each group where its first product stood, and binds a slice in the place of each result."""

    def __init__(self, module: tvm.IRModule, groups: Sequence[Sequence[ConstantProduct]]) -> None:
        super().__init__(module)
        self._first = {group[0].product: group for group in groups}
        self._slices: dict[relax.Var, relax.Expr] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        group = self._first.get(binding.var)
        if group is not None:
            combined = self._combined(group)
            starts = itertools.accumulate((product.columns for product in group), initial=0)
            for product, start in zip(group, starts, strict=False):
                end = start + product.columns
                self._slices[product.result] = relax.op.strided_slice(combined, [combined.ty.ndim - 1], [start], [end])
        if binding.var in self._slices:
            value = self.builder_.normalize(self._slices[binding.var])
            binding = relax.VarBinding(binding.var, value)
        super().visit_var_binding_(binding)

    def _combined(self, group: Sequence[ConstantProduct]) -> relax.Var:
        call = group[0].call
        weights = constant(np.concatenate([product.weight for product in group], axis=1))
        result = self.builder_.emit(tvm.ir.Call(call.op, [self.visit_expr(call.args[0]), weights], call.attrs))
        if group[0].rounded is not None:
            result = self.builder_.emit(relax.op.astype(result, dtype_of(group[0].rounded)))
        if all(product.bias is None for product in group):
            return result
        dtype = next(product.bias.dtype for product in group if product.bias is not None)
        nothing = np.array(-0.0 if is_float(dtype_of(result)) else 0, dtype)
        biases = [np.broadcast_to(nothing if p.bias is None else p.bias, (p.columns,)) for p in group]
        return self.builder_.emit(relax.op.add(result, constant(np.concatenate(biases))))
