"""Operators of the domain ai.onnx.ml on numbers: ArrayFeatureExtractor, Binarizer."""

from __future__ import annotations

from tvm import relax

from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter

_DOMAIN = "ai.onnx.ml"


@converter("ArrayFeatureExtractor", domain=_DOMAIN)
def array_feature_extractor(node: Node) -> Result:
    """Convert ArrayFeatureExtractor: chosen columns of the last axis; an input of rank 1 counts as one row."""
    data, columns = node.input(0), node.input(1)
    rows = node.reshape(data, (1, data.shape[0])) if data.rank == 1 else data
    flat = columns if columns.rank == 1 else node.reshape(columns, (columns.shape[-1],))
    return relax.op.take(rows.expr, flat.expr, axis=rows.rank - 1, mode="clip")


@converter("Binarizer", domain=_DOMAIN)
def binarizer(node: Node) -> Result:
    """Convert Binarizer: 1 where an element exceeds the threshold, else 0."""
    data = node.input(0)
    above = relax.op.greater(data.expr, node.scalar(node.float("threshold", 0.0), data.dtype))
    return relax.op.astype(above, data.dtype)
