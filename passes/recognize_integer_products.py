"""Products of 8-bit activations with constant 8-bit weights or with each other, as exact integer products.

    DQ(x, sx, zx) @ DQ(w, sw, zw) = float(x @ w' - zx * sum(w')) * (sx * sw)        with w' = w - zw
    (x - zx) @ (w - zw)           =       x @ w' - zx * sum(w')
    conv(DQ(x), DQ(w))            = float(conv(pad(x, zx), w') - zx * sum(w')) * (sx * sw)

x has the type that the target's instructions multiply with int8: an unsigned number x + 128 stands for a signed x, with
a zero point that is larger by as much, or the other way around. Columns of w' that do not fit into int8 are w'' + o:
x @ w' - zx * sum(w') is then (x @ w'' - zx * sum(w'')) + o * (sum(x) - K * zx), with a sum over each row of x, or over
each window of an image. Where only the run knows zx, an image is padded with zeros before it is quantized.

What is quantized from a dequantized number by the same scale is that number's code, also behind moves of elements. In
a function with such products computed numbers are quantized by a multiplication with the reciprocal of a constant
scale, which may take one that lies on the border of two codes to the other; the function's own inputs are divided.
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
from passes.activation_products import ActivationProduct, correction, packed_fours, product_of_fours
from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site
from passes.integer_operands import BYTES, MOVES, Codes, dequantized
from passes.integer_products import CONVOLUTIONS, IntegerProduct, integer_product
from passes.tensor_types import constant, constant_of, dtype_of
from schedules.intrin.byte_dot import WORD, activation_types, splits_operands
from targets.base import Target

_ATTRIBUTES = ("strides", "padding", "dilation", "groups", "data_layout", "kernel_layout")
_SIGN = 128  # what a signed byte is less than the unsigned one that differs in its highest bit


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
                found = integer_product(call, self._dataflow, self._types)
            except Refusal as refusal:
                self.sites.append(Site(binding.var.name, str(refusal), self._dataflow.nodes(call)))
            else:
                if found is not None:
                    self.products[binding.var] = found
                    self.sites.append(Site(binding.var.name, None, self._dataflow.nodes(call)))
        super().visit_var_binding_(binding)


def _read(product: IntegerProduct | ActivationProduct) -> Codes:
    return product.codes if isinstance(product, IntegerProduct) else product.left


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
        self._widens = splits_operands(target)
        self._columns = target.layouts.column_block
        # Codes that products of matrices read, by the variables that hold them, as words.
        self._words: dict[relax.Expr, relax.Expr] = {}
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
        value = self.visit_expr(call.args[0])
        if self._is_given(call.args[0]):
            scaled = self._emit(relax.op.divide(value, relax.const(scale, "float32")))
        else:
            scaled = self._emit(relax.op.multiply(value, relax.const(1 / scale, "float32")))
        whole = self._emit(relax.op.round(scaled))
        if variable in self._to_turn:
            other = self._other(dtype)
            self._turned[variable] = self._emit(_saturated(self._emit, whole, zero + _shift(dtype), other))
        return _saturated(self._emit, whole, zero, dtype)

    def _is_given(self, expr: relax.Expr) -> bool:
        """Return whether numbers come from outside: those of an image may well lie on the borders of codes."""
        while (move := self._dataflow.call(expr, *MOVES)) is not None:
            expr = move.args[0]
        return isinstance(self._dataflow.producer(expr), relax.Var)

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
        pads = [int(pad) for pad in product.call.attrs.padding] if product.is_convolution else []
        padded = any(pads) and zero != 0
        if padded:
            codes = self._padded(product, codes, zero, pads)
        if self._widens and not product.is_convolution:
            codes = self._widened(codes)

        def summed(weights: NDArray[np.int8]) -> relax.Expr:
            if not product.is_convolution:
                return self._emit(relax.op.matmul(codes, constant(weights), out_dtype="int32"))
            attributes = {name: getattr(product.call.attrs, name) for name in _ATTRIBUTES}
            attributes["padding"] = [0] * len(pads) if padded else pads
            convolution = CONVOLUTIONS[product.call.op.name]
            return self._emit(convolution(codes, constant(weights), **attributes, out_dtype="int32"))

        exact = summed(product.weights)
        for part in self._corrections(product, codes, zero, summed):
            exact = self._emit(relax.op.subtract(exact, part))
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
            turned = self._shifted(self.visit_expr(codes.codes), codes.dtype)
        if isinstance(zero, int):
            return self._moved(codes, turned), zero + shift
        return self._moved(codes, turned), self._emit(relax.op.add(zero, relax.const(shift, "int16")))

    def _shifted(self, codes: relax.Expr, dtype: str) -> relax.Expr:
        """Return codes of a type as the other one."""
        wide = self._emit(relax.op.astype(codes, "int16"))
        shifted = self._emit(relax.op.add(wide, relax.const(_shift(dtype), "int16")))
        return self._emit(relax.op.astype(shifted, self._other(dtype)))

    def _widened(self, codes: relax.Expr) -> relax.Expr:
        """Return codes as words, once for all products that read them."""
        if codes not in self._words:
            self._words[codes] = self._emit(relax.op.astype(codes, WORD))
        return self._words[codes]

    def _moved(self, codes: Codes, expr: relax.Expr) -> relax.Expr:
        for move in codes.moves:
            others = [self.visit_expr(argument) for argument in move.args[1:]]
            expr = self._emit(tvm.ir.Call(move.op, [expr, *others], move.attrs))
        return expr

    def _padded(
        self, product: IntegerProduct, codes: relax.Expr, zero: int | relax.Expr, pads: list[int]
    ) -> relax.Expr:
        """Return an image padded with its zero point, so that the correction is the same everywhere."""
        rank = len(pads) // 2
        widths = [0] * 4 + [pad for axis in range(rank) for pad in (pads[axis], pads[rank + axis])]
        if isinstance(zero, int):
            return self._emit(relax.op.nn.pad(codes, widths, "constant", zero))
        quantize = self._dataflow.call(product.codes.codes, "relax.quantize")
        assert quantize is not None
        numbers, *parameters = [self.visit_expr(argument) for argument in quantize.args]
        image = self._emit(relax.op.nn.pad(numbers, widths, "constant", 0.0))
        own = self._emit(relax.op.quantize(image, *parameters, axis=0, out_dtype=product.codes.dtype))
        return own if product.codes.dtype in self._types else self._shifted(own, product.codes.dtype)

    def _corrections(
        self,
        product: IntegerProduct,
        codes: relax.Expr,
        zero: int | relax.Expr,
        summed: Callable[[NDArray[np.int8]], relax.Expr],
    ) -> list[relax.Expr]:
        """Return what the product of the codes is more than that of the numbers that they stand for, in parts."""
        offsets, parts = product.offsets, list[relax.Expr]()
        per_zero = product.sums + (0 if offsets is None else offsets * np.int32(product.depth))
        if offsets is not None:
            if product.is_convolution:
                groups = int(product.call.attrs.groups)
                over = summed(np.ones((groups, *product.weights.shape[1:]), np.int8))
            else:
                over = self._emit(relax.op.sum(self._emit(relax.op.astype(codes, "int32")), axis=[-1], keepdims=True))
            parts.append(self._emit(relax.op.multiply(over, product.along_outputs(-offsets))))
        if not isinstance(zero, int):
            wide = self._emit(relax.op.astype(zero, "int32"))
            parts.append(self._emit(relax.op.multiply(wide, product.along_outputs(per_zero))))
        elif zero:
            parts.append(product.along_outputs(per_zero * np.int32(zero)))
        return parts

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
