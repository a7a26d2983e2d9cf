"""Constant floating-point weights of products and tables, rounded to small integers.

x @ W  ->  x @ dequantized(W) with W ~ (code - zero point) * scale (`passes/quantization`), computed from packed codes.
A table whose rows are gathered is rounded the same way where its rows are as long as the input of one of the products:
those are embeddings, which the products read, while tables of angles or positions of other lengths stay exact. Equal
matrices give equal packed weights, so that a table tied to a product's weights is stored once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site
from passes.quantization.methods import METHODS, quantize
from passes.quantization.scheme import QuantizedMatrix, Scheme, SchemeError
from passes.quantized_weights import WeightUse, constant_array, product_with, rows_of

# Smaller matrices cost more in launches than they save in bytes.
SMALLEST_MATRIX = 1024
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize the weights of products with constant matrices, and of embeddings, to `bits` bits.

    `group`: elements of a row that share a scale (16, 32, 64, 128; 0: all). `method`: rtn (round to nearest),
    minimum-error, or hqq (not symmetric). `activations`: int8, float, or what the target does best.
    """

    name: ClassVar[str] = "quantize-weights"
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    method: str = "rtn"
    scales: str = "float16"
    target: str = "host"
    activations: str = "auto"

    def __post_init__(self) -> None:
        _ = self.scheme, self.use

    def __str__(self) -> str:
        return f"{self.scheme}, by {self.method}, {self.use}"

    @property
    def scheme(self) -> Scheme:
        """The scheme of the weights; raises SchemeError for options that make none."""
        if self.method not in METHODS:
            raise SchemeError(f"unknown method '{self.method}'; choose one of {', '.join(METHODS)}")
        return Scheme(self.bits, self.group, self.symmetric, self.scales)

    @property
    def use(self) -> WeightUse:
        """What products compute with, on which target; raises SchemeError for what the target lacks."""
        return WeightUse.of(self.target, self.activations, self.bits)

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Quantize all Relax functions of the module."""
        sites: list[Site] = []
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter = _Quantizer(module, function, self.scheme, self.method, self.use)
                rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
                module = rewriter.builder_.get()
                sites.extend(rewriter.sites)
        merged = relax.transform.EliminateCommonSubexpr()(module)
        return PassOutcome(relax.transform.DeadCodeElimination()(merged), tuple(sites))


@mutator
class _Quantizer(PyExprMutator):
    def __init__(
        self, module: tvm.IRModule, function: relax.Function, scheme: Scheme, method: str, use: WeightUse
    ) -> None:
        super().__init__(module)
        self._dataflow = Dataflow(function)
        self._scheme = scheme
        self._method = method
        self._use = use
        self._inputs = _product_inputs(function, self._dataflow)
        self.sites: list[Site] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Rewrite a product or gathering whose matrix is constant."""
        product = product_matrix(binding.value, self._dataflow)
        table = table_matrix(binding.value, self._dataflow) if product is None else None
        weights = product if product is not None else table
        if weights is not None:
            nodes = self._dataflow.nodes(binding.value)
            try:
                matrix = self._quantized(weights, gathered=table is not None)
            except Refusal as refusal:
                self.sites.append(Site(binding.var.name, str(refusal), nodes))
            else:
                self.sites.append(Site(binding.var.name, None, nodes))
                emit, operand = (product_with, 0) if table is None else (rows_of, 1)
                call = binding.value
                dtype = str(call.ty.dtype.dtype)
                value = emit(self.builder_, self.visit_expr(call.args[operand]), matrix, self._use, dtype)
                binding = relax.VarBinding(binding.var, self.builder_.normalize(value))
        super().visit_var_binding_(binding)

    def _quantized(self, weights: NDArray[np.generic], *, gathered: bool) -> QuantizedMatrix:
        if weights.size < SMALLEST_MATRIX:
            raise Refusal(f"a matrix of {weights.size} elements is smaller than {SMALLEST_MATRIX}")
        if gathered and weights.shape[1] not in self._inputs:
            raise Refusal(f"rows of {weights.shape[1]} elements are the input of no product: not an embedding")
        try:
            return quantize(weights, self._scheme, self._method)
        except SchemeError as error:
            raise Refusal(str(error)) from error


def _product_inputs(function: relax.Function, dataflow: Dataflow) -> frozenset[int]:
    """Return the lengths of the rows that products with constant matrices read."""
    lengths: set[int] = set()

    def visit(expr: relax.Expr) -> None:
        matrix = product_matrix(expr, dataflow) if isinstance(expr, tvm.ir.Call) else None
        if matrix is not None:
            lengths.add(matrix.shape[1])

    relax.analysis.post_order_visit(function, visit)
    return frozenset(lengths)


def product_matrix(expr: relax.Expr, dataflow: Dataflow) -> NDArray[np.generic] | None:
    """Return the constant matrix [N, K] that a product of floats multiplies rows [..., K] with."""
    call = dataflow.call(expr, "relax.matmul") if isinstance(expr, tvm.ir.Call) else None
    if call is None or str(call.args[0].ty.dtype.dtype) not in _FLOATS or call.args[0].ty.ndim < 2:
        return None
    array = constant_array(dataflow.producer(call.args[1]))
    if array is not None:
        return array.T if array.ndim == 2 and array.dtype.name in _FLOATS else None
    turned = dataflow.call(call.args[1], "relax.permute_dims")
    array = constant_array(dataflow.producer(turned.args[0])) if turned is not None else None
    return array if array is not None and array.ndim == 2 and array.dtype.name in _FLOATS else None


def table_matrix(expr: relax.Expr, dataflow: Dataflow) -> NDArray[np.generic] | None:
    """Return the constant table [N, K] whose rows a gathering takes."""
    call = dataflow.call(expr, "relax.take") if isinstance(expr, tvm.ir.Call) else None
    if call is None or call.attrs.axis is None or int(call.attrs.axis) != 0 or call.attrs.mode not in ("fast", "clip"):
        return None
    array = constant_array(dataflow.producer(call.args[0]))
    return array if array is not None and array.ndim == 2 and array.dtype.name in _FLOATS else None
