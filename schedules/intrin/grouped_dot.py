"""Instructions that add products of some neighbours of a reduction to each lane, by the types that they multiply."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr, TensorLoad

from schedules.intrin.bf16_conversion import is_product_of_bf16
from schedules.intrin.bf16_dot import bf16_dot
from schedules.intrin.byte_dot import byte_dot, is_product_of_bytes, is_product_of_words, word_dot
from schedules.intrin.grouped_call import GroupedDot
from targets.base import Target


def grouped_dot(target: Target, weights: TensorLoad, term: Expr) -> GroupedDot | None:
    """Return the instruction that adds terms like `term`, a product with a read of weights; None where there is none.

    It is one for the target and the operands' types, whatever their layout.
    """
    if is_product_of_bf16(term):
        return bf16_dot(target)
    if is_product_of_words(term):
        return word_dot(target)
    if is_product_of_bytes(term):
        other = next((side.value for side in (term.a, term.b) if not side.value.same_as(weights)), None)
        return None if other is None else byte_dot(target, str(other.source.dtype), str(weights.source.dtype))
    return None


def is_grouped_term(term: Expr) -> bool:
    """Return whether some target has an instruction for a sum of terms like this."""
    kinds = (is_product_of_bf16, is_product_of_bytes, is_product_of_words)
    return isinstance(term, tirx.Mul) and any(is_product(term) for is_product in kinds)
