"""Text features on token numbers: TfIdfVectorizer."""

from __future__ import annotations

import numpy as np
from tvm import relax, te, tirx

from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter


@converter("TfIdfVectorizer", since=9)
def tf_idf_vectorizer(node: Node) -> Result:
    """Convert TfIdfVectorizer: how often each n-gram of a pool occurs, with up to so many tokens skipped between."""
    data = node.input(0)
    if node.has_attribute("pool_strings"):
        raise node.unsupported("strings")
    mode = node.string("mode")
    grams, lengths, weights = _grams(node)
    columns, most = grams.shape
    skips = node.integer("max_skip_count") + 1
    tokens = data.shape[-1]
    batch = data.shape[:-1]

    def count(rows: te.Tensor, pool: te.Tensor, sizes: te.Tensor, scale: te.Tensor) -> te.Tensor:
        skip, start = te.reduce_axis((0, skips), "skip"), te.reduce_axis((0, tokens), "start")

        def occurrences(*index: tirx.Expr) -> tirx.Expr:
            leading, column = index[:-1], index[-1]
            size, stride = sizes(column), skip + 1
            fits = [size > 0, start + (size - 1) * stride < tokens, tirx.any(size > 1, skip == 0)]
            for place in range(most):
                at = tirx.min(start + place * stride, tokens - 1)
                same = tirx.Cast("int64", rows(*leading, at)) == pool(column, place)
                fits.append(tirx.any(size <= place, same))
            return te.sum(tirx.Cast("float32", tirx.all(*fits)), axis=[skip, start])

        found = te.compute((*batch, columns), occurrences, name="occurrences")

        def feature(*index: tirx.Expr) -> tirx.Expr:
            number, weight = found(*index), scale(index[-1])
            if mode == "TF":
                return number
            present = tirx.Select(number > 0, tirx.const(1, "float32"), tirx.const(0, "float32"))
            return (number if mode == "TFIDF" else present) * weight

        return te.compute(found.shape, feature, name="features")

    tables = [relax.const(array, array.dtype.name) for array in (grams, lengths, weights)]
    return node.compute(count, data.expr, *tables)


def _grams(node: Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, by output column: the n-gram (padded), its length (0 where it is not asked for), its weight."""
    pool, starts = node.integers("pool_int64s"), node.integers("ngram_counts")
    columns = node.integers("ngram_indexes")
    weights = node.floats("weights", [1.0] * len(columns))
    shortest, longest = node.integer("min_gram_length"), node.integer("max_gram_length")
    width = max(columns) + 1
    grams = np.zeros((width, longest), np.int64)
    lengths, scales = np.zeros(width, np.int64), np.ones(width, np.float32)
    number = 0
    for size, (start, end) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True), 1):
        for place in range(start, end, size):
            if shortest <= size <= longest:
                grams[columns[number], :size] = pool[place : place + size]
                lengths[columns[number]] = size
                scales[columns[number]] = weights[number]
            number += 1
    return grams, lengths, scales
