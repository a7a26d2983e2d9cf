from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from optimizer.compile import CompileOptions, compile_in_memory, find_target
from optimizer.frontend.importer import import_model
from optimizer.lowering import fuse, lower
from passes import pipeline
from passes.base import Site

# A product over channels whose result goes back to blocks of channels, as in ConvNeXt, then a head on pooled features.
_BLOCK = """
    <ir_version: 8, opset_import: ["" : 18]>
    block (float[1,32,6,6] x, float[32,1,3,3] d, float[32] e, float[32,64] w1, float[64,32] w2, float[32,10] head)
        => (float[1,10] y)
    {
        axes = Constant <value_ints = [2, 3]> ()
        shape = Constant <value_ints = [1, 32]> ()
        [depthwise] c = Conv <group = 32, pads = [1, 1, 1, 1]> (x, d, e)
        [last] l = Transpose <perm = [0, 2, 3, 1]> (c)
        [up] u = MatMul (l, w1)
        [active] a = Relu (u)
        [down] p = MatMul (a, w2)
        [first] f = Transpose <perm = [0, 3, 1, 2]> (p)
        [residual] r = Add (f, c2)
        [again] z = Conv <group = 32, pads = [1, 1, 1, 1]> (r, d, e)
        [mean] m = ReduceMean (z, axes)
        [flat] g = Reshape (m, shape)
        [logits] y = MatMul (g, head)
    }
"""


def _model(text: str) -> onnx.ModelProto:
    """Return the model with random initializers for all inputs but the first."""
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for value in list(model.graph.input)[1:]:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape, dtype=np.float32) / 8
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    onnx.checker.check_model(model)
    return model


def _calls(model: onnx.ModelProto) -> list[tuple[str, tuple[str, ...]]]:
    """Return each call's operators and ONNX nodes, in order."""
    target = find_target("x86-avx2")
    passes = pipeline.parse(f"{pipeline.DEFAULT},block-channels{{block={target.layouts.channel_block}}}")
    module, _ = pipeline.run(import_model(model).module, passes)
    kernels = lower(module, target).kernels
    assert all(kernel.regions == 1 for kernel in kernels)
    return [("_".join(kernel.operators), nodes) for kernel in kernels for nodes in kernel.nodes]


def test_changes_of_layout_become_part_of_what_they_follow() -> None:
    calls = _calls(_model(_BLOCK.replace("c2", "c")))
    assert ("mean", "flat") in [nodes for _, nodes in calls]
    (down,) = [operators for operators, nodes in calls if "down" in nodes]
    assert down == "matmul_transpose_to_blocks_add"


