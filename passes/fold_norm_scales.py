"""The scale and shift of a normalization folded into the weights and biases of the products that read it.

    norm(x, scale=g, shift=b) @ W + c  =  norm(x, scale=1, shift=0) @ (diag(g) W)  +  (c + b @ W)

for a normalization over the last axis. Each weight is rounded once more, by half a unit in the last place of its
dtype, where each normalized element is rounded once or twice less. It pays with the kernel that normalizes as it reads
for a product, which has one operand less; no constant gets larger.

Weights that are to be rounded to small integers are rounded first: multiplied with scales that differ along K, they
would share their groups' steps less well. So the pass comes after `quantize-weights`, and refuses what that rewrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Pass, PassOutcome, Refusal, Site, require
from passes.constant_products import ConstantProduct, ConstantProducts
from passes.simplify_shapes import VIEWS
from passes.tensor_types import constant, constant_of, dtype_of, equal, shape_of

_NORMALIZATIONS = ("relax.nn.layer_norm", "relax.nn.rms_norm")
_OUT_OF_RANGE = "scaled, a product's weights or bias would leave the range of {}"
_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class FoldNormScales(Pass):
    """Fold the scale and shift of layer_norm and rms_norm into the constant weights of all products that read it."""

    name: ClassVar[str] = "fold-norm-scales"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        sites: list[Site] = []
        rewritten = tvm.IRModule(dict(module.functions), attrs=module.attrs)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                finder = _Finder(function)
                values = finder.values()
                sites.extend(finder.sites)
                rewritten.update_func(variable, _Rewriter(module, values).visit_expr(function))
        return PassOutcome(relax.transform.DeadCodeElimination()(rewritten), tuple(sites))


class _Finder:
    """Finds normalizations to rewrite in one function, and keeps the account of the sites."""

    def __init__(self, function: relax.Function) -> None:
        self._products = ConstantProducts(function)
        self.sites: list[Site] = []

    def values(self) -> dict[relax.Var, relax.Expr]:
        """Return what variables are to be bound to, over the variables that there are."""
        replaced: dict[relax.Var, relax.Expr] = {}
        for variable, value in self._products.bindings.values.items():
            call = self._products.dataflow.call(value, *_NORMALIZATIONS) if isinstance(value, tvm.ir.Call) else None
            if call is None or _is_plain(call):
                continue
            products: list[ConstantProduct] = []
            try:
                replaced |= self._folded(variable, call, products)
            except Refusal as refusal:
                reason = str(refusal)
            else:
                reason = None
            parts = [variable, *(part for product in products for part in (product.product, product.result))]
            self.sites.append(Site(variable.name, reason, self._products.dataflow.nodes(*parts)))
        return replaced

    def _folded(
        self, variable: relax.Var, call: tvm.ir.Call, products: list[ConstantProduct]
    ) -> dict[relax.Var, relax.Expr]:
        """Return the new values of a normalization, its products and their biases; `products` gains those found."""
        require(_axes(call) == (call.ty.ndim - 1,), "it is not over the last axis alone")
        scale, shift = (_number_per_column(part) for part in (*call.args[1:], None)[:2])
        if scale is None or shift is None:
            raise Refusal("its scale or shift is not constant")
        products += self._readers(variable)
        require(bool(products), "nothing reads it")
        replaced: dict[relax.Var, relax.Expr] = {}
        for product in products:
            self._check(product, call, shifted=bool(shift.any()))
            operands = [product.call.args[0], constant(_scaled(product.weight, scale))]
            replaced[product.product] = tvm.ir.Call(product.call.op, operands, product.call.attrs)
            if product.bias is not None and shift.any():
                bias = product.bias.astype(np.float64) + shift @ product.weight.astype(np.float64)
                replaced[product.result] = relax.op.add(product.product, constant(_in_range(bias, product.bias.dtype)))
        plain = [
            constant(np.full_like(_known(part), filled)) for part, filled in zip(call.args[1:], (1, 0), strict=False)
        ]
        return {variable: tvm.ir.Call(call.op, [call.args[0], *plain], call.attrs), **replaced}

    def _readers(self, variable: relax.Var) -> Sequence[ConstantProduct]:
        """Return the products that read a normalized value, behind views and slices that keep its last axis."""
        dependencies, bindings = self._products.dependencies, self._products.bindings
        found: list[ConstantProduct] = []
        pending = [variable]
        while pending:
            read = pending.pop(0)
            require(not dependencies.is_result(read), "the function returns the normalized value")
            for reader in dependencies.readers(read):
                value = bindings.values[reader]
                product = self._products.at(reader)
                if product is not None:
                    found.append(product)
                elif isinstance(value, relax.Var) or self._keeps_columns(value):
                    pending.append(reader)
                else:
                    raise Refusal(_other_reader(value))
        return found

    def _keeps_columns(self, value: relax.Expr) -> bool:
        dataflow = self._products.dataflow
        call = dataflow.call(value, *VIEWS, "relax.strided_slice") if isinstance(value, tvm.ir.Call) else None
        before, after = (None, None) if call is None else (shape_of(call.args[0]), shape_of(call))
        if call is None or not before or not after:
            return False
        if call.op.name == "relax.strided_slice":
            return len(before) - 1 not in [int(axis.value) for axis in call.args[1].fields]
        return equal(before[-1], after[-1])

    def _check(self, product: ConstantProduct, call: tvm.ir.Call, *, shifted: bool) -> None:
        dtype = dtype_of(call)
        require(dtype in _DTYPES, f"weights of {dtype} would lose digits to one more rounding")
        require(
            not self._products.is_shared(product.call.args[1]),
            "others read a product's weights too: scaled, they would be stored twice",
        )
        if shifted:
            bias = product.addend if product.rounded is None else None
            require(bias is not None, "a product has no bias that could take up the shift")
            assert bias is not None
            one_each = constant_of(bias)
            require(
                one_each is not None and one_each.size == product.columns and not self._products.is_shared(bias),
                "a product's bias would become larger, or be stored twice",
            )


def _is_plain(call: tvm.ir.Call) -> bool:
    """Return whether the scale is 1 and the shift 0."""
    arrays = [constant_of(part) for part in call.args[1:]]
    return all(array is not None and (array == neutral).all() for array, neutral in zip(arrays, (1, 0), strict=False))


def _axes(call: tvm.ir.Call) -> tuple[int, ...]:
    return tuple(int(axis) % call.ty.ndim for axis in call.attrs.axes)


def _number_per_column(part: relax.Expr | None) -> np.ndarray | None:
    """Return a constant scale or shift in fp64, 0 for a shift that the operator does not have."""
    if part is None:
        return np.zeros(1)
    array = constant_of(part)
    return None if array is None else array.astype(np.float64)


def _known(part: relax.Expr) -> np.ndarray:
    array = constant_of(part)
    assert array is not None
    return array


def _scaled(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return each row of a matrix times its scale, rounded once; raises Refusal where that would be more."""
    factors = scale.astype(weight.dtype)[:, None]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = weight * factors
    exact = (weight == 0) | (factors == 0)
    limits = np.finfo(weight.dtype)
    inside = exact | ((np.abs(scaled) >= limits.tiny) & (np.abs(scaled) <= limits.max))
    require(bool(inside.all()), _OUT_OF_RANGE.format(weight.dtype.name))
    return scaled


def _in_range(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return values rounded to `dtype`; raises Refusal where that would be more than a rounding."""
    limits = np.finfo(dtype)
    with np.errstate(invalid="ignore"):
        inside = (values == 0) | ((np.abs(values) >= limits.tiny) & (np.abs(values) <= limits.max))
    require(bool(inside.all()), _OUT_OF_RANGE.format(dtype.name))
    return values.astype(dtype)


def _other_reader(value: relax.Expr) -> str:
    if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.Op):
        return "something that is no product with constant weights reads the normalized value"
    if value.op.name == "relax.call_tir":
        return "the weights of a product are quantized, and take up no scale"
    return f"{value.op.name} reads the normalized value too, which is no product with constant weights"


@mutator
class _Rewriter(PyExprMutator):
    """Binds variables to other values."""

    def __init__(self, module: tvm.IRModule, values: Mapping[relax.Var, relax.Expr]) -> None:
        super().__init__(module)
        self._values = values

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self._values:
            binding = relax.VarBinding(binding.var, self.builder_.normalize(self._values[binding.var]))
        super().visit_var_binding_(binding)
