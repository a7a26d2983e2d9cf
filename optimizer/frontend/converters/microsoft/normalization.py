"""Normalizations of com.microsoft, with the additions that they are fused with."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.converters.microsoft.standard import standard, standard_outputs
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import MICROSOFT, converter
from optimizer.frontend.scaled_dot_product import converted, positions
from optimizer.frontend.value import Value

_SKIP_EPSILON = 1e-12  # the schema's default


@converter("SimplifiedLayerNormalization", domain=MICROSOFT)
@converter("SimplifiedLayerNormalization")  # onnxruntime writes it without a domain into the models it optimizes
def simplified_layer_normalization(node: Node) -> Result:
    """Convert SimplifiedLayerNormalization: divide by the root mean square, and scale."""
    if node.has_output(1):
        raise node.unsupported("the output inv_std_var is not supported")
    epsilon = node.float("epsilon", 1e-5)
    return standard(
        node, "RMSNormalization", node.input(0), node.input(1), axis=node.integer("axis", -1), epsilon=epsilon
    )


@converter("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(node: Node) -> Result:
    """Convert SkipLayerNormalization: LayerNormalization of input + skip + bias; output 3 is that sum."""
    total = _sum(node, [node.input(0), node.input(1), node.optional_input(4)])
    count = 3 if node.has_output(1) or node.has_output(2) else 1
    inputs = [total, node.input(2), node.optional_input(3)]
    epsilon = node.float("epsilon", _SKIP_EPSILON)
    results = standard_outputs(node, "LayerNormalization", inputs, count, axis=-1, epsilon=epsilon)
    mean, inverse = results[1:] or (None, None)
    return [results[0], mean, inverse, total]


@converter("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_normalization(node: Node) -> Result:
    """Convert SkipSimplifiedLayerNormalization: RMSNormalization of input + skip + bias; output 3 is that sum."""
    total = _sum(node, [node.input(0), node.input(1), node.optional_input(3)])
    epsilon = node.float("epsilon", _SKIP_EPSILON)
    result = standard(node, "RMSNormalization", total, node.input(2), axis=-1, epsilon=epsilon)
    return [result, None, None, total]


@converter("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(node: Node) -> Result:
    """Convert EmbedLayerNormalization: the sum of word, position and segment embeddings, normalized.

    Output 1 counts each row's words in the mask, and is 0 without a mask. Output 2 is the sum.
    """
    words = node.input(0)
    for index, table in ((0, 2), (8, 3), (1, 4)):
        if node.has_input(index):
            node.chooses_by(node.input(index), node.input(table).shape[0], from_the_end=False)
    parts = [standard(node, "Gather", node.input(2), words, axis=0)]
    place = node.optional_input(8) or node.emit(relax.op.reshape(positions(0, words.shape[1]), (1, words.shape[1])))
    parts.append(standard(node, "Gather", node.input(3), place, axis=0))
    if node.has_input(1):
        parts.append(standard(node, "Gather", node.input(4), node.input(1), axis=0))
    total = _sum(node, parts)
    epsilon = node.float("epsilon", _SKIP_EPSILON)
    result = standard(node, "LayerNormalization", total, node.input(5), node.input(6), axis=-1, epsilon=epsilon)
    return [result, _mask_index(node) if node.has_output(1) else None, total]


def _mask_index(node: Node) -> Value:
    if not node.has_input(7):
        return node.emit(relax.op.zeros((node.input(0).shape[0],), "int32"))
    present = relax.op.equal(node.expr(7), relax.const(1, "int32"))
    return node.emit(relax.op.sum(relax.op.astype(present, "int32"), axis=1))


def _sum(node: Node, parts: Sequence[Value | None]) -> Value:
    """Return the sum of what is given, added in at least float32 and rounded once."""
    given = [part for part in parts if part is not None]
    dtype = given[0].dtype
    total = converted(node, given[0], accumulation_dtype(dtype))
    for part in given[1:]:
        total = standard(node, "Add", total, converted(node, part, total.dtype))
    return converted(node, total, dtype)
