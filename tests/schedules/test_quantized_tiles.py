"""Products of many rows with quantized weights in tile registers equal exact ones as closely as bf16 explains."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

import targets
from optimizer.lowering import build, lower
from passes.quantization.methods import quantize
from passes.quantization.scheme import QuantizedMatrix, Scheme
from passes.quantized_weights import WeightUse, product_with
from schedules.quantized_tiles import FEWEST_ROWS
from targets.host import missing_features

AMX = targets.get("x86-avx512-amx")
HERE = pytest.mark.skipif(bool(missing_features(AMX)), reason="this machine has no AMX")
SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


def products(
    shape: tuple[int | tirx.Expr, ...], matrices: list[QuantizedMatrix], bits: int, *, target: targets.Target = AMX
) -> tvm.IRModule:
    """The product of x with a matrix, plus x[..., :1]; with two matrices sigmoid(x @ V) * (x @ W)."""
    use = WeightUse.of(target.name, "int8", bits)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            made = [builder.emit(product_with(builder, x, matrix, use, "float32")) for matrix in matrices]
            if len(made) == 2:
                y = relax.op.multiply(builder.emit(relax.op.sigmoid(made[0])), made[1])
            else:
                y = relax.op.add(made[0], relax.op.strided_slice(x, [len(shape) - 1], [0], [1]))
            output = builder.emit_output(builder.emit(y))
        builder.emit_func_output(output)
    return relax.transform.DeadCodeElimination()(relax.transform.EliminateCommonSubexpr()(builder.get()))


def rounded(x: np.ndarray) -> np.ndarray:
    """X rounded to int8 in groups of 32, in float64."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / largest))
    return (codes * (largest / np.float32(127)).astype(np.float64)).reshape(x.shape)


def check(x: np.ndarray, matrix: QuantizedMatrix, actual: np.ndarray) -> None:
    """Compare with exact sums: each term has two factors rounded to bf16, and one code may be a tie."""
    activations, weights = rounded(x), matrix.dequantized().astype(np.float64)
    wanted = activations @ weights.T + x[..., :1]
    terms = np.abs(activations) @ np.abs(weights).T
    tie = np.abs(x).max() / 127 * np.abs(weights).max()
    assert (np.abs(actual - wanted) <= 2.0**-7 * terms + tie).all()
    # Roundings to either side cancel.
    spread = np.sqrt(np.square(activations) @ np.square(weights).T)
    assert np.sqrt(np.square((actual - wanted) / spread).mean()) <= 2.0**-8


@HERE
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(SCHEMES, st.integers(FEWEST_ROWS, 100), st.integers(1, 150), st.integers(1, 7), st.booleans())
def test_many_rows_equal_exact_sums(scheme: Scheme, rows: int, outputs: int, groups: int, symbolic: bool) -> None:
    rng = np.random.default_rng(0)
    matrix = quantize(rng.standard_normal((outputs, 64 * groups)).astype(np.float32), scheme)
    shape = (tirx.Var("batch", "int64"), tirx.Var("sequence", "int64")) if symbolic else (rows,)
    lowered = lower(products((*shape, 64 * groups), [matrix], scheme.bits), AMX)
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    for leading in [(1, rows), (3, rows), (1, 33), (1, 16), (1, 15), (1, 1), (1, 0)] if symbolic else [(rows,)]:
        x = rng.standard_normal((*leading, 64 * groups)).astype(np.float32)
        actual = machine["main"](tvm.runtime.tensor(x)).numpy()
        if x.size:
            check(x, matrix, actual)


@HERE
@pytest.mark.parametrize("outputs", [37, 64, 200])
def test_gates_of_many_rows_equal_exact_ones(outputs: int) -> None:
    rng = np.random.default_rng(1)
    matrices = [quantize(rng.standard_normal((outputs, 96)).astype(np.float32), Scheme()) for _ in range(2)]
    shape = (tirx.Var("batch", "int64"), tirx.Var("sequence", "int64"), 96)
    lowered = lower(products(shape, matrices, 4), AMX)
    assert "gated-product" in [kernel.family for kernel in lowered.kernels]
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    for leading in [(1, 1), (2, 5), (1, 16), (2, 33), (1, 65)]:
        x = rng.standard_normal((*leading, 96)).astype(np.float32)
        actual = machine["main"](tvm.runtime.tensor(x)).numpy()
        gate, value = (rounded(x) @ matrix.dequantized().T.astype(np.float64) for matrix in matrices)
        terms = np.abs(rounded(x)) @ np.abs(matrices[1].dequantized().T)
        other = np.abs(rounded(x)) @ np.abs(matrices[0].dequantized().T)
        # The sigmoid's slope is at most a quarter.
        limit = 2.0**-7 * (terms + np.abs(value) * other / 4) + 0.3
        assert (np.abs(actual - value / (1 + np.exp(-gate))) <= limit).all()


@pytest.mark.parametrize("name", ["x86-avx512-amx", "x86-avx512-bf16"])
def test_tiles_are_used_where_there_are_any(name: str) -> None:
    target = targets.get(name)
    matrix = quantize(np.ones((64, 64), np.float32), Scheme())
    lowered = lower(products((tirx.Var("rows", "int64"), 64), [matrix], 4, target=target), target)
    code = "\n".join(str(function) for _, function in lowered.module.functions_items())
    assert ("optimizer_tiles_step_tdpbf16ps" in code) == (name == AMX.name)
