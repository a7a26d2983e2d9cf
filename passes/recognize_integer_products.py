"""Products of 8-bit activations with constant 8-bit weights or with each other, as exact integer products.

    DQ(x, sx, zx) @ DQ(w, sw, zw) = float(x @ w' - zx * sum(w')) * (sx * sw)        with w' = w - zw
    (x - zx) @ (w - zw)           =       x @ w' - zx * sum(w')
    conv(DQ(x), DQ(w))            = float(conv(pad(x, zx), w') - zx * sum(w')) * (sx * sw)

x has the type that the target's instructions multiply with int8: an unsigned number x + 128 stands for a signed x, with
a zero point that is larger by as much, or the other way around. Columns of w' that do not fit into int8 are w'' + o:
x @ w' - zx * sum(w') is then (x @ w'' - zx * sum(w'')) + o * (sum(x) - K * zx), with a sum over each row of x.

What is quantized from a dequantized number by the same scale is that number's code, also behind moves of elements. In
a function with such products quantization multiplies by the reciprocal of a constant scale, which may take a number
that lies on the border of two codes to the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

import targets
from passes.activation_products import (
    ActivationProduct,
    activation_product,
    correction,
    packed_fours,
    product_of_fours,
)
from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site, require
from passes.integer_operands import (
    BYTES,
    Codes,
    ConstantWeights,
    centered,
    centered_weights,
    dequantized,
    dequantized_weights,
    in_range,
    offsets_to_int8,
)
from passes.tensor_types import constant, constant_of, dtype_of
from schedules.intrin.byte_dot import activation_types
from targets.base import Target

_CONVOLUTIONS: Mapping[str, Callable[..., relax.Expr]] = {
    "relax.nn.conv1d": relax.op.nn.conv1d,
    "relax.nn.conv2d": relax.op.nn.conv2d,
    "relax.nn.conv3d": relax.op.nn.conv3d,
}
_ATTRIBUTES = ("strides", "padding", "dilation", "groups", "data_layout", "kernel_layout")
_PLAIN_LAYOUTS = ("NCW", "NCHW", "NCDHW")
_SIGN = 128  # what a signed byte is less than the unsigned one that differs in its highest bit


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """A product or convolution of `codes` with constant `weights` less their `offsets` (one per column, or none)."""

    call: tvm.ir.Call
    codes: Codes
    weights: NDArray[np.int8]
    offsets: NDArray[np.int32] | None
    scales: NDArray[np.float32] | None

    @property
    def is_convolution(self) -> bool:
        return self.call.op.name in _CONVOLUTIONS

    @property
    def sums(self) -> NDArray[np.int32]:
        """The sum of the weights of each output, in the numbers of int32, which wrap around."""
        axes = tuple(range(1, self.weights.ndim)) if self.is_convolution else (0,)
        return self.weights.sum(axis=axes, dtype=np.int32)

    def along_outputs(self, values: NDArray[np.generic]) -> relax.Expr:
        """Return one value for each output as a constant that broadcasts to the result."""
        if not self.is_convolution or values.size == 1:
            return constant(values if values.size > 1 else values.reshape(()))
        return constant(values.reshape(-1, *[1] * (self.weights.ndim - 2)))


@dataclass(frozen=True)
class RecognizeIntegerProducts(Pass):
    """Compute products of quantized activations and constant quantized weights from their 8-bit integers."""

    name: ClassVar[str] = "recognize-integer-products"
    target: str = "host"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        target, sites = targets.get(self.target), []
        rewritten = tvm.IRModule(dict(module.functions), attrs=module.attrs)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                dataflow = Dataflow(function)
                finder = _Finder(dataflow, activation_types(target))
                finder.visit_expr(function)
                sites.extend(finder.sites)
                if finder.products:
                    rewriter = _Rewriter(rewritten, dataflow, finder.products, target)
                    rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
                    rewritten = rewriter.builder_.get()
                    sites.extend(rewriter.sites)
        return PassOutcome(relax.transform.DeadCodeElimination()(rewritten), tuple(sites))


@visitor
class _Finder(PyExprVisitor):
    """Finds the products of a function."""

    def __init__(self, dataflow: Dataflow, types: tuple[str, ...]) -> None:
        super().__init__()
        self._dataflow = dataflow
        self._types = types
        self.products: dict[relax.Var, IntegerProduct | ActivationProduct] = {}
        self.sites: list[Site] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Note a product, or why one is none that the target multiplies integers for."""
        call = binding.value
        if isinstance(call, tvm.ir.Call) and isinstance(call.op, tvm.ir.Op):
            try:
                found = _product(call, self._dataflow, self._types)
            except Refusal as refusal:
                self.sites.append(Site(binding.var.name, str(refusal), self._dataflow.nodes(call)))
            else:
                if found is not None:
                    self.products[binding.var] = found
                    self.sites.append(Site(binding.var.name, None, self._dataflow.nodes(call)))
        super().visit_var_binding_(binding)


