"""Products with weights that come quantized, computed from their integers instead of from dequantized floats.

x @ ((q - z) * s)  with constant integers q, and scales s and zero points z that are the same for runs of K, has to run
before constants are folded, which would leave floats. The integers are taken bit for bit, the scales to the last bit,
and laid out as the target's kernel reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.affine_weights import AffineValue, affine_value, as_matrix
from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site
from passes.quantized_weights import WeightUse, product_with

_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class PackQuantizedWeights(Pass):
    """Compute products with quantized weights of 4 or 8 bits from packed integers.

    `activations`: int8, float, or what the target does best.
    """

    name: ClassVar[str] = "pack-quantized-weights"
    target: str = "host"
    activations: str = "auto"

    def __post_init__(self) -> None:
        _ = self.use

    def __str__(self) -> str:
        return f"the integers that the model came with, {self.use}"

    @property
    def use(self) -> WeightUse:
        """What products compute with, on which target; raises SchemeError for what the target lacks."""
        return WeightUse.of(self.target, self.activations, 4)

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite the products of all Relax functions of the module."""
        sites: list[Site] = []
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter = _Packer(module, function, self.use)
                rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
                if any(site.refusal is None for site in rewriter.sites):
                    module = rewriter.builder_.get()
                sites.extend(rewriter.sites)
        if not any(site.refusal is None for site in sites):
            return PassOutcome(module, tuple(sites))
        merged = relax.transform.EliminateCommonSubexpr()(module)
        return PassOutcome(relax.transform.DeadCodeElimination()(merged), tuple(sites))


@mutator
class _Packer(PyExprMutator):
    def __init__(self, module: tvm.IRModule, function: relax.Function, use: WeightUse) -> None:
        super().__init__(module)
        self._dataflow = Dataflow(function)
        self._use = use
        self.sites: list[Site] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Rewrite a product whose second operand is a dequantized matrix."""
        weights = self._weights(binding.value)
        if weights is not None:
            nodes = self._dataflow.nodes(binding.value)
            try:
                matrix = as_matrix(weights)
            except Refusal as refusal:
                self.sites.append(Site(binding.var.name, str(refusal), nodes))
            else:
                self.sites.append(Site(binding.var.name, None, nodes))
                x, dtype = self.visit_expr(binding.value.args[0]), str(binding.value.ty.dtype.dtype)
                value = product_with(self.builder_, x, matrix, self._use, dtype)
                binding = relax.VarBinding(binding.var, self.builder_.normalize(value))
        super().visit_var_binding_(binding)

    def _weights(self, expr: relax.Expr) -> AffineValue | None:
        call = self._dataflow.call(expr, "relax.matmul") if isinstance(expr, tvm.ir.Call) else None
        if call is None or str(call.args[0].ty.dtype.dtype) not in _FLOATS or call.args[0].ty.ndim < 2:
            return None
        value = affine_value(call.args[1], self._dataflow) if call.args[1].ty.ndim == 2 else None
        dequantized = value is not None and value.integers.ndim == 2 and str(call.args[1].ty.dtype.dtype) in _FLOATS
        return value if dequantized else None
