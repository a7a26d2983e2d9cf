from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.relax import op

from passes.base import Site
from passes.fuse_attention import FuseAttention
from passes.provenance import annotate
from tests.passes.attention_graphs import cast_softmax, emit, scores_of, weights_of, with_sink
from tests.passes.graph import assert_kept, graph
from tests.passes.properties.relax_interpreter import Interpreter
from tests.passes.relax_modules import operators


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        (
            lambda q, k, v: op.matmul(weights_of(q, k), v),
            [(6, 4), (6, 4), (6,)],
            "a shape is not known, or of less than two dimensions",
        ),
        (
            lambda q, k, v: op.permute_dims(op.reshape(op.matmul(weights_of(q, k), v), (6, 2, 2)), [1, 0, 2]),
            [(6, 4)] * 3,
            "the axis of the values is split or joined with another one",
        ),
        (
            lambda q, k, v: op.matmul(op.permute_dims(weights_of(q, k)), v),
            [(6, 4)] * 3,
            "the softmax normalizes another axis than the one that the product adds up",
        ),
        (
            lambda q, k, v: op.matmul(op.nn.softmax(op.nn.relu(q)), v),
            [(6, 6), (6, 4), (6, 4)],
            "what the softmax normalizes does not come from a product by elementwise operators",
        ),
        (
            lambda q, k, v: op.matmul(op.nn.softmax(op.add(s := emit(scores_of(q, k)), op.tanh(s))), v),
            [(6, 4)] * 3,
            "the scores are read more than once on their way to the softmax, or through a gather",
        ),
        (
            lambda q, k, v: op.matmul(op.nn.softmax(op.permute_dims(scores_of(q, k))), v),
            [(6, 4)] * 3,
            "the scores' keys are not in the order of the softmax's axis",
        ),
        (
            lambda q, k, v: op.matmul(weights_of(q, k), v),
            [(6, 1), (6, 1), (6, 4)],
            "the products are of one number only",
        ),
        (
            lambda q, k, v: op.matmul(weights_of(q, k), op.multiply(v, relax.const(2.0))),
            [(6, 4)] * 3,
            "the values are scaled",
        ),
        (
            lambda q, k, v: op.permute_dims(op.reshape(op.matmul(weights_of(q, k), v), (4, 6))),
            [(6, 4)] * 3,
            "the result is rearranged in a way that cannot be followed",
        ),
        (
            lambda q, k, v: op.matmul(op.reshape(weights_of(q, k), (4, 6)), v),
            [(6, 3), (4, 3), (6, 4)],
            "the probabilities are rearranged in a way that cannot be followed",
        ),
        (
            lambda q, k, v: op.matmul(cast_softmax(q, k), v),
            [(6, 4)] * 3,
            "the softmax computes in float64",
        ),
        (
            lambda q, k, v: op.matmul(op.where(op.isnan(v), relax.const(0.0), weights_of(q, k)), v),
            [(6, 4), (6, 4), (6, 6)],
            "the probabilities are chosen by a condition",
        ),
        (
            lambda q, k, v: op.matmul(op.where(op.isnan(w := emit(weights_of(q, k))), relax.const(1.0), w), v),
            [(6, 4)] * 3,
            "the probabilities are chosen by a condition",
        ),
        (
            lambda q, k, v: op.matmul(op.nn.softmax(s := emit(scores_of(q, k))), op.matmul(s, v)),
            [(6, 4)] * 3,
            "what the softmax normalizes has another reader",
        ),
    ],
)
def test_an_attention_of_another_form_is_refused(body, shapes, reason: str) -> None:
    assert [site.refusal for site in assert_kept(FuseAttention(), body, *shapes).sites] == [reason]


def test_the_site_of_an_attention_carries_the_nodes_of_its_products_and_softmax() -> None:
    module = graph(lambda q, k, v: op.matmul(weights_of(q, k), v), *[(6, 4)] * 3)
    bindings = module["main"].body.blocks[0].bindings
    module = annotate(module, {binding.var: (binding.value.op.name,) for binding in bindings})
    (site,) = FuseAttention().run(module).sites
    assert site == Site(bindings[-1].var.name, None, ("relax.matmul", "relax.nn.softmax"))