def test_a_merged_model_computes_the_same() -> None:
    model = _model(_BLOCK.replace("c2", "x"))
    calls = [operators for operators, _ in _calls(model)]
    assert any(operators.startswith("conv2d") and operators.endswith("channels_last") for operators in calls)
    x = np.random.default_rng(1).standard_normal((1, 32, 6, 6), dtype=np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    (result,) = compile_in_memory(model, CompileOptions(find_target("host")))({"x": x}).values()
    # Sums of at most 64 products after one another.
    np.testing.assert_allclose(result, np.asarray(expected), rtol=1e-4, atol=64 * float(np.finfo("float32").eps))


@pytest.mark.parametrize("result", ["m", "f"])
def test_what_the_function_returns_is_stored(result: str) -> None:
    shape = {"m": "float[1,32,1,1] m", "f": "float[1,32,6,6] f"}[result]
    calls = _calls(_model(_BLOCK.replace("c2", "c").replace("(float[1,10] y)", f"(float[1,10] y, {shape})")))
    producer = {"m": "mean", "f": "down"}[result]
    (operators,) = [operators for operators, nodes in calls if producer in nodes]
    assert operators == {"m": "mean", "f": "matmul"}[result]


def _account(model: onnx.ModelProto) -> list[Site]:
    """Return the sites of merging for a CPU with 8 channels to a block."""
    target = find_target("x86-avx2")
    passes = pipeline.parse(f"{pipeline.DEFAULT},block-channels{{block={target.layouts.channel_block}}}")
    module, _ = pipeline.run(import_model(model).module, passes)
    return list(fuse(module, target).fusion["merge-kernels"])


def test_each_pair_of_kernels_is_merged_or_refused_with_a_reason() -> None:
    account = _account(_model(_BLOCK.replace("c2", "c")))
    merged = [site.nodes for site in account if site.refusal is None]
    assert ("mean", "flat") in merged
    reasons = {site.nodes: site.refusal for site in account if site.refusal is not None}
    assert len(reasons) == 7
    assert reasons["mean", "flat", "logits"].endswith(": the schedule needs two kernels for the two")
    assert reasons["depthwise", "last", "again"].endswith(": another one reads the first one's result")


_PAIRS = {
    "the function returns the first one's result": (
        "p (float[4,8] x, float[8,8] w) => (float[4,8] a, float[4,8] y) { a = MatMul (x, w)  y = Relu (a) }"
    ),
    "the first one reduces nothing, and the second one is not of rows or a reduction of what it reads": (
        "p (float[4,8] x, float[8,8] w) => (float[4,8] y) { a = Exp (x)  y = MatMul (a, w) }"
    ),
    "a size is known only at run time": (
        "p (float[n,8] x, float[8,8] w) => (float[4,n,2] z)"
        "{ a = MatMul (x, w)  s = Constant <value_ints = [-1, 4, 2]> ()  y = Reshape (a, s)"
        "  z = Transpose <perm = [1, 0, 2]> (y) }"
    ),
}


@pytest.mark.parametrize(("reason", "text"), _PAIRS.items(), ids=_PAIRS)
def test_reasons_for_two_kernels(reason: str, text: str) -> None:
    (site, *_) = _account(_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}'))
    assert site.refusal is not None
    assert site.refusal.split(": ", 1)[1] == reason


def test_what_is_fused_before_merging_is_told() -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> p (float[4,8] x, float[8,8] w) => (float[4,8] y)'
    model = _model(f"{text} {{ [product] a = MatMul (x, w)  [active] y = Relu (a) }}")
    fused = fuse(pipeline.run(import_model(model).module, [])[0], find_target("x86-avx2")).fusion
    (site,) = fused["fuse-operators"]
    assert (site.refusal, site.nodes, site.choice) == (None, ("product", "active"), "as matmul_relu")
    assert fused["merge-kernels"] == ()


# Two layers as in a transformer whose norms come first, `s` and `t` being the sums that residuals are added to.
_LAYERS = """
    <ir_version: 8, opset_import: ["" : 18]>
    layers (float[ROWS,32] x, float[32,64] w1, float[64,32] w2, float[32,48] w3, float[32] g, float[32] b, float[48] h)
        => (RESULTS)
    {
        [first] n = LayerNormalization (x, g, b)
        [up] u = MatMul (n, w1)
        [active] a = Relu (u)
        [down] d = MatMul (a, w2)
        [residual] s = Add (d, x)
        [second] m = LayerNormalization (s, g, b)
        [value] v = MatMul (m, w3)
        [bias] i = Add (v, h)
        [again] o = MatMul (s, w3)
        [sum] y = Add (o, i)
    }
"""


def _layers(rows: int, results: str = "float[ROWS,48] y") -> onnx.ModelProto:
    return _model(_LAYERS.replace("RESULTS", results).replace("ROWS", str(rows)))


def test_norms_become_part_of_products() -> None:
    calls = _calls(_layers(40))
    assert [operators for operators, _ in calls] == [
        "layer_norm_matmul_relu",
        "matmul_add_layer_norm",
        "matmul",
        "matmul_add_add",
    ]
    assert calls[1][1] == ("down", "residual", "second")


def test_a_sum_that_others_read_is_returned_beside_its_norm() -> None:
    model = _layers(40, "float[ROWS,48] y, float[ROWS,32] s")
    x = np.random.default_rng(1).standard_normal((40, 32), dtype=np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    results = compile_in_memory(model, CompileOptions(find_target("host")))({"x": x})
    for name, values in zip(("y", "s"), expected, strict=True):
        np.testing.assert_allclose(results[name], np.asarray(values), rtol=1e-4, atol=1e-5)


def test_norms_of_unknown_many_rows_become_part_of_products() -> None:
    text = _LAYERS.replace("RESULTS", "float[n,48] y").replace("ROWS", "n")
    model = _model(text)
    assert [operators for operators, _ in _calls(model)] == [operators for operators, _ in _calls(_layers(40))]
    compiled = compile_in_memory(model, CompileOptions(find_target("host")))
    for rows in (1, 2, 40):
        x = np.random.default_rng(1).standard_normal((rows, 32), dtype=np.float32)
        (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
        np.testing.assert_allclose(compiled({"x": x})["y"], np.asarray(expected), rtol=1e-4, atol=1e-5)


def test_a_norm_of_one_row_keeps_its_kernel() -> None:
    reasons = {site.nodes: site.refusal for site in _account(_layers(1))}
    assert reasons["down", "residual", "second"] == (
        "matmul_add -> layer_norm: there is one row alone: while a thread normalizes it, the others would wait"
    )
