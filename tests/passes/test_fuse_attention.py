from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

from passes.attention_elements import MOST_OPERATIONS
from passes.fuse_attention import FuseAttention
from passes.tensor_types import numpy_dtype
from tests.passes.attention_graphs import emit, scores_of, weights_of, with_sink
from tests.passes.graph import graph
from tests.passes.properties.relax_interpreter import Interpreter
from tests.passes.relax_modules import operators, run

Emit = Callable[[relax.Expr], relax.Expr]
LOWEST = float(np.finfo("float32").min)


@dataclass(frozen=True)
class Form:
    """One way to write attention of [B, S, H * D] queries over [B, T, G * D] keys and values."""

    heads: int = 2
    groups: int = 2
    size: int = 4
    scaling: str = "product"
    mask: str = "none"
    merged: bool = False
    tiled: bool = False
    guarded: bool = False
    second_reader: bool = False
    axis: int = -1
    dtype: str = "float32"


def _heads(emit: Emit, x: relax.Expr, shape: tuple[int | tirx.Var, int | tirx.Var, int, int]) -> relax.Expr:
    return emit(op.permute_dims(emit(op.reshape(x, shape)), [0, 2, 1, 3]))


def _attention(form: Form, batch: int, queries: int | str, keys: int | str) -> tvm.IRModule:
    symbols = {name: tirx.Var(name, "int64") for name in (queries, keys) if isinstance(name, str)}
    s, t = (symbols[n] if isinstance(n, str) else n for n in (queries, keys))
    h, g, d = form.heads, form.groups, form.size
    types = [(batch, s, h * d), (batch, t, g * d), (batch, t, g * d)]
    inputs = [relax.Var(n, relax.TensorType(shape, form.dtype)) for n, shape in zip("qkv", types, strict=True)]
    builder = relax.BlockBuilder()
    extra: list[relax.Var] = []
    if form.mask in ("added", "chosen"):
        shape = (batch, 1, s, t) if form.mask == "added" else (batch, 1, 1, t)
        kind = form.dtype if form.mask == "added" else "bool"
        extra.append(relax.Var("mask", relax.TensorType(shape, kind)))
    with builder.function("main", [*inputs, *extra]):
        with builder.dataflow():
            emit = builder.emit
            q, k, v = (
                _heads(emit, x, (batch, n, count, d)) for x, n, count in zip(inputs, (s, t, t), (h, g, g), strict=True)
            )
            if g != h:
                repeated = _tiled if form.tiled else _repeated
                k, v = (repeated(emit, x, (batch, g, h // g, t, d)) for x in (k, v))
            scale = relax.const(d**-0.5, form.dtype)
            root = relax.const(d**-0.25, form.dtype)
            if form.scaling == "operands":
                q, k = emit(op.multiply(q, root)), emit(op.multiply(k, root))
            if form.merged:
                q, k, v = (emit(op.reshape(x, (batch * h, n, d))) for x, n in zip((q, k, v), (s, t, t), strict=True))
            turned = emit(op.permute_dims(k, [0, 2, 1] if form.merged else [0, 1, 3, 2]))
            scores = emit(op.matmul(q, turned))
            if form.scaling == "product":
                scores = emit(op.multiply(scores, scale))
            elif form.scaling == "divided":
                scores = emit(op.divide(scores, relax.const(d**0.5, form.dtype)))
            scores = _masked(emit, form, scores, extra, (s, t))
            weights = emit(op.nn.softmax(scores, axis=form.axis))
            if form.guarded:
                weights = emit(op.where(emit(op.isnan(weights)), relax.const(0.0, form.dtype), weights))
            result = emit(op.matmul(weights, v))
            if form.merged:
                result = emit(op.reshape(result, (batch, h, s, d)))
            result = emit(op.permute_dims(result, [0, 2, 1, 3]))
            result = emit(op.reshape(result, (batch, s, h * d)))
            if form.second_reader:
                result = emit(op.add(result, emit(op.sum(weights))))
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    return builder.get()


def _repeated(emit: Emit, x: relax.Expr, shape: tuple[int | tirx.Var, ...]) -> relax.Expr:
    b, g, r, t, d = shape
    return emit(op.reshape(emit(op.broadcast_to(emit(op.expand_dims(x, [2])), (b, g, r, t, d))), (b, g * r, t, d)))


def _tiled(emit: Emit, x: relax.Expr, shape: tuple[int | tirx.Var, ...]) -> relax.Expr:
    b, g, r, t, d = shape
    return emit(op.reshape(emit(op.tile(emit(op.expand_dims(x, [2])), (1, 1, r, 1, 1))), (b, g * r, t, d)))


def _masked(
    emit: Emit, form: Form, scores: relax.Expr, extra: list[relax.Var], sizes: tuple[int | tirx.Var, int | tirx.Var]
) -> relax.Expr:
    queries, keys = sizes
    if form.mask == "added":
        return emit(op.add(scores, extra[0]))
    if form.mask == "chosen":
        bias = emit(op.where(extra[0], relax.const(0.0, form.dtype), relax.const(LOWEST, form.dtype)))
        return emit(op.add(scores, bias))
    if form.mask == "linear":  # as ALiBi biases scores: by a slope per head times the distance (arXiv 2108.12409)
        slopes = relax.const((2.0 ** -np.arange(1, form.heads + 1)).reshape(-1, 1, 1).astype(form.dtype))
        rows = emit(op.reshape(emit(op.arange(0, queries, 1, "int64")), (queries, 1)))
        distance = emit(op.subtract(emit(op.arange(0, keys, 1, "int64")), rows))
        return emit(op.add(scores, emit(op.multiply(slopes, emit(op.astype(distance, form.dtype))))))
    if form.mask == "causal":
        rows = emit(op.reshape(emit(op.arange(0, queries, 1, "int64")), (queries, 1)))
        columns = emit(op.arange(0, keys, 1, "int64"))
        seen = emit(op.less_equal(columns, rows))
        return emit(op.where(seen, scores, relax.const(float("-inf"), form.dtype)))
    return scores


def _arrays(form: Form, batch: int, queries: int, keys: int) -> list[np.ndarray]:
    rng = np.random.default_rng([batch, queries, keys])
    shapes = [(batch, queries, form.heads * form.size), *[(batch, keys, form.groups * form.size)] * 2]
    arrays = [rng.standard_normal(shape).astype(numpy_dtype(form.dtype)) for shape in shapes]
    if form.mask == "added":
        arrays.append(rng.standard_normal((batch, 1, queries, keys)).astype(numpy_dtype(form.dtype)))
    if form.mask == "chosen":
        allowed = rng.random((batch, 1, 1, keys)) < 0.7
        allowed[..., 0] = True
        arrays.append(allowed)
    return arrays


FORMS = st.builds(
    Form,
    heads=st.just(4),
    groups=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([2, 5]),
    scaling=st.sampled_from(["product", "divided", "operands"]),
    mask=st.sampled_from(["none", "added", "chosen", "causal"]),
    tiled=st.booleans(),
    guarded=st.booleans(),
)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(form=FORMS, batch=st.integers(1, 2), queries=st.integers(1, 5), keys=st.integers(2, 6), symbolic=st.booleans())
def test_fusing_keeps_the_result(form: Form, batch: int, queries: int, keys: int, symbolic: bool) -> None:
    module = _attention(form, batch, "s" if symbolic else queries, "t" if symbolic else keys)
    outcome = FuseAttention().run(module)
    assert [site.refusal for site in outcome.sites] == [None]
    assert "relax.nn.softmax" not in operators(outcome.module)
    assert "relax.permute_dims" not in [name for name in operators(outcome.module) if form.mask != "added"]
    arrays = _arrays(form, batch, queries, keys)
    # Weights that add up to 1, of values of order 1; a handful of roundings each.
    np.testing.assert_allclose(run(outcome.module, *arrays), run(module, *arrays), rtol=1e-5, atol=2e-6)


def test_heads_merged_with_the_batch_are_told_apart_again() -> None:
    form = Form(merged=True)
    module = _attention(form, 3, 5, 7)
    outcome = FuseAttention().run(module)
    assert operators(outcome.module) == ["relax.call_tir", "relax.reshape"]
    arrays = _arrays(form, 3, 5, 7)
    np.testing.assert_allclose(run(outcome.module, *arrays), run(module, *arrays), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "form",
    [Form(mask="added", guarded=True), Form(scaling="operands", heads=4), Form(mask="causal", scaling="divided")],
)
def test_attention_of_16_bits_rounds_its_result_alone(form: Form, dtype: str) -> None:
    form = replace(form, dtype=dtype)
    module = _attention(form, 2, "s", 7)
    outcome = FuseAttention().run(module)
    assert [site.refusal for site in outcome.sites] == [None]
    assert "relax.nn.softmax" not in operators(outcome.module)
    arrays = _arrays(form, 2, 5, 7)
    (exact,) = Interpreter(module, wide=True).run(arrays)
    (result,) = Interpreter(outcome.module).run(arrays)
    assert result.dtype == numpy_dtype(dtype)
    half_a_step = np.abs(exact) * float(ml_dtypes.finfo(numpy_dtype(dtype)).eps) / 2
    assert (np.abs(result.astype("float64") - exact) <= half_a_step + 1e-5).all()


@pytest.mark.parametrize("tested_in", [None, "float16", "float32"])
def test_products_of_16_bits_with_wide_sums_and_roundings_between_them_are_one_function(tested_in: str | None) -> None:
    def body(q, k, v):
        scores = op.astype(op.matmul(q, op.permute_dims(k), out_dtype="float32"), "float16")
        scores = op.astype(op.multiply(scores, relax.const(0.5, "float16")), "float32")
        weights = op.astype(op.nn.softmax(scores), "float16")
        if tested_in is not None:
            tested = op.astype(weights, tested_in) if tested_in == "float32" else weights
            weights = op.where(op.isnan(tested), relax.const(0.0, "float16"), weights)
        return op.reshape(op.astype(op.matmul(weights, v, out_dtype="float32"), "float16"), (2, 9))

    module = graph(body, (6, 4), (5, 4), (5, 3), dtype="float16")
    outcome = FuseAttention().run(module)
    assert operators(outcome.module) == ["relax.call_tir", "relax.reshape"]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float16") for shape in ((6, 4), (5, 4), (5, 3))]
    (expected,), (result,) = (Interpreter(each).run(arrays) for each in (module, outcome.module))
    np.testing.assert_allclose(result, expected, rtol=4e-3, atol=4e-3)  # the unfused one rounds the weights too


@pytest.mark.parametrize("narrow", [True, False])
def test_a_mask_cast_to_16_bits_hides_as_much_as_that_holds(narrow: bool) -> None:
    dtype = "float16" if narrow else "float32"

    def body(q, k, v, seen):
        mask = op.where(seen, relax.const(0.0), relax.const(LOWEST))
        return op.matmul(op.nn.softmax(op.add(scores_of(q, k), op.astype(mask, dtype))), v)

    module = graph(body, (2, 4), (3, 4), (3, 2), (2, 3), dtype=[dtype, dtype, dtype, "bool"])
    outcome = FuseAttention().run(module)
    assert "relax.nn.softmax" not in operators(outcome.module)
    arrays = [np.random.default_rng(0).standard_normal(shape).astype(dtype) for shape in ((2, 4), (3, 4), (3, 2))]
    seen = np.array([[True, False, True], [False, False, False]])
    (result,) = Interpreter(outcome.module).run([*arrays, seen])
    # Minus infinity everywhere is no distribution; the lowest number of fp32 everywhere is the uniform one.
    assert np.isnan(result).any(axis=1).tolist() == [False, narrow]


@pytest.mark.parametrize("sizes", [(5, 7), ("s", "t")])
def test_biases_that_grow_with_the_distance_are_not_stored(sizes: tuple[int | str, int | str]) -> None:
    form = Form(heads=4, groups=2, mask="linear")
    module = _attention(form, 2, *sizes)
    outcome = FuseAttention().run(module)
    assert [site.refusal for site in outcome.sites] == [None]
    assert set(operators(outcome.module)) == {"relax.call_tir", "relax.reshape"}
    arrays = _arrays(form, 2, 5, 7)
    np.testing.assert_allclose(run(outcome.module, *arrays), run(module, *arrays), rtol=1e-5, atol=2e-6)


def test_one_product_of_queries_keys_and_values_is_read_in_place() -> None:
    x = relax.Var("x", relax.TensorType((2, 5, 3 * 2 * 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            apart = builder.emit(op.reshape(x, (2, 5, 3, 2, 4)))
            apart = builder.emit(op.permute_dims(apart, [2, 0, 3, 1, 4]))
            q, k, v = (builder.emit(op.take(apart, relax.const(n, "int64"), axis=0)) for n in range(3))
            scores = builder.emit(op.matmul(q, builder.emit(op.permute_dims(k, [0, 1, 3, 2]))))
            weights = builder.emit(op.nn.softmax(scores, axis=-1))
            output = builder.emit_output(op.matmul(weights, v))
        builder.emit_func_output(output)
    outcome = FuseAttention().run(builder.get())
    assert operators(outcome.module) == ["relax.call_tir"]
    array = np.random.default_rng(0).standard_normal((2, 5, 24)).astype("float32")
    np.testing.assert_allclose(run(outcome.module, array), run(builder.get(), array), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("form", "keys", "reason"),
    [
        (Form(axis=2), 7, "the softmax is not over the last axis"),
        (Form(second_reader=True), 7, "the probabilities have another reader"),
        (Form(dtype="float64"), 7, "the products are of float64"),
        (Form(), 1, "there is one key or one column of values only"),
    ],
)
def test_refusal_says_why_and_changes_nothing(form: Form, keys: int, reason: str) -> None:
    module = _attention(form, 2, 3, keys)
    outcome = FuseAttention().run(module)
    assert [site.refusal for site in outcome.sites] == [reason]
    tvm.ir.assert_structural_equal(outcome.module, module)


def test_a_tensor_that_is_queries_keys_and_values_is_handed_over_once() -> None:
    module = graph(lambda x: op.matmul(weights_of(x, x), x), (6, 4))
    (binding,) = FuseAttention().run(module).module["main"].body.blocks[0].bindings
    assert len(binding.value.args[1].fields) == 1


def test_operands_that_are_widened_are_handed_over_narrow() -> None:
    def body(q, k, v):
        return op.matmul(weights_of(q, op.astype(k, "float32")), op.astype(v, "float32"))

    module = graph(body, *[(6, 4)] * 3, dtype=["float32", "float16", "bfloat16"])
    (binding,) = FuseAttention().run(module).module["main"].body.blocks[0].bindings
    dtypes = {str(tensor.ty.dtype.dtype) for tensor in binding.value.args[1].fields}
    assert dtypes == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize(("keys", "read"), [(1 << 16, False), ((1 << 16) + 1, True)])
def test_a_mask_of_one_number_is_that_number_unless_it_is_large(keys: int, read: bool) -> None:
    def body(q, k, v):
        mask = relax.const(np.full((1, keys), -3, "float32"))
        return op.matmul(op.nn.softmax(op.add(scores_of(q, k), mask)), v)

    (binding,) = FuseAttention().run(graph(body, (6, 4), (keys, 4), (keys, 3))).module["main"].body.blocks[0].bindings
    assert len(binding.value.args[1].fields) == 3 + read


def test_a_score_is_not_rounded_to_16_bits_and_is_cut_to_integers() -> None:
    def through(dtype: str | None) -> tuple[np.ndarray, np.ndarray]:
        def body(q, k, v):
            scores = scores_of(q, k)
            cast = scores if dtype is None else op.astype(op.astype(scores, dtype), "float32")
            return op.matmul(op.nn.softmax(cast), v)

        module = graph(body, *[(6, 4)] * 3)
        outcome = FuseAttention().run(module)
        assert operators(outcome.module) == ["relax.call_tir"]
        rng = np.random.default_rng(0)
        arrays = [2 * rng.standard_normal((6, 4)).astype("float32") for _ in range(3)]
        return Interpreter(module).run(arrays)[0], Interpreter(outcome.module).run(arrays)[0]

    exact, _ = through(None)
    rounded, unrounded = through("float16")
    assert np.abs(rounded - exact).max() > 1e-4
    np.testing.assert_allclose(unrounded, exact, rtol=1e-5, atol=2e-6)
    cut, fused = through("int32")
    assert np.abs(cut - exact).max() > 0.1
    np.testing.assert_allclose(fused, cut, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_query_that_sees_no_key_gives_zero_where_the_model_says_so_and_else_nan(guarded: bool) -> None:
    def body(q, k, v, seen):
        scores = op.where(seen, scores_of(q, k), relax.const(float("-inf")))
        weights = emit(op.nn.softmax(scores))
        if guarded:
            weights = op.where(op.isnan(weights), relax.const(0.0), weights)
        return op.matmul(weights, v)

    module = graph(body, (2, 4), (3, 4), (3, 2), (2, 3), dtype=["float32", "float32", "float32", "bool"])
    outcome = FuseAttention().run(module)
    assert "relax.nn.softmax" not in operators(outcome.module)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in ((2, 4), (3, 4), (3, 2))]
    seen = np.array([[True, False, True], [False, False, False]])
    (expected,), (result,) = (Interpreter(each).run([*arrays, seen]) for each in (module, outcome.module))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6)
    assert (result[1] == 0).all() if guarded else np.isnan(result[1]).all()


def test_what_is_done_to_a_score_is_computed_with_it() -> None:
    def body(q, k, v, seen):
        scores = op.multiply(op.tanh(op.divide(scores_of(q, k), relax.const(30.0))), relax.const(30.0))
        hidden = op.astype(op.logical_not(seen), "float32")
        bias = op.multiply(op.subtract(op.zeros((1, 6), "float32"), hidden), relax.const(9.0))
        floor = op.negative(op.multiply(op.ones((5, 1), "float32"), relax.const(20.0)))
        weights = op.nn.softmax(op.maximum(op.add(scores, bias), floor))
        return op.matmul(op.reshape(op.reshape(weights, (30,)), (5, 6)), v)

    module = graph(body, (5, 4), (6, 4), (6, 3), (6,), dtype=["float32", "float32", "float32", "bool"])
    outcome = FuseAttention().run(module)
    assert operators(outcome.module) == ["relax.call_tir"]
    rng = np.random.default_rng(0)
    arrays = [5 * rng.standard_normal(shape).astype("float32") for shape in ((5, 4), (6, 4), (6, 3))]
    seen = np.array([True, True, False, True, False, True])
    # Scores of up to 30 carry a rounding of 30 * eps into the exponential.
    np.testing.assert_allclose(run(outcome.module, *arrays, seen), run(module, *arrays, seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_the_logit_of_a_sink_joins_the_softmax(wide: bool) -> None:
    shapes = [(6, 4), (5, 4), (5, 3), (6, 1)]
    module = graph(with_sink, *shapes)
    outcome = FuseAttention().run(module)
    assert [site.refusal for site in outcome.sites] == [None]
    assert operators(outcome.module) == ["relax.call_tir"]
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal(shape).astype("float32") * (20 if wide else 1) for shape in shapes]
    np.testing.assert_allclose(run(outcome.module, *arrays), run(module, *arrays), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("steps", "fused"), [(MOST_OPERATIONS, True), (MOST_OPERATIONS + 1, False)])
def test_as_much_is_done_to_a_score_as_the_limit_says(steps: int, fused: bool) -> None:
    def body(q, k, v):
        scores = scores_of(q, k)
        for _ in range(steps):
            scores = op.tanh(scores)
        return op.matmul(op.nn.softmax(scores), v)

    (site,) = FuseAttention().run(graph(body, (5, 4), (6, 4), (6, 3))).sites
    assert site.refusal == (None if fused else "so much is done to a score that it would have to be stored")


def test_a_bias_of_queries_by_keys_is_handed_over_with_queries_next_to_each_other() -> None:
    def body(q, k, v, bias):
        return op.matmul(op.nn.softmax(op.add(scores_of(q, k), bias)), v)

    module = FuseAttention().run(graph(body, (5, 4), (6, 4), (6, 3), (5, 6))).module
    assert operators(module) == ["relax.permute_dims", "relax.call_tir"]
    module = FuseAttention().run(graph(body, (5, 4), (6, 4), (6, 3), (1, 6))).module
    assert operators(module) == ["relax.call_tir"]


def test_numbers_made_for_scores_of_16_bits_are_wide() -> None:
    def body(q, k, v):
        floor = op.negative(op.multiply(op.ones((5, 1), "float16"), relax.const(2.0, "float16")))
        scores = op.add(op.maximum(scores_of(q, k), floor), op.zeros((5, 6), "float16"))
        return op.matmul(op.nn.softmax(scores), v)

    module = graph(body, (5, 4), (6, 4), (6, 3), dtype="float16")
    outcome = FuseAttention().run(module)
    assert operators(outcome.module) == ["relax.call_tir"]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float16") for shape in ((5, 4), (6, 4), (6, 3))]
    (expected,) = Interpreter(module, wide=True).run(arrays)
    (result,) = Interpreter(outcome.module).run(arrays)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)
