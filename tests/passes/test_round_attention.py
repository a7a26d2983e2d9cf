from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

import targets
from passes.base import PassOutcome
from passes.fuse_attention import FuseAttention
from passes.quantization.scheme import QuantizedMatrix
from passes.quantized_weights import WeightUse, product_with
from passes.round_attention import RoundAttention
from tests.schedules.execution import module_of

BF16 = "x86-avx512-bf16"


def attention(queries: int | str, keys: int, depth: int = 16, columns: int = 16) -> tvm.IRModule:
    def function(q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
        return op.matmul(op.nn.softmax(op.matmul(q, op.permute_dims(k, [0, 2, 1])), axis=-1), v)

    shapes = [(3, queries, depth), (3, keys, depth), (3, keys, columns)]
    return FuseAttention().run(module_of(function, shapes, ["float32"] * 3)).module


def rounded(module: tvm.IRModule, target: str = BF16) -> PassOutcome:
    outcome = RoundAttention(target).run(module)
    relax.analysis.well_formed(outcome.module)
    return outcome


def test_operands_of_both_products_are_rounded() -> None:
    outcome = rounded(attention(32, 20))
    assert outcome.rewritten == 1
    assert str(outcome.module).count('T.Cast("bfloat16"') + str(outcome.module).count("T.bfloat16(") == 4


@pytest.mark.parametrize(
    ("module", "target", "reason"),
    [
        (attention(32, 20), "x86-avx512", "the target has no dot product of bfloat16"),
        (attention(7, 20), BF16, "reading the keys of so few queries takes the time"),
        (attention(32, 20, depth=15), BF16, "the products' terms do not come in pairs"),
    ],
)
def test_what_gains_nothing_is_refused(module: tvm.IRModule, target: str, reason: str) -> None:
    outcome = rounded(module, target)
    assert [site.refusal for site in outcome.sites] == [reason]
    tvm.ir.assert_structural_equal(outcome.module, module)


def test_a_number_of_queries_that_is_not_known_is_no_reason_to_refuse() -> None:
    assert rounded(attention("s", 20)).rewritten == 1


def test_attention_is_rounded_once() -> None:
    again = rounded(rounded(attention(32, 20)).module)
    assert [site.refusal for site in again.sites] == ["the operands are rounded already"]


def _beside_quantized(activations: str) -> tvm.IRModule:
    """Return attention beside a product with quantized weights, of rows in int8 or in floats."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (32, 32), np.uint8), rng.random((32, 1), np.float32)
    matrix = QuantizedMatrix(4, 32, 32, codes, scales, None)
    builder = relax.BlockBuilder(attention(32, 20))
    x = relax.Var("x", relax.TensorType((16, 32), "float32"))
    with builder.function("product", [x]):
        value = product_with(builder, x, matrix, WeightUse(targets.get("x86-avx512"), activations), "float32")
        builder.emit_func_output(builder.emit(value))
    return builder.get()


@pytest.mark.parametrize(("activations", "count"), [("int8", 1), ("float", 0)])
def test_it_may_be_left_to_models_that_round_the_rows_of_quantized_products(activations: str, count: int) -> None:
    beside = RoundAttention(BF16, with_quantized=True)
    assert beside.run(_beside_quantized(activations)).rewritten == count
    assert beside.run(attention(32, 20)).sites == ()


def test_other_functions_are_left_alone() -> None:
    module = relax.transform.LegalizeOps()(module_of(op.nn.softmax, [(4, 5)], ["float32"]))
    assert rounded(module).sites == ()
