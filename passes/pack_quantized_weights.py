"""Products with weights that come quantized, and rows of them, computed from integers instead of dequantized floats.

x @ ((q - z) * s), and rows gathered of (q - z) * s, with constant integers q, and scales s and zero points z that are
the same for runs of K, have to be found before constants are folded, which would leave floats. The integers are taken
bit for bit, the scales to the last bit, and laid out as the target's kernel reads them. A table of embeddings that is
the output matrix, too, becomes the same packed constants, which are stored once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.affine_weights import AffineValue, affine_value, as_matrix
from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site
from passes.quantized_weights import WeightUse, product_with, rows_of

_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class PackQuantizedWeights(Pass):
    """Compute products with quantized weights of 4 or 8 bits, and rows of them, from packed integers.

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
        """Rewrite a product whose second operand is a dequantized matrix, and a gathering of rows of one."""
        call = binding.value
        product = self._weights(call)
        table = self._table(call) if product is None else None
        weights = product if product is not None else table
        if weights is not None:
            nodes = self._dataflow.nodes(call)
            try:
                matrix = as_matrix(weights)
            except Refusal as refusal:
                self.sites.append(Site(binding.var.name, str(refusal), nodes))
            else:
                self.sites.append(Site(binding.var.name, None, nodes))
                emit, operand = (product_with, 0) if table is None else (rows_of, 1)
                dtype = str(call.ty.dtype.dtype)
                value = emit(self.builder_, self.visit_expr(call.args[operand]), matrix, self._use, dtype)
                binding = relax.VarBinding(binding.var, self.builder_.normalize(value))
        super().visit_var_binding_(binding)

    def _weights(self, expr: relax.Expr) -> AffineValue | None:
        """Return the dequantized matrix [K, N] that a product of floats multiplies rows with."""
        call = self._dataflow.call(expr, "relax.matmul") if isinstance(expr, tvm.ir.Call) else None
        if call is None or str(call.args[0].ty.dtype.dtype) not in _FLOATS or call.args[0].ty.ndim < 2:
            return None
        return self._dequantized(call.args[1])

    def _table(self, expr: relax.Expr) -> AffineValue | None:
        """Return the dequantized table whose rows a gathering takes, turned to [K, N]."""
        call = self._dataflow.call(expr, "relax.take") if isinstance(expr, tvm.ir.Call) else None
        if call is None or call.attrs.axis is None or int(call.attrs.axis) != 0:
            return None
        table = self._dequantized(call.args[0]) if call.attrs.mode in ("fast", "clip") else None
        return None if table is None else table.moved(np.transpose)

    def _dequantized(self, expr: relax.Expr) -> AffineValue | None:
        if expr.ty.ndim != 2 or str(expr.ty.dtype.dtype) not in _FLOATS:
            return None
        value = affine_value(expr, self._dataflow)
        return value if value is not None and value.integers.ndim == 2 else None
