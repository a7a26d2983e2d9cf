"""Products with quantized weights equal exact arithmetic on the same integers, for every scheme, shape and target."""

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
from passes.quantization.scheme import PER_CHANNEL, QuantizedMatrix, Scheme
from passes.quantized_weights import WeightUse, product_with, rows_of
from targets.base import Target
from targets.execution import how_executed
from tests.schedules.execution import assembly_of

NATIVE = [name for name in targets.names() if how_executed(targets.get(name)) == "native"]
PANELLED = [name for name in ("x86-avx2", "x86-avx2-vnni") if name in NATIVE]
SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([PER_CHANNEL, 16, 32, 64]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


def product_module(
    shape: tuple[int | tirx.Expr, ...], matrix: QuantizedMatrix, use: WeightUse, *, residual: bool = False
) -> tvm.IRModule:
    """A product of x with a quantized matrix; with a residual: y = x @ W + bias + x[..., :1]."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(product_with(builder, x, matrix, use, "float32"))
            if residual:
                bias = np.arange(matrix.rows, dtype=np.float32)
                y = builder.emit(relax.op.add(y, relax.const(bias)))
                first = builder.emit(relax.op.strided_slice(x, [len(shape) - 1], [0], [1]))
                y = builder.emit(relax.op.add(y, first))
            output = builder.emit_output(y)
        builder.emit_func_output(output)
    return builder.get()


def run(module: tvm.IRModule, target: Target, x: np.ndarray) -> tuple[np.ndarray, list[str]]:
    lowered = lower(module, target)
    machine = relax.VirtualMachine(build(lowered.module, target), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy(), [kernel.family for kernel in lowered.kernels]


def expected(x: np.ndarray, matrix: QuantizedMatrix) -> np.ndarray:
    """The product with x rounded to int8 in groups, in float64."""
    group = 32 if matrix.group % 32 == 0 else 16
    depth = matrix.codes.shape[1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, depth - x.shape[-1])]).reshape(
        *x.shape[:-1], depth // group, group
    )
    largest = np.abs(padded).max(-1, keepdims=True)
    inverses = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), 0)
    rounded = np.rint(padded * inverses) * (largest / np.float32(127)).astype(np.float64)
    return rounded.reshape(*x.shape[:-1], depth)[..., : x.shape[-1]] @ matrix.dequantized().T.astype(np.float64)


# Every example is a compile: shrinking would take minutes.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(SCHEMES, st.sampled_from(NATIVE), st.integers(1, 9), st.integers(2, 70), st.integers(1, 150), st.booleans())
def test_products_equal_exact_sums(
    scheme: Scheme, name: str, rows: int, outputs: int, inputs: int, residual: bool
) -> None:
    rng = np.random.default_rng(0)
    matrix = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), scheme)
    use = WeightUse.of(name, "int8", scheme.bits)
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    actual, families = run(product_module(x.shape, matrix, use, residual=residual), use.target, x)
    wanted = expected(x, matrix)
    if residual:
        wanted = wanted + np.arange(outputs) + x[:, :1]
    assert "quantized-matmul" in families
    # Groups of exact integers, each scaled and added in fp32; a tie of the rounding may fall to either side.
    largest = np.abs(wanted).max() + np.abs(x).max() * np.abs(matrix.dequantized()).max() / 127
    assert np.abs(actual - wanted).max() <= 2.0**-23 * (8 + inputs / 16) * largest + _tie(x, matrix)


def _tie(x: np.ndarray, matrix: QuantizedMatrix) -> float:
    """What one activation rounded to its other neighbour changes."""
    ratio = np.abs(x) / np.maximum(np.abs(x).max(), 1e-30) * 127
    near_tie = (np.abs(ratio - np.floor(ratio) - 0.5) < 1e-5).any()
    return float(near_tie) * np.abs(x).max() / 127 * np.abs(matrix.dequantized()).max()


@pytest.mark.skipif(not PANELLED, reason="tiles that read panels are for AVX2")
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(SCHEMES, st.sampled_from(PANELLED), st.integers(16, 300), st.integers(2, 150), st.integers(1, 1300))
def test_many_rows_equal_exact_sums_part_by_part(
    scheme: Scheme, name: str, rows: int, outputs: int, inputs: int
) -> None:
    rng = np.random.default_rng(5)
    matrix = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), scheme)
    use = WeightUse.of(name, "int8", scheme.bits)
    module = product_module((tirx.Var("rows", "int64"), inputs), matrix, use, residual=True)
    lowered = lower(module, use.target)
    machine = relax.VirtualMachine(build(lowered.module, use.target), tvm.cpu())
    for count in (rows, 15, 16, 129):
        x = rng.standard_normal((count, inputs)).astype(np.float32)
        actual = machine["main"](tvm.runtime.tensor(x)).numpy()
        product = expected(x, matrix)
        # One activation in some thousands is a tie of its rounding.
        bound = np.abs(product).max() + np.abs(x).max() * np.abs(matrix.dequantized()).max() / 127
        wanted = product + np.arange(outputs) + x[:, :1]
        exact = 2.0**-23 * (8 + inputs / 16) * (bound + outputs)
        assert np.abs(actual - wanted).max() <= exact + _tie(x, matrix)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(bits=8, group=64, symmetric=False)], ids=str)
def test_symbolic_rows_share_one_kernel(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    matrix = quantize(rng.standard_normal((48, 96)).astype(np.float32), scheme)
    # Integers alone are this exact: tile registers have tests of their own.
    name = "x86-avx512" if "x86-avx512" in NATIVE else "host"
    use = WeightUse.of(name, "int8", scheme.bits)
    module = product_module((tirx.Var("batch", "int64"), tirx.Var("sequence", "int64"), 96), matrix, use)
    lowered = lower(module, use.target)
    machine = relax.VirtualMachine(build(lowered.module, use.target), tvm.cpu())
    for batch, sequence in [(1, 1), (2, 1), (1, 5), (3, 7), (2, 70), (1, 0)]:
        x = rng.standard_normal((batch, sequence, 96)).astype(np.float32)
        actual = machine["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(actual, expected(x, matrix), rtol=1e-4, atol=2e-2)


def test_a_batch_of_one_is_no_operand_of_weights() -> None:
    rng = np.random.default_rng(4)
    matrix = quantize(rng.standard_normal((48, 96)).astype(np.float32), Scheme())
    use = WeightUse.of("host", "int8", 4)
    x = rng.standard_normal((1, 3, 96)).astype(np.float32)
    actual, families = run(product_module((1, tirx.Var("sequence", "int64"), 96), matrix, use), use.target, x)
    assert "quantized-matmul" in families
    np.testing.assert_allclose(actual, expected(x, matrix), rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_gathered_rows_are_the_dequantized_ones(bits: int) -> None:
    matrix = quantize(np.random.default_rng(2).standard_normal((37, 64)).astype(np.float32), Scheme(bits=bits))
    use = WeightUse.of("host", "int8", bits)
    builder = relax.BlockBuilder()
    indices = relax.Var("indices", relax.TensorType((2, 5), "int64"))
    with builder.function("main", [indices]):
        with builder.dataflow():
            output = builder.emit_output(rows_of(builder, indices, matrix, use, "float32"))
        builder.emit_func_output(output)
    given_indices = np.array([[0, 36, 3, -1, -37], [5, 5, 99, 1, 2]])
    actual, _ = run(builder.get(), use.target, given_indices)
    # Negative indices count from the end, one outside takes the nearest row.
    at = np.clip(np.where(given_indices < 0, given_indices + 37, given_indices), 0, 36)
    np.testing.assert_array_equal(actual, matrix.dequantized()[at])


def test_a_product_in_floats_uses_the_weights_as_they_are() -> None:
    rng = np.random.default_rng(3)
    matrix = quantize(rng.standard_normal((20, 64)).astype(np.float32), Scheme(symmetric=False))
    x = rng.standard_normal((3, 64)).astype(np.float32)
    use = WeightUse.of("host", "float", 4)
    actual, _ = run(product_module(x.shape, matrix, use), use.target, x)
    np.testing.assert_allclose(actual, x @ matrix.dequantized().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("centered", [False, True])
def test_the_largest_codes_and_activations_do_not_saturate(name: str, bits: int, centered: bool) -> None:
    # Each pair and each sum of a group is as large as it can be, of either sign, where zero points are zero; where they
    # are the middle of the codes, so is each sum less its part of that.
    largest = (1 << bits) - 1
    codes = np.zeros((24, 64), np.uint8)
    codes[::3] = largest
    codes[1::3, ::2] = largest
    zeros = None if centered else np.zeros((24, 2), np.uint8)
    matrix = QuantizedMatrix(bits, 32, 64, codes, np.ones((24, 2), np.float32), zeros)
    signs = np.where(np.arange(64) % 2 == 0, 1, -1)
    x = np.resize([np.ones(64), -np.ones(64), signs, -signs, np.ones(64)], (17, 64)).astype(np.float32)
    use = WeightUse.of(name, "int8", bits)
    for rows in (1, 2, 5, 17):
        actual, families = run(product_module((rows, 64), matrix, use), use.target, x[:rows])
        assert "quantized-matmul" in families
        np.testing.assert_allclose(actual, expected(x[:rows], matrix), rtol=2**-21, atol=2**-18 * largest)


@pytest.mark.parametrize(("name", "hint"), [("x86-avx512", "prefetcht0"), ("x86-avx512-amx", "prefetcht1")])
def test_one_row_asks_for_weights_into_the_cache_that_the_target_says(name: str, hint: str) -> None:
    matrix = quantize(np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32), Scheme(4, 32))
    use = WeightUse.of(name, "int8", 4)
    module = build(lower(product_module((1, 128), matrix, use), use.target).module, use.target)
    assembly = assembly_of(module)
    assert {word for word in assembly.split() if word.startswith("prefetch")} == {hint}
