"""Parts of attention for the graphs of tests: scores, their softmax, and the logit of a sink among them."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op


def emit(value: relax.Expr) -> relax.Expr:
    return relax.BlockBuilder.current().emit(value)


def scores_of(q: relax.Expr, k: relax.Expr) -> relax.Expr:
    return op.matmul(q, op.permute_dims(k))


def weights_of(q: relax.Expr, k: relax.Expr) -> relax.Expr:
    return op.nn.softmax(scores_of(q, k))


def cast_softmax(q: relax.Expr, k: relax.Expr) -> relax.Expr:
    return op.astype(op.nn.softmax(op.astype(scores_of(q, k), "float64")), "float32")


def with_sink(q: relax.Expr, k: relax.Expr, v: relax.Expr, sink: relax.Expr, *, first: bool = False) -> relax.Expr:
    scores = [emit(scores_of(q, k)), sink]
    weights = op.nn.softmax(emit(op.concat(scores[::-1] if first else scores, -1)), -1)
    begin = int(first)
    return op.matmul(op.strided_slice(emit(weights), [1], [begin], [begin + 5], [1]), v)