def test_the_site_of_a_refusal_carries_the_nodes_of_the_product_and_of_the_end() -> None:
    module = graph(lambda q, k, v: op.permute_dims(op.matmul(cast_softmax(q, k), v)), *[(6, 4)] * 3)
    bindings = module["main"].body.blocks[0].bindings
    module = annotate(module, {binding.var: (binding.value.op.name,) for binding in bindings})
    (site,) = FuseAttention().run(module).sites
    nodes = ("relax.matmul", "relax.permute_dims")
    assert site == Site(bindings[-1].var.name, "the softmax computes in float64", nodes)


def test_a_result_that_is_also_read_before_its_transposition_is_one_site() -> None:
    def body(q, k, v):
        product = emit(op.matmul(weights_of(q, k), v))
        return product, op.permute_dims(product)

    module = graph(body, *[(6, 4)] * 3)
    outcome = FuseAttention().run(module)
    assert [site.refusal for site in outcome.sites] == [None]
    assert operators(outcome.module) == ["relax.call_tir", "relax.permute_dims"]


def test_the_end_is_behind_a_rounding_and_views_of_the_product() -> None:
    def body(q, k, v):
        product = op.matmul(op.nn.softmax(op.matmul(q, op.permute_dims(k, [0, 2, 1]))), v)
        return op.permute_dims(op.astype(op.reshape(product, (2, 3, 5, 4)), "float16"), [0, 2, 1, 3])

    module = graph(body, *[(6, 5, 4)] * 3)
    outcome = FuseAttention().run(module)
    assert [site.refusal for site in outcome.sites] == [None]
    assert operators(outcome.module) == ["relax.call_tir"]
    arrays = [np.random.default_rng(0).standard_normal((6, 5, 4)).astype("float32") for _ in range(3)]
    (expected,), (result,) = (Interpreter(each).run(arrays) for each in (module, outcome.module))
    np.testing.assert_allclose(result, expected, rtol=2**-10, atol=1e-6)  # half a step of float16 either way


@pytest.mark.parametrize(
    "body",
    [
        lambda q, k, v, s: with_sink(q, k, v, s, first=True),
        lambda q, k, v, s: op.matmul(  # the sink's own probability has a value, too
            op.nn.softmax(emit(op.concat([emit(scores_of(q, k)), s], -1)), -1),
            op.concat([v, op.strided_slice(v, [0], [0], [1])], 0),
        ),
    ],
)
def test_columns_beside_the_scores_that_are_no_sinks_are_refused(body) -> None:
    (site,) = assert_kept(FuseAttention(), body, (6, 4), (5, 4), (5, 3), (6, 1)).sites
    assert site.refusal is not None


def test_a_product_that_no_softmax_feeds_is_no_site() -> None:
    x = relax.Var("x", relax.TensorType((4, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(op.matmul(op.nn.relu(x), x))
        builder.emit_func_output(output)
    assert FuseAttention().run(builder.get()).sites == ()


def _plain() -> tvm.IRModule:
    return FuseAttention().run(graph(lambda q, k, v: op.matmul(weights_of(q, k), v), (5, 4), (6, 4), (6, 3))).module


def test_the_steps_are_named_for_what_they_compute() -> None:
    (function,) = [f for f in _plain().functions.values() if isinstance(f, tirx.PrimFunc)]
    text = function.script()
    assert re.findall(r'sblock\("(\w+)"\)', text)[1:] == [
        "scores", "logits", "largest", "exponentials", "total", "probabilities", "attention",
    ]  # fmt: skip
    assert [v.name_hint for v in _plain().get_global_vars() if v.name_hint != "main"] == ["attention"]
    assert all(f", {loop} in T.grid" in text for loop in ("depth", "key", "term", "member"))


@pytest.mark.parametrize("renamed", [True, False])
def test_a_transposition_behind_another_name_is_the_end(renamed: bool) -> None:
    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in zip("qkv", [(6, 4)] * 3, strict=True)
    ]
    with builder.function("main", inputs):
        with builder.dataflow():
            q, k, v = inputs
            product = builder.emit(op.matmul(builder.emit(weights_of(q, builder.emit(k))), v))
            read = builder.emit(product) if renamed else product
            output = builder.emit_output(op.permute_dims(read))
        builder.emit_func_output(output)
    outcome = FuseAttention().run(builder.get())
    assert [site.location for site in outcome.sites] == [output.name]
    assert operators(outcome.module) == ["relax.call_tir"]
