"""Constant floating-point weights of products and tables, rounded to small integers.

x @ W  ->  x @ dequantized(W) with W ~ (code - zero point) * scale (`passes/quantization`), computed from packed codes.
A table whose rows are gathered is rounded the same way where its rows are as long as the input of one of the products:
those are embeddings, which the products read, while tables of angles or positions of other lengths stay exact. Equal
matrices give equal packed weights, so that a table tied to a product's weights is stored once.

Codes that were fitted to the products' inputs (`optimizer/quantization`) come from outside, by the matrix's digest.
AWQ's scale columns: x @ W = (x / s) @ (s W) for factors s of the inputs, which become part of the normalization that
x comes from where its scale is constant, and a product with a constant elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import NO_OPTION, Dataflow, Pass, PassOutcome, Refusal, Site
from passes.provenance import union
from passes.quantization.fitted import FITTED_METHODS, Exceptions, Fitted, FittedMatrix
from passes.quantization.methods import METHODS, quantize
from passes.quantization.scheme import Scheme, SchemeError
from passes.quantized_weights import WeightUse, constant_array, product_with, rows_of
from passes.weight_sites import SMALLEST_MATRIX, WeightSite, weight_site, weight_sites

# How matrices are rounded that no input of was seen.
_UNSEEN_METHOD = "minimum-error"


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize the weights of products with constant matrices, and of embeddings, to `bits` bits.

    `group`: elements of a row that share a scale (16, 32, 64, 128; 0: all). `method`: rtn (round to nearest),
    minimum-error, hqq (not symmetric), or awq and gptq, which fit weights to inputs that the compiler observes.
    `activations`: int8, float, or what the target does best. `exceptions`: PATTERN=int8;... for matrices of nodes.
    """

    name: ClassVar[str] = "quantize-weights"
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    method: str = "rtn"
    scales: str = "float16"
    target: str = "host"
    activations: str = "auto"
    exceptions: str = ""
    calibration: str = ""
    quality: str = ""
    fitted: Fitted | None = field(default=None, compare=False, repr=False, metadata=NO_OPTION)

    def __post_init__(self) -> None:
        _ = self.scheme, self.use, self.precisions

    def __str__(self) -> str:
        method = f"{self.method} on {self.calibration}" if self.calibration else self.method
        named = self.precisions.of_names  # `quality` counts matrices that are known by their digests
        others = f", but {named}" if named.rules else ""
        quality = f"; {self.quality}" if self.quality else ""
        return f"{self.scheme}, by {method}{others}, {self.use}{quality}"

    @property
    def scheme(self) -> Scheme:
        """The scheme of the weights; raises SchemeError for options that make none."""
        if self.method not in (*METHODS, *FITTED_METHODS):
            choices = ", ".join((*METHODS, *FITTED_METHODS))
            raise SchemeError(f"unknown method '{self.method}'; choose one of {choices}")
        return Scheme(self.bits, self.group, self.symmetric, self.scales)

    @property
    def use(self) -> WeightUse:
        """What products compute with, on which target; raises SchemeError for what the target lacks."""
        return WeightUse.of(self.target, self.activations, self.bits)

    @property
    def precisions(self) -> Exceptions:
        """Which matrices have other bits; raises SchemeError for a malformed notation."""
        return Exceptions.parse(self.exceptions)

    def bits_by_digest(self, sites: list[WeightSite]) -> dict[str, int]:
        """Return the bits of each matrix, which all sites that read it agree on; 0 leaves it as it is."""
        nodes: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for site in sites:
            nodes[site.digest].append(site.nodes)
        return {
            digest: self.precisions.bits_of((digest, *union(readers)), self.bits) for digest, readers in nodes.items()
        }

    def rounded(self, matrix: NDArray[np.generic], bits: int) -> FittedMatrix:
        """Return a matrix quantized without knowledge of its inputs; raises SchemeError where scales overflow."""
        method = _UNSEEN_METHOD if self.method in FITTED_METHODS else self.method
        return FittedMatrix(quantize(matrix, Scheme(bits, self.group, self.symmetric, self.scales), method))

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Quantize all Relax functions of the module.

        Raises SchemeError for a method that fits weights to inputs where none were observed.
        """
        if self.method in FITTED_METHODS and self.fitted is None:
            raise SchemeError(f"{self.method} fits weights to inputs, which only a compile observes; choose another")
        sites: list[Site] = []
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter = _Quantizer(module, function, self)
                rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
                module = rewriter.builder_.get()
                sites.extend(rewriter.sites)
        merged = relax.transform.EliminateCommonSubexpr()(module)
        return PassOutcome(relax.transform.DeadCodeElimination()(merged), tuple(sites))


@mutator
class _Quantizer(PyExprMutator):
    def __init__(self, module: tvm.IRModule, function: relax.Function, item: QuantizeWeights) -> None:
        super().__init__(module)
        self._dataflow = Dataflow(function)
        self._item = item
        found = weight_sites(function, self._dataflow)
        self._inputs = frozenset(site.matrix.shape[1] for site in found if not site.gathered)
        self._bits = item.bits_by_digest(found)
        self._done: dict[str, FittedMatrix] = {}
        self.sites: list[Site] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Rewrite a product or gathering whose matrix is constant."""
        site = weight_site(binding, self._dataflow)
        if site is not None:
            try:
                quantized = self._quantized(site)
            except Refusal as refusal:
                self.sites.append(Site(binding.var.name, str(refusal), site.nodes))
            else:
                self.sites.append(Site(binding.var.name, None, site.nodes))
                value = self.builder_.normalize(self._computed(site, quantized))
                binding = relax.VarBinding(binding.var, value)
        super().visit_var_binding_(binding)

    def _computed(self, site: WeightSite, quantized: FittedMatrix) -> relax.Expr:
        dtype = str(site.variable.ty.dtype.dtype)
        if site.gathered:
            return rows_of(self.builder_, self.visit_expr(site.operand), quantized.matrix, self._item.use, dtype)
        operand = self._scaled(site.operand, quantized.input_scales)
        return product_with(self.builder_, operand, quantized.matrix, self._item.use, dtype)

    def _scaled(self, operand: relax.Expr, scales: NDArray[np.float32] | None) -> relax.Expr:
        """Return an operand times a factor for each of its last axis, by the normalization that it comes from."""
        if scales is None:
            return self.visit_expr(operand)
        dtype = str(operand.ty.dtype.dtype)
        call = self._dataflow.call(operand, "relax.nn.rms_norm")
        weight = constant_array(self._dataflow.producer(call.args[1])) if call is not None else None
        if call is None or weight is None or weight.shape != scales.shape:
            factors = relax.const(scales, dtype)
            return self.builder_.emit(relax.op.multiply(self.visit_expr(operand), factors))
        combined = relax.const((weight.astype(np.float32) * scales).astype(weight.dtype), str(weight.dtype))
        arguments = [self.visit_expr(call.args[0]), combined, *map(self.visit_expr, call.args[2:])]
        return self.builder_.emit(tvm.ir.Call(call.op, arguments, call.attrs))

    def _quantized(self, site: WeightSite) -> FittedMatrix:
        weights, bits = site.matrix, self._bits.get(site.digest, self._item.bits)
        if weights.size < SMALLEST_MATRIX:
            raise Refusal(f"a matrix of {weights.size} elements is smaller than {SMALLEST_MATRIX}")
        if site.gathered and weights.shape[1] not in self._inputs:
            raise Refusal(f"rows of {weights.shape[1]} elements are the input of no product: not an embedding")
        if bits == 0:
            raise Refusal("left in the model's precision, as asked for")
        if site.digest not in self._done:
            self._done[site.digest] = self._chosen(site, bits)
        return self._done[site.digest]

    def _chosen(self, site: WeightSite, bits: int) -> FittedMatrix:
        fitted = (self._item.fitted or {}).get(site.digest)
        if fitted is not None and fitted.matrix.bits == bits:
            return fitted
        try:
            return self._item.rounded(site.matrix, bits)
        except SchemeError as error:
            raise Refusal(str(error)) from error
