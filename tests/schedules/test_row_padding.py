"""Rows that tile registers read, an odd number of lines apart."""

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
from optimizer.lowering import build, lower
from targets.host import missing_features
from tests.schedules.execution import module_of

AMX = targets.get("x86-avx512-amx")
HERE = pytest.mark.skipif(bool(missing_features(AMX)), reason="the machine has no AMX")


def integers(rows: int, columns: int, seed: int) -> np.ndarray:
    """Return numbers whose sums of products stay small enough to be exact in bfloat16."""
    values = np.random.default_rng(seed).integers(-1, 2, (rows, columns))
    values[np.random.default_rng(seed + 1).random((rows, columns)) < 0.9] = 0
    return values.astype(ml_dtypes.bfloat16)


def product(x: relax.Expr, weights: np.ndarray) -> relax.Expr:
    return op.matmul(x, relax.const(weights, "bfloat16"), out_dtype="float32")


def two_layers(x: relax.Var, first: np.ndarray, second: np.ndarray, as_view: bool = False) -> relax.Expr:
    hidden = op.astype(op.nn.relu(product(x, first)), "bfloat16")
    if as_view:
        hidden = op.reshape(relax.BlockBuilder.current().emit(hidden), (-1, 2, second.shape[0]))
    return product(hidden, second)


def rows_between(module: tvm.IRModule) -> set[int]:
    """Return how long the rows of the bfloat16 tensors are that a kernel gives to another one."""
    return {
        int(binding.var.ty.shape.values[-1])
        for block in module["main"].body.blocks
        for binding in block.bindings
        if isinstance(binding.var.ty, relax.TensorType) and str(binding.var.ty.dtype.dtype) == "bfloat16"
    }


@pytest.mark.parametrize(("depth", "row"), [(512, 544), (544, 544), (256, 288), (128, 128)])
def test_rows_of_an_even_number_of_lines_get_one_more(depth: int, row: int) -> None:
    first, second = integers(64, depth, 0), integers(depth, 64, 1)
    lowered = lower(module_of(lambda x: two_layers(x, first, second), [(64, 64)], ["bfloat16"]), AMX)
    assert rows_between(lowered.module) == {row}


def test_a_tensor_that_is_seen_in_another_shape_stays() -> None:
    first, second = integers(64, 512, 0), integers(512, 64, 1)
    lowered = lower(module_of(lambda x: two_layers(x, first, second, as_view=True), [(64, 64)], ["bfloat16"]), AMX)
    assert rows_between(lowered.module) == {512}


def test_a_result_of_the_model_stays() -> None:
    first, second = integers(64, 512, 0), integers(512, 64, 1)

    def both(x: relax.Var) -> relax.Expr:
        hidden = op.astype(op.nn.relu(product(x, first)), "bfloat16")
        return relax.Tuple([hidden, product(hidden, second)])

    lowered = lower(module_of(both, [(64, 64)], ["bfloat16"]), AMX)
    assert rows_between(lowered.module) == {512}


def test_other_targets_keep_their_rows() -> None:
    first, second = integers(64, 512, 0), integers(512, 64, 1)
    target = targets.get("x86-avx512-bf16")
    lowered = lower(module_of(lambda x: two_layers(x, first, second), [(64, 64)], ["bfloat16"]), target)
    assert rows_between(lowered.module) == {512}


@HERE
@given(
    rows=st.sampled_from([1, 31, 64, 70, 133, 300]),
    depth=st.sampled_from([256, 512, 576, 1024]),
    symbolic=st.booleans(),
    rounds=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_longer_rows_hold_the_same_numbers(rows: int, depth: int, symbolic: bool, rounds: bool) -> None:
    first, second, x = integers(depth, 512, 0), integers(512, 96, 1), integers(rows, depth, 2)

    def model(v: relax.Var) -> relax.Expr:
        # What a kernel rounds for itself has longer rows, too.
        return two_layers(op.astype(v, "bfloat16") if rounds else v, first, second)

    dtype = "float32" if rounds else "bfloat16"
    lowered = lower(module_of(model, [("m" if symbolic else rows, depth)], [dtype]), AMX)
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x.astype(dtype))).numpy()
    exact = x.astype("float64") @ first.astype("float64")
    np.testing.assert_array_equal(got, np.maximum(exact, 0) @ second.astype("float64"))
