"""Products whose register tiles ask for lines of their weights and results shortly before they need them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import build, lower
from schedules.register_tile import register_tile
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import assembly_of, module_of, normal, sum_tolerance

TWO_UNITS, ONE_UNIT = targets.get("x86-avx512-amx"), targets.get("x86-avx512")
HERE = [target for target in (TWO_UNITS, ONE_UNIT) if not missing_features(target)]


def layer(weights: np.ndarray, bias: np.ndarray, rows: int | str, target: Target) -> tvm.relax.VMExecutable:
    def product(x: relax.Var) -> relax.Expr:
        return op.nn.relu(op.add(op.matmul(x, relax.const(weights)), relax.const(bias)))

    module = module_of(product, [(rows, weights.shape[0])], ["float32"])
    return build(lower(module, target).module, target)


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 7, 11, 12, 13, 25, 37, 97, 197]),
    columns=st.sampled_from([1, 15, 16, 31, 32, 33, 67, 128]),
    depth=st.sampled_from([1, 2, 7, 8, 9, 31, 64, 127, 521]),
    symbolic=st.booleans(),
)
def test_products_of_any_size(target: Target, rows: int, columns: int, depth: int, *, symbolic: bool) -> None:
    x, weights, bias = normal(rows, depth), normal(depth, columns, seed=1), normal(columns, seed=2)
    machine = relax.VirtualMachine(layer(weights, bias, "m" if symbolic else rows, target), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    want = np.maximum(x.astype("float64") @ weights + bias, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(depth, 1.0))


@pytest.mark.parametrize(("target", "asks"), [(TWO_UNITS, True), (ONE_UNIT, False)], ids=["two units", "one unit"])
def test_lines_are_asked_for_where_two_multiply_adds_begin_in_a_cycle(target: Target, *, asks: bool) -> None:
    assembly = assembly_of(layer(normal(64, 64), normal(64), 96, target))
    assert ("prefetcht0" in assembly) == asks


def test_sums_fit_the_registers() -> None:
    for target in (TWO_UNITS, ONE_UNIT, targets.get("x86-avx2"), targets.get("arm64")):
        rows, vectors = register_tile(target)
        assert rows * vectors + vectors + 1 <= target.vector_registers
        # A chain of sums goes on after four cycles.
        assert rows * vectors >= 4 * target.multiply_adds