def _product(
    call: tvm.ir.Call, dataflow: Dataflow, types: tuple[str, ...]
) -> IntegerProduct | ActivationProduct | None:
    """Return the integer product that a call is, None for what is no product of quantized activations.

    Raises Refusal where its weights or its form are not such that it can be one.
    """
    if call.op.name not in ("relax.matmul", *_CONVOLUTIONS):
        return None
    codes = (dequantized if dtype_of(call) == "float32" else centered)(call.args[0], dataflow)
    if codes is None or dtype_of(call) not in ("float32", "int32"):
        return None
    is_convolution = call.op.name in _CONVOLUTIONS
    weights = _weights(call, codes, dataflow)
    other = None if is_convolution or weights is not None or not types else activation_product(call, codes, dataflow)
    if other is not None:
        return other
    require(weights is not None, "the weights are no constant integers")
    assert weights is not None
    require(bool(types), "the target has no dot product of bytes")
    if is_convolution:
        require(call.attrs.data_layout in _PLAIN_LAYOUTS, f"the layout {call.attrs.data_layout} is not the plain one")
        require(isinstance(codes.zero, int) or not any(map(int, call.attrs.padding)), "the padding is not constant")
        return IntegerProduct(call, codes, in_range(weights.integers), None, weights.scales)
    require(call.args[0].ty.ndim >= 2 and weights.integers.ndim == 2, "it is no product of rows with a matrix")
    offsets = offsets_to_int8(weights.integers)
    integers = in_range(weights.integers - offsets)
    if not offsets.any() and _is_done(call, codes, types):
        return None
    return IntegerProduct(call, codes, integers, offsets if offsets.any() else None, weights.scales)


def _weights(call: tvm.ir.Call, codes: Codes, dataflow: Dataflow) -> ConstantWeights | None:
    if codes.scale is None:
        return centered_weights(call.args[1], dataflow)
    return dequantized_weights(call.args[1], dataflow, 0 if call.op.name in _CONVOLUTIONS else -1)


def _read(product: IntegerProduct | ActivationProduct) -> Codes:
    return product.codes if isinstance(product, IntegerProduct) else product.left


def _is_done(call: tvm.ir.Call, codes: Codes, types: tuple[str, ...]) -> bool:
    """Return whether a product is of integers in the form that this pass makes."""
    return codes.scale is None and dtype_of(call.args[0]) in types and dtype_of(call.args[1]) == "int8"


