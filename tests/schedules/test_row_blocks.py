"""Blocks of rows of products: as many as stay in a core's second-level cache beside the columns' panels."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import build, lower
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import Dimension, assembly_of, module_of, normal, sum_tolerance

TWO_UNITS, ONE_UNIT = targets.get("x86-avx512-amx"), targets.get("x86-avx512")
HERE = [target for target in (TWO_UNITS, ONE_UNIT) if not missing_features(target)]


def product(weights: np.ndarray, rows: Dimension) -> tvm.IRModule:
    return module_of(lambda x: op.matmul(x, relax.const(weights)), [(rows, weights.shape[0])], ["float32"])


def rows_of_a_task(target: Target, rows: Dimension, columns: int, depth: int) -> int:
    (kernel,) = lower(product(normal(depth, columns), rows), target).kernels
    assert kernel.family == "matmul"
    return int(kernel.parameters["row_block"])


def test_rows_of_a_task_leave_room_in_the_second_level_cache() -> None:
    assert rows_of_a_task(TWO_UNITS, 1576, 64, 768) == 128
    rows = rows_of_a_task(TWO_UNITS, 1576, 64, 3072)
    assert 48 <= rows < 128
    assert rows * 3072 * 4 <= TWO_UNITS.caches.level2 * 5 // 8
    assert rows_of_a_task(ONE_UNIT, 1576, 64, 3072) == 128


def test_long_rows_still_share_panels() -> None:
    assert rows_of_a_task(TWO_UNITS, 512, 64, 16384) == 48


def test_tasks_of_a_symbolic_number_of_rows_are_long_where_columns_make_enough_of_them() -> None:
    assert rows_of_a_task(ONE_UNIT, "n", 768, 64) == 128
    assert rows_of_a_task(ONE_UNIT, "n", 32, 64) == 32


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
def test_what_whole_tiles_leave_of_a_symbolic_number_of_rows(target: Target) -> None:
    weights = normal(40, 96, seed=1)
    machine = relax.VirtualMachine(build(lower(product(weights, "n"), target).module, target), tvm.cpu())
    for rows in (*range(1, 30), 127, 128, 129, 140):
        x = normal(rows, 40)
        got = machine["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(got, x.astype("float64") @ weights, rtol=1e-6, atol=sum_tolerance(40, 1.0))


@pytest.mark.parametrize(("target", "asks"), [(TWO_UNITS, False), (ONE_UNIT, True)], ids=["two units", "one unit"])
def test_next_rows_are_asked_for_where_one_multiply_add_begins_in_a_cycle(target: Target, *, asks: bool) -> None:
    assembly = assembly_of(build(lower(product(normal(64, 1536), 12000), target).module, target))
    # Requests for columns are two in a row of as many steps as there are tiles, those for rows one for each of a tile.
    assert (re.search(r"(\s+prefetcht1.*\n){4}", assembly) is not None) == asks


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 13, 97, 128, 197, 263]),
    columns=st.sampled_from([1, 33, 64]),
    depth=st.sampled_from([3072, 4099, 9001]),
)
def test_products_of_long_rows(target: Target, rows: int, columns: int, depth: int) -> None:
    x, weights = normal(rows, depth), normal(depth, columns, seed=1)
    machine = relax.VirtualMachine(build(lower(product(weights, rows), target).module, target), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_allclose(got, x.astype("float64") @ weights, rtol=1e-6, atol=sum_tolerance(depth, 1.0))
