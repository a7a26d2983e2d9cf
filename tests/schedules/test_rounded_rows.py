"""Rows of fp32 that a product in tile registers rounds itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import LoweredModule, build, lower
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import assembly_of, module_of, normal, sum_tolerance

AMX = targets.get("x86-avx512-amx")
HERE = pytest.mark.skipif(bool(missing_features(AMX)), reason="the machine has no AMX")
_SMALLEST_NORMAL = float(np.finfo("float32").tiny)


def _rounded(x: relax.Expr, weights: np.ndarray) -> relax.Expr:
    rounded = op.astype(x, "bfloat16")
    return op.matmul(rounded, relax.const(weights, "bfloat16"), out_dtype="float32")


def _lowered(weights: np.ndarray, shape: tuple[int | str, ...], target: Target = AMX) -> LoweredModule:
    return lower(module_of(lambda x: _rounded(x, weights), [shape], ["float32"]), target)


def _weights(depth: int, columns: int) -> np.ndarray:
    return normal(depth, columns).astype(ml_dtypes.bfloat16)


def _run(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(build(_lowered(weights, x.shape).module, AMX), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


@HERE
@given(
    shape=st.one_of(
        st.tuples(st.one_of(st.integers(2, 70), st.sampled_from([197, 257, 300, 577, 1031]))),
        st.sampled_from([(1, 97), (2, 161), (3, 7, 31), (1, 2, 1)]),
    ),
    columns=st.sampled_from([17, 32, 33, 64, 131]),
    depth=st.sampled_from([32, 33, 47, 63, 80, 131, 416]),
)
@settings(max_examples=15, deadline=None)
def test_rows_are_rounded_to_nearest(shape: tuple[int, ...], columns: int, depth: int) -> None:
    weights, x = _weights(depth, columns), normal(*shape, depth, seed=1)
    want = x.astype(ml_dtypes.bfloat16).astype("float64") @ weights.astype("float64")
    np.testing.assert_allclose(_run(weights, x), want, rtol=1e-6, atol=sum_tolerance(depth, 1.0))


@HERE
@pytest.mark.parametrize("rows", [40, 300])
def test_what_is_no_number_and_what_is_next_to_zero_stay_in_their_rows(rows: int) -> None:
    x = np.ones((rows, 35), np.float32)
    x[3, 34], x[5, 2], x[7, 1], x[9] = np.nan, np.inf, -np.inf, _SMALLEST_NORMAL / 8
    got = _run(np.ones((35, 32), ml_dtypes.bfloat16), x)
    want = np.full((rows, 32), 35.0)
    want[3], want[5], want[7] = np.nan, np.inf, -np.inf
    want[9] = got[9]
    np.testing.assert_array_equal(got, want)
    assert np.abs(got[9]).max() <= 35 * _SMALLEST_NORMAL


@pytest.mark.parametrize(("rows", "owned"), [(128, 0), (384, 64), (512, 64), (4096, 128)])
def test_one_kernel_rounds_and_multiplies(rows: int, owned: int) -> None:
    lowered = _lowered(_weights(256, 64), (rows, 256))
    (kernel,) = lowered.kernels
    assert (kernel.family, kernel.parameters["owned_rows"]) == ("normalized-product", owned)
    assembly = assembly_of(build(lowered.module, AMX))
    assert "vcvtneps2bf16" in assembly
    assert "tdpbf16ps" in assembly


def test_rounding_stays_a_kernel_where_it_would_not_pay() -> None:
    assert len(_lowered(_weights(64, 64), ("rows", 64)).kernels) == 2
    assert len(_lowered(_weights(64, 64), (1, 64)).kernels) == 2
    assert len(_lowered(_weights(64, 64), (64, 64), targets.get("x86-avx512-bf16")).kernels) == 2


def test_rows_that_another_kernel_reads_rounded_are_rounded_before() -> None:
    weights = _weights(64, 64)

    def both(x: relax.Expr) -> relax.Expr:
        rounded = op.astype(x, "bfloat16")
        products = [
            op.matmul(rounded, relax.const(each, "bfloat16"), out_dtype="float32")
            for each in (weights, weights[:, :32])
        ]
        return relax.Tuple(products)

    lowered = lower(module_of(both, [(64, 64)], ["float32"]), AMX)
    assert sorted(kernel.family for kernel in lowered.kernels) == ["elementwise", "matmul", "matmul"]