@mutator
class _Rewriter(PyExprMutator):
    def __init__(
        self,
        module: tvm.IRModule,
        dataflow: Dataflow,
        products: Mapping[relax.Var, IntegerProduct | ActivationProduct],
        target: Target,
    ) -> None:
        super().__init__(module)
        self._dataflow = dataflow
        self._products = products
        self._types = activation_types(target)
        self._columns = target.layouts.column_block
        # Codes of the type that the target does not multiply, by the variables that hold them, as the other type.
        self._turned: dict[relax.Var, relax.Expr] = {}
        read = (self._source(_read(product).codes) for product in products.values())
        self._to_turn = {source for source in read if source is not None}
        self.sites: list[Site] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Rewrite products, and quantization around them."""
        call, value = binding.value, None
        if binding.var in self._products:
            product = self._products[binding.var]
            of_weights = isinstance(product, IntegerProduct)
            value = self._integer_product(product) if of_weights else self._activation_product(product)
        elif self._dataflow.call(call, "relax.quantize") is not None and isinstance(call, tvm.ir.Call):
            value = self._quantized(binding.var, call)
        elif self._dataflow.call(call, "relax.dequantize") is not None and isinstance(call, tvm.ir.Call):
            value = self._dequantized(call)
        if value is not None:
            binding = relax.VarBinding(binding.var, self.builder_.normalize(value))
        super().visit_var_binding_(binding)

    def _source(self, codes: relax.Expr) -> relax.Var | None:
        """Return the variable of a quantization that makes codes of a type that the target does not multiply."""
        call = self._dataflow.call(codes, "relax.quantize")
        if call is None or dtype_of(call) in self._types or _number(call.args[2]) is None:
            return None
        return codes if isinstance(codes, relax.Var) else None

    def _quantized(self, variable: relax.Var, call: tvm.ir.Call) -> relax.Expr | None:
        """Return the codes of what had the same before, or a quantization by the reciprocal of a constant scale."""
        scale, zero, dtype = _number(call.args[1]), _number(call.args[2]), dtype_of(call)
        if scale is None or zero is None or dtype not in BYTES or dtype_of(call.args[0]) != "float32":
            return None
        before = dequantized(call.args[0], self._dataflow)
        if before is not None and (before.scale, before.zero, before.dtype) == (scale, zero, dtype):
            self.sites.append(Site(variable.name, None, self._dataflow.nodes(call)))
            return self._moved(before, self.visit_expr(before.codes))
        scaled = self._emit(relax.op.multiply(self.visit_expr(call.args[0]), relax.const(1 / scale, "float32")))
        whole = self._emit(relax.op.round(scaled))
        if variable in self._to_turn:
            other = self._other(dtype)
            self._turned[variable] = self._emit(_saturated(self._emit, whole, zero + _shift(dtype), other))
        return _saturated(self._emit, whole, zero, dtype)

    def _dequantized(self, call: tvm.ir.Call) -> relax.Expr | None:
        """Return a dequantization that reads codes of the type that products read."""
        turned, zero = self._turned.get(call.args[0]), _number(call.args[2])
        if turned is None or zero is None:
            return None
        dtype = dtype_of(call.args[0])
        assert dtype is not None
        shifted = relax.const(int(zero) + _shift(dtype), "int32")
        integers = self._emit(relax.op.subtract(self._emit(relax.op.astype(turned, "int32")), shifted))
        return relax.op.multiply(self._emit(relax.op.astype(integers, "float32")), self.visit_expr(call.args[1]))

    def _other(self, dtype: str) -> str:
        return next(other for other in BYTES if other != dtype)

    def _integer_product(self, product: IntegerProduct) -> relax.Expr:
        """Return the product in the form of this pass."""
        codes, zero = self._codes(product.codes)
        if product.is_convolution:
            sums = self._convolution(product, codes, zero)
        else:
            sums = self._emit(relax.op.matmul(codes, constant(product.weights), out_dtype="int32"))
        correction = self._correction(product, codes, zero)
        exact = sums if correction is None else self._emit(relax.op.subtract(sums, correction))
        if product.scales is None or product.codes.scale is None:
            return exact
        scales = (product.scales.astype(np.float64) * product.codes.scale).astype(np.float32)
        factor = product.along_outputs(scales if (scales != scales[0]).any() else scales[:1])
        return relax.op.multiply(self._emit(relax.op.astype(exact, "float32")), factor)

    def _activation_product(self, product: ActivationProduct) -> relax.Expr:
        """Return the product of bytes whose right operand is packed as it comes."""
        codes, zero = self._codes(product.left)
        other, given = self._moved(product.right, self.visit_expr(product.right.codes)), product.right.zero
        other_zero = given if isinstance(given, int) else self.visit_expr(given)
        _, columns = product.shape
        packed = self.builder_.call_te(packed_fours, other, self._columns, primfunc_name_hint="pack_fours")
        sums = self.builder_.call_te(
            product_of_fours, codes, self._emit(packed), columns, primfunc_name_hint="product_of_fours"
        )
        extra = correction(product, (zero, other_zero), (codes, other))
        exact = self._emit(sums) if extra is None else self._emit(relax.op.subtract(self._emit(sums), extra))
        if product.left.scale is None or product.right.scale is None:
            return exact
        factor = relax.const(product.left.scale * product.right.scale, "float32")
        return relax.op.multiply(self._emit(relax.op.astype(exact, "float32")), factor)

    def _codes(self, codes: Codes) -> tuple[relax.Expr, int | relax.Expr]:
        """Return the moved codes in a type that the target multiplies, and their zero point."""
        zero = codes.zero if isinstance(codes.zero, int) else self.visit_expr(codes.zero)
        if codes.dtype in self._types:
            return self._moved(codes, self.visit_expr(codes.codes)), zero
        shift = _shift(codes.dtype)
        turned = self._turned.get(codes.codes)
        if turned is None:
            wide = self._emit(relax.op.astype(self.visit_expr(codes.codes), "int16"))
            shifted = self._emit(relax.op.add(wide, relax.const(shift, "int16")))
            turned = self._emit(relax.op.astype(shifted, self._other(codes.dtype)))
        if isinstance(zero, int):
            return self._moved(codes, turned), zero + shift
        return self._moved(codes, turned), self._emit(relax.op.add(zero, relax.const(shift, "int16")))

    def _moved(self, codes: Codes, expr: relax.Expr) -> relax.Expr:
        for move in codes.moves:
            others = [self.visit_expr(argument) for argument in move.args[1:]]
            expr = self._emit(tvm.ir.Call(move.op, [expr, *others], move.attrs))
        return expr

    def _convolution(self, product: IntegerProduct, codes: relax.Expr, zero: int | relax.Expr) -> relax.Expr:
        """Return the convolution, padded with the zero point so that the correction is the same everywhere."""
        attributes = {name: getattr(product.call.attrs, name) for name in _ATTRIBUTES}
        pads = [int(pad) for pad in attributes["padding"]]
        if any(pads) and zero != 0:
            rank = len(pads) // 2
            widths = [0] * 4 + [pad for axis in range(rank) for pad in (pads[axis], pads[rank + axis])]
            codes = self._emit(relax.op.nn.pad(codes, widths, "constant", zero))
            attributes["padding"] = [0] * len(pads)
        operator = _CONVOLUTIONS[product.call.op.name]
        return self._emit(operator(codes, constant(product.weights), **attributes, out_dtype="int32"))

    def _correction(self, product: IntegerProduct, codes: relax.Expr, zero: int | relax.Expr) -> relax.Expr | None:
        """Return what the product of the codes is more than that of the numbers that they stand for."""
        offsets, depth = product.offsets, product.weights.shape[0]
        per_zero = product.sums + (0 if offsets is None else offsets * np.int32(depth))
        own = None
        if not isinstance(zero, int):
            wide = self._emit(relax.op.astype(zero, "int32"))
            own = self._emit(relax.op.multiply(wide, product.along_outputs(per_zero)))
        elif zero:
            own = product.along_outputs(per_zero * np.int32(zero))
        if offsets is None:
            return own
        wide = self._emit(relax.op.astype(codes, "int32"))
        rows = self._emit(relax.op.sum(wide, axis=[-1], keepdims=True))
        spread = self._emit(relax.op.multiply(rows, constant(-offsets)))
        return spread if own is None else self._emit(relax.op.add(spread, own))

    def _emit(self, expr: relax.Expr) -> relax.Expr:
        return self.builder_.emit(expr)


def _saturated(emit: Callable[[relax.Expr], relax.Expr], whole: relax.Expr, zero: float, dtype: str) -> relax.Expr:
    """Return whole numbers plus a zero point within the range of `dtype`."""
    limits = np.iinfo(dtype)
    shifted = emit(relax.op.add(whole, relax.const(zero, "float32"))) if zero else whole
    return relax.op.astype(emit(relax.op.clip(shifted, float(limits.min), float(limits.max))), dtype)


def _shift(dtype: str) -> int:
    """Return what codes of a type become more by where the other 8-bit type stands for them."""
    return _SIGN if dtype == "int8" else -_SIGN


def _number(expr: relax.Expr) -> float | None:
    """Return a constant of one element."""
    array = constant_of(expr)
    return float(array.item()) if array is not None and array.size == 1 else None
