from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from optimizer.lowering import build, lower
from optimizer.weights import lift_weights
from passes import pipeline
from passes.quantization.methods import quantize
from passes.quantization.scheme import Scheme, SchemeError
from passes.quantize_weights import QuantizeWeights
from passes.quantized_weights import WeightUse
from tests.passes.relax_modules import operators

HIDDEN, VOCABULARY = 64, 96
TARGET = WeightUse.of("host", "auto", 4).target


def _language_model(*, tied: bool = True, dtype: str = "float32") -> tvm.IRModule:
    """Embedding, one product with a residual, a head that is the embedding's transpose, and a table of angles."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCABULARY, HIDDEN)).astype(dtype)
    head = table.T if tied else rng.standard_normal((HIDDEN, VOCABULARY)).astype(dtype)
    inner = rng.standard_normal((HIDDEN, HIDDEN)).astype(dtype)
    angles = rng.standard_normal((256, 20)).astype(dtype)
    builder = relax.BlockBuilder()
    tokens = relax.Var("tokens", relax.TensorType((1, 3), "int64"))
    with builder.function("main", [tokens]):
        with builder.dataflow():
            x = builder.emit(relax.op.take(relax.const(table), tokens, axis=0))
            y = builder.emit(relax.op.add(x, builder.emit(relax.op.matmul(x, relax.const(inner)))))
            logits = builder.emit(relax.op.matmul(y, relax.const(np.ascontiguousarray(head))))
            turned = builder.emit(relax.op.take(relax.const(angles), tokens, axis=0))
            output = builder.emit_output(relax.Tuple([logits, turned]))
        builder.emit_func_output(output)
    return builder.get()


def _run(module: tvm.IRModule) -> tuple[np.ndarray, int]:
    lifted = lift_weights(lower(module, TARGET).module)
    machine = relax.VirtualMachine(build(lifted.module, TARGET), tvm.cpu())
    tokens = tvm.runtime.tensor(np.array([[5, 0, 95]]))
    return machine["main"](tokens, tuple(lifted.weights))[0].numpy(), lifted.weight_bytes


def test_embedding_products_and_head_are_quantized_and_a_tied_table_stored_once() -> None:
    module = _language_model()
    outcome = QuantizeWeights(target=TARGET.name).run(module)
    assert outcome.rewritten == 3
    exact, before = _run(module)
    actual, after = _run(outcome.module)
    reference, _ = _run(QuantizeWeights(target=TARGET.name, activations="reference").run(module).module)
    angles = 256 * 20 * 4
    # Scales this few stay in the code.
    assert after - angles == (VOCABULARY + HIDDEN) * HIDDEN // 2
    assert before > after
    # int8 activations are exact to half a step of 127; two products in a row.
    scale = np.abs(reference).max()
    assert np.abs(actual - reference).max() < 2 / 127 * scale
    assert np.abs(reference - exact).max() < 0.3 * np.abs(exact).max()


def test_a_table_whose_rows_no_product_reads_stays_exact() -> None:
    outcome = QuantizeWeights(target=TARGET.name).run(_language_model())
    assert [site.refusal for site in outcome.sites if site.refusal] == [
        "rows of 20 elements are the input of no product: not an embedding"
    ]


def test_the_reference_holds_the_rounded_weights_as_floats() -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((HIDDEN, 80)).astype(np.float32)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, HIDDEN), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.matmul(x, relax.const(weights)))
        builder.emit_func_output(output)
    module = QuantizeWeights(group=16, activations="reference").run(builder.get()).module
    assert operators(module) == ["relax.matmul"]
    found: list[np.ndarray] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            found.append(expr.value.numpy())

    relax.analysis.post_order_visit(module["main"], visit)
    np.testing.assert_array_equal(found[0], quantize(weights.T, Scheme(group=16)).dequantized().T)


def test_small_and_variable_matrices_are_left() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 8), "float32"))
    y = relax.Var("y", relax.TensorType((8, 512), "float32"))
    with builder.function("main", [x, y]):
        with builder.dataflow():
            small = builder.emit(relax.op.matmul(x, relax.const(np.ones((8, 8), np.float32))))
            output = builder.emit_output(relax.op.matmul(small, y))
        builder.emit_func_output(output)
    outcome = QuantizeWeights().run(builder.get())
    assert [site.refusal for site in outcome.sites] == ["a matrix of 64 elements is smaller than 1024"]
    assert operators(outcome.module) == ["relax.matmul", "relax.matmul"]


def test_options_that_make_no_scheme_are_refused() -> None:
    with pytest.raises(SchemeError, match="groups of 5"):
        QuantizeWeights(group=5)
    with pytest.raises(SchemeError, match="cuda has no int8 products"):
        QuantizeWeights(target="cuda", activations="int8")
    assert pipeline.instance("quantize-weights", {"bits": 8, "symmetric": False}) == QuantizeWeights(8, symmetric=False)
