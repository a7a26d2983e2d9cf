from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax
from tvm.relax import op

import targets
from optimizer.compile import CompileOptions
from optimizer.frontend.importer import import_model
from passes import pipeline
from passes.base import PassOutcome
from passes.convert_precision import ConvertPrecision
from passes.fuse_attention import FuseAttention
from passes.narrow_attention import NarrowAttention
from passes.round_attention import RoundAttention
from schedules import attention_pairs
from tests.schedules.execution import TARGET, lower, module_of, normal, scheduled

BF16 = "x86-avx512-bf16"
HEADS, SIZE = 2, 16
DECODER = Path(__file__).parents[2] / "examples" / "decoder" / "model.onnx"


def heads(x: relax.Expr, length: int, size: int) -> relax.Expr:
    return op.permute_dims(op.reshape(x, [3, length, HEADS, size]), [0, 2, 1, 3])


def encoder(length: int, size: int = SIZE, *, narrow_end: bool = True, shared: bool = False) -> tvm.IRModule:
    """Attention whose result the next product reads as bfloat16, or nobody, with values that others read or not."""
    width = HEADS * size

    def function(q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
        queries, keys, values = (op.nn.relu(x) for x in (q, k, v))
        scores = op.matmul(heads(queries, length, size), op.permute_dims(heads(keys, length, size), [0, 1, 3, 2]))
        weighted = op.matmul(op.nn.softmax(scores), heads(values, length, size))
        result = op.reshape(op.permute_dims(weighted, [0, 2, 1, 3]), [3, length, width])
        if narrow_end:
            result = op.matmul(result, relax.const(normal(width, width, seed=3)))
        return op.add(result, values) if shared else result

    module = module_of(function, [(3, length, width)] * 3, ["float32"] * 3)
    for each in (FuseAttention(), ConvertPrecision("bfloat16"), RoundAttention(BF16)):
        module = each.run(module).module
    return module


def narrowed(module: tvm.IRModule) -> PassOutcome:
    outcome = NarrowAttention().run(module)
    relax.analysis.well_formed(outcome.module)
    return outcome


def attention_call(module: tvm.IRModule) -> tvm.ir.Call:
    calls: list[tvm.ir.Call] = []
    relax.analysis.post_order_visit(module["main"], lambda e: calls.append(e) if isinstance(e, tvm.ir.Call) else None)
    return next(call for call in calls if call.op == tvm.ir.Op.get("relax.call_tir"))


def dtypes(call: tvm.ir.Call) -> list[str]:
    """Return the types of values, queries, keys, and result."""
    return [str(each.ty.dtype.dtype) for each in (*call.args[1].fields, call)]


@pytest.mark.parametrize(
    ("module", "want"),
    [
        (encoder(32), ["bfloat16"] * 4),
        (encoder(32, narrow_end=False), [*["bfloat16"] * 3, "float32"]),
        (encoder(32, shared=True), ["float32", *["bfloat16"] * 3]),
    ],
)
def test_what_is_only_rounded_is_stored_rounded(module: tvm.IRModule, want: list[str]) -> None:
    outcome = narrowed(module)
    assert outcome.rewritten == 1
    assert dtypes(attention_call(outcome.module)) == want


def test_tensors_of_the_caller_keep_their_type() -> None:
    def function(q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
        return op.matmul(op.nn.softmax(op.matmul(q, op.permute_dims(k, [0, 2, 1]))), v)

    module = FuseAttention().run(module_of(function, [(3, 32, SIZE)] * 3, ["float32"] * 3)).module
    outcome = narrowed(RoundAttention(BF16).run(module).module)
    assert [site.refusal for site in outcome.sites] == ["others read its operands and its result in fp32"]


def test_attention_in_fp32_is_left_alone() -> None:
    module = FuseAttention().run(module_of(lambda q, k, v: op.matmul(op.nn.softmax(op.matmul(q, k)), v),
                                           [(3, 32, 32)] * 3, ["float32"] * 3)).module  # fmt: skip
    assert narrowed(module).sites == ()


@pytest.mark.skipif("avx512_bf16" not in TARGET.features, reason="the target has no dot product of bfloat16")
@pytest.mark.parametrize(("length", "size"), [(19, SIZE), (150, 32), (41, 64)])
def test_numbers_stay_the_same(length: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_pairs, "HEADS_TO_OWN", 1 if size > SIZE else 100)
    module, inputs = encoder(length, size), [normal(3, length, HEADS * size, seed=seed) for seed in range(3)]
    before, _ = scheduled(lower(module))
    after, _ = scheduled(lower(narrowed(module).module))
    np.testing.assert_array_equal(after(*inputs), before(*inputs))


@pytest.mark.parametrize("target", ["x86-avx512-bf16", "arm64-i8mm"])
def test_attention_that_reads_the_size_of_a_cache_is_narrowed_without_its_result(target: str) -> None:
    options = CompileOptions(targets.get(target), precision="bf16")
    _, records = pipeline.run(import_model(onnx.load(DECODER)).module, pipeline.parse(options.notation))
    (sites,) = (each.outcome.sites for each in records if each.item.name == NarrowAttention.name)
    assert [site.refusal for site in sites] == [None] * 3
