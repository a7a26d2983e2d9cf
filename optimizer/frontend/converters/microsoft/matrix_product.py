"""Matrix products and convolutions of com.microsoft that are fused with what comes before and after them."""

from __future__ import annotations

import numpy as np

from optimizer.frontend.converters.microsoft.activation import activated
from optimizer.frontend.converters.microsoft.standard import standard, standard_outputs
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter
from optimizer.frontend.scaled_dot_product import converted
from optimizer.frontend.value import Value, numpy_dtype


@converter("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(node: Node) -> Result:
    """Convert FusedMatMul: alpha times the product of A and B, each transposed before if asked."""
    left = _transposed(node, node.input(0), node.integer("transA", 0), node.integer("transBatchA", 0))
    right = _transposed(node, node.input(1), node.integer("transB", 0), node.integer("transBatchB", 0))
    product = standard(node, "MatMul", left, right)
    alpha = node.float("alpha", 1.0)
    return product if alpha == 1.0 else standard(node, "Mul", product, _scalar(node, alpha, product.dtype))


@converter("FusedGemm", domain=MICROSOFT)
def fused_gemm(node: Node) -> Result:
    """Convert FusedGemm: Gemm and an activation."""
    product = standard(
        node,
        "Gemm",
        *(node.optional_input(index) for index in range(3)),
        transA=node.integer("transA", 0),
        transB=node.integer("transB", 0),
        alpha=node.float("alpha", 1.0),
        beta=node.float("beta", 1.0),
    )
    names = [f"activation_{name}" for name in ("alpha", "beta", "gamma")]
    return activated(
        node, product, node.string("activation", ""), [node.float(name) for name in names if node.has_attribute(name)]
    )


@converter("FusedConv", domain=MICROSOFT)
def fused_conv(node: Node) -> Result:
    """Convert FusedConv: Conv, plus a tensor of the result's shape (input 3), then an activation."""
    integers = ("dilations", "kernel_shape", "pads", "strides")
    attributes = {name: node.integers(name) for name in integers if node.has_attribute(name)}
    inputs = (node.optional_input(index) for index in range(3))
    convolved = standard(
        node,
        "Conv",
        *inputs,
        group=node.integer("group", 1),
        auto_pad=node.string("auto_pad", "NOTSET"),
        **attributes,
    )
    if node.has_input(3):
        convolved = standard(node, "Add", convolved, node.input(3))
    return activated(node, convolved, node.string("activation", ""), node.floats("activation_params", []))


@converter("MatMulInteger16", domain=MICROSOFT)
def matmul_integer16(node: Node) -> Result:
    """Convert MatMulInteger16: the product of 16-bit integers, summed in 32 bits."""
    unsigned = all(node.input(index).dtype == "uint16" for index in (0, 1))
    wide = "uint32" if unsigned else "int32"
    return standard(node, "MatMul", *(converted(node, node.input(index), wide) for index in (0, 1)))


@converter("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(node: Node) -> Result:
    """Convert MatMulIntegerToFloat: the product of quantized matrices, scaled, plus a bias."""
    left_scale = node.input(2)
    if left_scale.rank > 1 or (left_scale.rank == 1 and left_scale.shape[0] != 1):
        raise node.unsupported("scales per row of A are not supported")
    return scaled_integer_product(
        node,
        (node.input(0), left_scale, node.optional_input(4)),
        (node.input(1), node.input(3), node.optional_input(5)),
        node.optional_input(6),
    )


@converter("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(node: Node) -> Result:
    """Convert DynamicQuantizeMatMul: A quantized to uint8 by its own range, times the quantized B, plus a bias."""
    left = standard_outputs(node, "DynamicQuantizeLinear", [node.input(0)], 3)
    right = (node.input(1), node.input(2), node.optional_input(3))
    return scaled_integer_product(node, (left[0], left[1], left[2]), right, node.optional_input(4))


Quantized = tuple[Value, Value, "Value | None"]  # the integers, their scale, and their zero point (0 if None)


def scaled_integer_product(node: Node, left: Quantized, right: Quantized, bias: Value | None) -> Value:
    """Return left times right, summed in int32, times both scales, plus a bias, in the type of the scales."""
    left_data, left_scale, left_zero = left
    right_data, right_scale, right_zero = right
    product = standard(node, "MatMulInteger", left_data, right_data, left_zero, right_zero)
    scale = standard(node, "Mul", left_scale, right_scale)
    scaled = standard(node, "Mul", converted(node, product, scale.dtype), scale)
    return scaled if bias is None else standard(node, "Add", scaled, bias)


def _scalar(node: Node, number: float, dtype: str) -> Value:
    return node.constant(np.array(number, numpy_dtype(dtype)))


def _transposed(node: Node, value: Value, last_two: int, batch: int) -> Value:
    """Apply the transpositions of FusedMatMul: of the last two axes, and of the first axis to the one before the last.

    The latter turns [M, ..., K] into [..., M, K] and comes before the former.
    """
    axes = list(range(value.rank))
    if batch and value.rank > 2:
        axes = [*axes[1:-1], 0, axes[-1]]
    if last_two and value.rank > 1:
        axes[-2:] = [axes[-1], axes[-2]]
    return value if axes == list(range(value.rank)) else standard(node, "Transpose", value, perm=axes)
