"""Two products of which the second one multiplies what the first one makes are one kernel where a cache holds them."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import LoweredModule, build, lower
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import assembly_of, module_of, normal

AMX = targets.get("x86-avx512-amx")
HERE = pytest.mark.skipif(bool(missing_features(AMX)), reason="the machine has no AMX")
_EPSILON = 1e-5
# The digits that a sum of rounded products has right; a gelu is no steeper than that.
_UNITS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
_STEEPEST = 1.13
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _weights(depth: int, width: int, columns: int, dtype: str) -> list[np.ndarray]:
    """Return the matrices of both products, [depth, width] and [width, columns], and the first one's bias."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    first, second = normal(depth, width) / math.sqrt(depth), normal(width, columns, seed=1) / math.sqrt(width)
    return [first.astype(kind), second.astype(kind), normal(width, seed=2)]


def _norm(x: relax.Expr, columns: int) -> relax.Expr:
    scale, shift = (relax.const(np.full(columns, value, "float32")) for value in (1.5, 0.25))
    return op.nn.layer_norm(x, scale, shift, axes=[-1], epsilon=_EPSILON)


def _normalized(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + _EPSILON) * 1.5 + 0.25


def _lowered(
    weights: list[np.ndarray], shape: tuple[int | str, ...], norms: tuple[bool, bool], target: Target = AMX
) -> LoweredModule:
    """Return the code of x + gelu(norm(x) @ first + bias) @ second, normalized, with norms where `norms` say."""
    first, second, bias = weights
    dtype = str(first.dtype)

    def product(x: relax.Expr, matrix: np.ndarray) -> relax.Expr:
        operand = x if dtype == "float32" else op.astype(x, dtype)
        return op.matmul(operand, relax.const(matrix, dtype), out_dtype="float32")

    def chain(x: relax.Expr, residual: relax.Expr) -> relax.Expr:
        y = _norm(x, first.shape[0]) if norms[0] else x
        hidden = op.nn.gelu(op.add(product(y, first), relax.const(bias)))
        result = op.add(product(hidden, second), residual)
        return _norm(result, second.shape[1]) if norms[1] else result

    shapes = [shape, (*shape[:-1], second.shape[1])]
    return lower(module_of(chain, shapes, ["float32", "float32"]), target)


def _reference(
    weights: list[np.ndarray], x: np.ndarray, residual: np.ndarray, norms: tuple[bool, bool]
) -> tuple[np.ndarray, float]:
    """Return the result in fp64, and how far off rounded operands and sums may make any element of it."""
    first, second, bias = (each.astype("float64") for each in weights)
    y = _normalized(x.astype("float64")) if norms[0] else x.astype("float64")
    total = y @ first + bias
    hidden = total * 0.5 * (1 + _erf(total / math.sqrt(2)))
    result = hidden @ second + residual
    terms = 1 if str(weights[0].dtype) == "bfloat16" else sum(first.shape)
    before = _STEEPEST * (np.abs(y) @ np.abs(first) + np.abs(bias))
    bound = float(((before + np.abs(hidden)) @ np.abs(second) + np.abs(residual)).max())
    bound *= 2 * terms * _UNITS[str(weights[0].dtype)]
    if not norms[1]:
        return result, bound
    return _normalized(result), 4 * bound / float(result.std(-1).min())


@HERE
@given(
    rows=st.one_of(st.integers(1024, 1100), st.sampled_from([(2, 521), (3, 7, 61), (1, 1531), (1031, 1)])),
    sizes=st.tuples(
        st.sampled_from([32, 33, 64, 97]), st.sampled_from([64, 131, 256]), st.sampled_from([9, 17, 32, 97])
    ),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    norms=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_chains_are_right(
    rows: int | tuple[int, ...], sizes: tuple[int, int, int], dtype: str, norms: tuple[bool, bool]
) -> None:
    leading = (rows,) if isinstance(rows, int) else rows
    weights = _weights(*sizes, dtype)
    x, residual = normal(*leading, sizes[0], seed=3), normal(*leading, sizes[2], seed=4)
    lowered = _lowered(weights, x.shape, norms)
    assert "product-chain" in {kernel.family for kernel in lowered.kernels}
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    got = machine["main"](*map(tvm.runtime.tensor, (x, residual))).numpy()
    want, bound = _reference(weights, x, residual, norms)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@HERE
def test_what_is_no_number_stays_in_its_row() -> None:
    weights = _weights(64, 128, 32, "bfloat16")
    x, residual = normal(1024, 64), np.zeros((1024, 32), "float32")
    x[3, 7], x[700, 1] = np.nan, np.inf
    machine = relax.VirtualMachine(build(_lowered(weights, x.shape, (True, False)).module, AMX), tvm.cpu())
    got = machine["main"](*map(tvm.runtime.tensor, (x, residual))).numpy()
    assert set(np.flatnonzero(np.isnan(got).any(1))) == {3, 700}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norms", [(False, False), (True, False), (True, True)])
def test_a_chain_is_one_kernel(dtype: str, norms: tuple[bool, bool]) -> None:
    lowered = _lowered(_weights(96, 384, 96, dtype), (3136, 96), norms)
    (kernel,) = lowered.kernels
    assert (kernel.family, kernel.regions) == ("product-chain", 1)
    assembly = assembly_of(build(lowered.module, AMX))
    assert "optimizer_store" not in assembly
    if dtype == "bfloat16":
        assert "tdpbf16ps" in assembly
        assert "vcvtne2ps2bf16" in assembly


@pytest.mark.parametrize(
    ("sizes", "rows", "target"),
    [
        ((96, 384, 96), 64, AMX),
        ((96, 384, 96), "rows", AMX),
        ((768, 3072, 768), 4096, AMX),
        ((96, 384, 96), 4096, targets.get("x86-avx512")),
    ],
    ids=["few rows", "rows of unknown number", "more weights than a cache holds", "a target of one multiply-add"],
)
def test_products_stay_apart_where_one_kernel_would_not_pay(
    sizes: tuple[int, int, int], rows: int | str, target: Target
) -> None:
    lowered = _lowered(_weights(*sizes, "float32"), (rows, sizes[0]), (False, False), target)
    assert [kernel.family for kernel in lowered.kernels] == ["matmul", "matmul"]


def test_what_others_read_is_stored() -> None:
    first, second, bias = _weights(96, 128, 96, "float32")

    def both(x: relax.Expr) -> relax.Expr:
        hidden = op.nn.relu(op.add(op.matmul(x, relax.const(first)), relax.const(bias)))
        return relax.Tuple([hidden, op.matmul(hidden, relax.const(second))])

    lowered = lower(module_of(both, [(4096, 96)], ["float32"]), AMX)
    assert [kernel.family for kernel in lowered.kernels] == ["matmul", "matmul"]
