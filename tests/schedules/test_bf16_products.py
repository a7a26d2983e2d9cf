"""Products of bfloat16 by dot products of pairs, where the target has them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import build, fuse, lower
from schedules.intrin.bf16_dot import bf16_dot
from tests.schedules.execution import TARGET, assembly_of, module_of, normal, sum_tolerance

HAS_DOT = bf16_dot(TARGET) is not None


def layer(weights: np.ndarray, x: relax.Var) -> relax.Expr:
    product = op.matmul(op.astype(x, "bfloat16"), relax.const(weights, "bfloat16"), out_dtype="float32")
    return op.add(product, relax.const(np.ones(weights.shape[1], np.float32)))


def weights_of(depth: int, columns: int) -> np.ndarray:
    return normal(depth, columns).astype(ml_dtypes.bfloat16)


@pytest.mark.skipif(not HAS_DOT, reason="the machine has no bf16 dot product")
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 40, 8), (8, 64, 32), (13, 51, 34), (70, 33, 1), (9, 1, 67)])
def test_sums_of_pairs_are_those_of_rounded_operands(rows: int, columns: int, depth: int) -> None:
    weights, x = weights_of(depth, columns), normal(rows, depth, seed=1)
    want = x.astype(ml_dtypes.bfloat16).astype("float64") @ weights.astype("float64") + 1
    for shape in ((rows, depth), ("m", depth)):
        lowered = lower(module_of(lambda v: layer(weights, v), [shape], ["float32"]), TARGET)
        machine = relax.VirtualMachine(build(lowered.module, TARGET), tvm.cpu())
        got = machine["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(depth, 1.0))


@pytest.mark.parametrize(("target", "instruction"), [("x86-avx512-bf16", "vdpbf16ps"), ("arm64-i8mm", "bfdot")])
def test_code_has_the_instruction_and_no_call(target: str, instruction: str) -> None:
    chosen = targets.get(target)
    lowered = lower(module_of(lambda v: layer(weights_of(32, 64), v), [(16, 32)], ["float32"]), chosen)
    assembly = assembly_of(build(lowered.module, chosen))
    assert instruction in assembly
    assert "call\toptimizer_dot_bf16" not in assembly.replace("callq", "call")
    assert "bl\toptimizer_dot_bf16" not in assembly


@pytest.mark.parametrize(
    ("target", "depth", "packed"), [("x86-avx512", 32, (2, 32, 32)), ("x86-avx512-bf16", 33, (2, 17, 32, 2))]
)
def test_weights_lie_in_pairs_for_the_instruction_and_single_without(
    target: str, depth: int, packed: tuple[int, ...]
) -> None:
    fused = fuse(module_of(lambda v: layer(weights_of(depth, 64), v), [(16, depth)], ["float32"]), targets.get(target))
    shapes = [
        tuple(map(int, parameter.shape))
        for _, function in fused.module.functions_items()
        if isinstance(function, tvm.tirx.PrimFunc)
        for parameter in function.params
    ]
    assert packed in shapes


@pytest.mark.skipif(not HAS_DOT, reason="the machine has no bf16 dot product")
def test_activation_stored_as_bf16_is_rounded_once() -> None:
    weights, x = weights_of(32, 48), normal(9, 32, seed=1)

    def activated(v: relax.Var) -> relax.Expr:
        return op.astype(op.astype(op.tanh(layer(weights, v)), "bfloat16"), "float32")

    lowered = lower(module_of(activated, [(9, 32)], ["float32"]), TARGET)
    machine = relax.VirtualMachine(build(lowered.module, TARGET), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    want = np.tanh(x.astype(ml_dtypes.bfloat16).astype("float64") @ weights.astype("float64") + 1)
    np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=1e-5)


@pytest.mark.skipif(not HAS_DOT, reason="the machine has no bf16 dot product")
def test_threads_that_own_rows_have_the_instruction() -> None:
    rows = 128 * TARGET.cores
    weights, x = weights_of(64, 64), normal(rows, 64, seed=1)
    scale, shift = (relax.const(np.full(64, value, np.float32)) for value in (1, 0))

    def normalized(v: relax.Var) -> relax.Expr:
        return op.nn.layer_norm(layer(weights, v), scale, shift, axes=[-1], epsilon=1e-5)

    lowered = lower(module_of(normalized, [(rows, 64)], ["float32"]), TARGET)
    assert "normalized-product" in [kernel.family for kernel in lowered.kernels]
    machine = relax.VirtualMachine(build(lowered.module, TARGET), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    sums = x.astype(ml_dtypes.bfloat16).astype("float64") @ weights.astype("float64") + 1
    want = (sums - sums.mean(-1, keepdims=True)) / np.sqrt(sums.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_DOT, reason="the machine has no bf16 dot product")
@pytest.mark.parametrize("rows", [40, 256 * TARGET.cores], ids=["shared", "owned"])
def test_normalized_rows_are_rounded_for_the_instruction_that_reads_them(rows: int) -> None:
    weights, x = weights_of(64, 96), normal(rows, 64, seed=1)

    def normalized(v: relax.Var) -> relax.Expr:
        scale, shift = (relax.const(np.full(64, value, "float32")) for value in (1, 0))
        return layer(weights, op.nn.layer_norm(v, scale, shift, axes=[-1]))

    lowered = lower(module_of(normalized, [(rows, 64)], ["float32"]), TARGET)
    assert [kernel.family for kernel in lowered.kernels] == ["normalized-product"]
    machine = relax.VirtualMachine(build(lowered.module, TARGET), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    wide = x.astype("float64")
    norm = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    # A norm in fp32 may round to another bfloat16 than one in float64 where it lies halfway between two.
    np.testing.assert_allclose(got, norm @ weights.astype("float64") + 1, atol=64**0.5 * 6 * 2.0**-8)
