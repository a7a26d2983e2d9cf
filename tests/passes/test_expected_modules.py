"""Modules before and after the passes that make functions of TIR, as text: what they do can be read in `expected/`.

Numbers of constants are not in the text; other tests hold them to references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm
from onnx import parser
from tvm import relax
from tvm.relax import op

from optimizer.frontend.importer import import_model
from passes import pipeline
from tests.passes.graph import graph

EXPECTED = Path(__file__).parent / "expected"


def _attention() -> tvm.IRModule:
    def body(q: relax.Expr, k: relax.Expr, v: relax.Expr) -> relax.Expr:
        scores = op.multiply(op.matmul(q, op.permute_dims(k)), relax.const(0.5))
        return op.matmul(op.nn.softmax(scores), v)

    return graph(body, ("queries", 4), ("keys", 4), ("keys", 3))


def _decoder() -> tvm.IRModule:
    return import_model(
        parser.parse_model("""
            <ir_version: 8, opset_import: ["" : 17]>
            decoder (float[batch,new,4] x, float[batch,past,4] past)
                => (float[batch,new,2] logits, float[batch,total,4] present)
                <float[4,2] head = {1, 2, 3, 4, 5, 6, 7, 8}>
            {
                present = Concat <axis = 1> (past, x)
                sum = ReduceSum <keepdims = 0> (present)
                rows = Add (x, sum)
                product = MatMul (rows, head)
                logits = Tanh (product)
            }
        """)
    ).module


def _convolution() -> tvm.IRModule:
    weights = relax.const(np.ones((4, 4, 2, 1), np.float32))
    return graph(lambda x: op.nn.relu(op.nn.conv2d(x, weights)), ("batch", 4, 5, 5))


def _product() -> tvm.IRModule:
    return graph(lambda x: op.matmul(x, relax.const(np.ones((64, 32), np.float32))), ("rows", 64))


def _integers() -> tvm.IRModule:
    def body(x: relax.Expr) -> relax.Expr:
        codes = relax.const(np.ones((64, 32), np.int8))
        return op.matmul(x, op.multiply(op.astype(codes, "float32"), relax.const(0.5)))

    return graph(body, ("rows", 64))


_CASES: dict[str, tuple[Callable[[], tvm.IRModule], Sequence[str]]] = {
    "fuse_attention": (_attention, ["fuse-attention"]),
    "rewrite_kv_cache": (_decoder, ["rewrite-kv-cache"]),
    "leave_out_rows": (_decoder, ["rewrite-kv-cache", "leave-out-rows"]),
    "block_channels": (_convolution, ["block-channels{block=2}"]),
    "quantize_weights": (_product, ["quantize-weights{target=arm64,activations=float}"]),
    "pack_quantized_weights": (_integers, ["pack-quantized-weights{target=arm64,activations=float}"]),
}


@pytest.mark.parametrize("name", _CASES)
def test_the_module_after_the_pass_is_the_expected_one(name: str) -> None:
    before, passes = _CASES[name]
    module, records = pipeline.run(before(), pipeline.parse(",".join(passes)))
    assert [site.refusal for site in records[-1].outcome.sites] == [None]
    assert module.script() == (EXPECTED / f"{name}.txt").read_text()
