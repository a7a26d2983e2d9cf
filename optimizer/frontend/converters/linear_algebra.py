"""Matrix products and their generalization, Einsum."""

from __future__ import annotations

import math
import re

import tvm.ir
from tvm import relax, te, tirx

from optimizer.frontend.converters.precision import HALF_TYPES
from optimizer.frontend.dimensions import Dimension
from optimizer.frontend.node import Node, Result, UnsupportedNodeError, broadcast_shape
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value


@converter("MatMul")
def matmul(node: Node) -> Result:
    """Convert MatMul: numpy.matmul, batch dimensions broadcast; 16-bit floats are summed in float32."""
    return product(node, node.input(0), node.input(1))


def product(node: Node, left: Value, right: Value) -> relax.Expr:
    """Return the matrix product of two values, of which symbolic dimensions that have to agree are checked to agree."""
    batch = broadcast_shape([left.shape[:-2], right.shape[:-2]])
    shared = broadcast_shape([left.shape[-1:], right.shape[-2:][:1]])
    operands = (
        node.reshaped_type(left, (*_batch_of(left, batch), *left.shape[-2:-1], *shared)),
        node.reshaped_type(right, (*_batch_of(right, batch), *shared, *(right.shape[-1:] if right.rank > 1 else ()))),
    )
    if left.dtype not in HALF_TYPES:
        return relax.op.matmul(*operands)
    summed = node.emit(relax.op.matmul(*operands, out_dtype="float32"))
    return relax.op.astype(summed.expr, left.dtype)


def _batch_of(value: Value, batch: tuple[Dimension, ...]) -> list[Dimension]:
    """Return the batch dimensions that a value must have to broadcast to `batch`."""
    own = value.shape[:-2]
    wanted = batch[len(batch) - len(own) :]
    return [mine if isinstance(mine, int) and mine == 1 else other for mine, other in zip(own, wanted, strict=True)]


@converter("Gemm", since=7)
def gemm(node: Node) -> Result:
    """Convert Gemm: alpha * A' @ B' + beta * C, with A and B transposed on request."""
    left, right = (_transposed(node, index, name) for index, name in enumerate(("transA", "transB")))
    result = node.emit(product(node, left, right))
    alpha, beta = node.float("alpha", 1.0), node.float("beta", 1.0)
    if alpha != 1.0:
        result = node.emit(relax.op.multiply(result.expr, node.scalar(_as(alpha, result.dtype), result.dtype)))
    addend = node.optional_input(2)
    if addend is None or beta == 0.0:
        return result
    if beta != 1.0:
        addend = node.emit(relax.op.multiply(addend.expr, node.scalar(_as(beta, addend.dtype), addend.dtype)))
    return relax.op.add(*node.broadcast_operands(result, addend))


def _as(number: float, dtype: str) -> float | int:
    return number if "float" in dtype else int(number)


def _transposed(node: Node, index: int, attribute: str) -> Value:
    value = node.input(index)
    if not node.integer(attribute, 0):
        return value
    if value.constant is not None:
        return node.constant(value.constant.T)
    return node.emit(relax.op.permute_dims(value.expr))


@converter("Einsum", since=12)
def einsum(node: Node) -> Result:
    """Convert Einsum: sum over the index letters that the result lacks, of the product of the operands."""
    values = [node.input(index) for index in range(len(node.inputs))]
    terms, result = _parsed(node.string("equation"), [value.rank for value in values])
    sizes: dict[str, Dimension] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = broadcast_shape([(sizes.get(letter, 1),), (size,)])[0]
    operands = [
        node.reshaped_type(
            value, [1 if own == 1 else sizes[letter] for letter, own in zip(term, value.shape, strict=True)]
        )
        for term, value in zip(terms, values, strict=True)
    ]
    summed = [letter for letter in sizes if letter not in result]
    dtype = values[0].dtype
    accumulator = "float32" if dtype in HALF_TYPES else dtype

    def compute(*tensors: te.Tensor) -> te.Tensor:
        extents = _extents(terms, tensors)
        axes = {letter: te.reduce_axis((0, extents[letter]), name=f"sum_{i}") for i, letter in enumerate(summed)}

        def element(*indices: tirx.Var) -> tvm.ir.Expr:
            at: dict[str, tvm.ir.Expr] = {**axes, **dict(zip(result, indices, strict=True))}
            factors = [
                tensor(*(_index(at[letter], size) for letter, size in zip(term, tensor.shape, strict=True)))
                for term, tensor in zip(terms, tensors, strict=True)
            ]
            whole = math.prod(factor.astype(accumulator) for factor in factors[1:]) if len(factors) > 1 else 1
            whole = factors[0].astype(accumulator) * whole if len(factors) > 1 else factors[0].astype(accumulator)
            return te.sum(whole, axis=list(axes.values())) if axes else whole

        total = te.compute(tuple(extents[letter] for letter in result), element, name="einsum")
        return (
            total if accumulator == dtype else te.compute(total.shape, lambda *i: total(*i).astype(dtype), name="cast")
        )

    return node.compute(compute, *operands)


def _extents(terms: list[str], tensors: tuple[te.Tensor, ...]) -> dict[str, tvm.ir.Expr]:
    """Return the length of the loop over each letter: that of an operand which is not broadcast along it."""
    extents: dict[str, tvm.ir.Expr] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, size in zip(term, tensor.shape, strict=True):
            if letter not in extents or _is_one(extents[letter]):
                extents[letter] = size
    return extents


def _is_one(size: tvm.ir.Expr) -> bool:
    return isinstance(size, tirx.IntImm) and int(size.value) == 1


def _index(position: tvm.ir.Expr, size: tvm.ir.Expr) -> tvm.ir.Expr:
    """Return 0 along a dimension of 1 that is broadcast, else the position."""
    return tirx.const(0, "int64") if _is_one(size) else position


def _parsed(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the index letters of every operand and of the result; `...` becomes digits, aligned at the end."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks) or not re.fullmatch(r"[A-Za-z.,]*", left):
        raise UnsupportedNodeError(f"the equation '{equation}' does not fit {len(ranks)} operands")
    most = max(
        (rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term),
        default=0,
    )
    dots = "0123456789"[:most]
    expanded: list[str] = []
    for term, rank in zip(terms, ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        letters = term.replace("...", dots[len(dots) - hidden :] if hidden else "")
        if len(letters) != rank:
            raise UnsupportedNodeError(f"the term '{term}' of the equation does not fit rank {rank}")
        expanded.append(letters)
    if arrow:
        return expanded, right.replace("...", dots)
    every = "".join(expanded)
    once = sorted(letter for letter in set(every) if every.count(letter) == 1 and letter not in dots)
    return expanded, dots + "".join(once)
