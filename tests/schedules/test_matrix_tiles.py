"""Products of bfloat16 in tile registers."""

from __future__ import annotations

import ctypes
import mmap

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
from optimizer.runtime.tensors import wrap_bytes
from targets.host import missing_features
from tests.schedules.execution import assembly_of, module_of, normal, sum_tolerance

AMX = targets.get("x86-avx512-amx")
HERE = pytest.mark.skipif(bool(missing_features(AMX)), reason="the machine has no AMX")


def layer(weights: np.ndarray, x: relax.Var) -> relax.Expr:
    product = op.matmul(op.astype(x, "bfloat16"), relax.const(weights, "bfloat16"), out_dtype="float32")
    return op.add(product, relax.const(np.ones(weights.shape[1], np.float32)))


@HERE
@given(
    rows=st.one_of(st.integers(2, 70), st.sampled_from([197, 257, 1031])),
    columns=st.sampled_from([17, 32, 33, 64, 96, 131]),
    depth=st.sampled_from([32, 33, 63, 80, 96, 131, 416, 800, 1184]),
    symbolic=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_sums_are_those_of_rounded_operands(rows: int, columns: int, depth: int, symbolic: bool) -> None:
    weights, x = normal(depth, columns).astype(ml_dtypes.bfloat16), normal(rows, depth, seed=1)
    want = x.astype(ml_dtypes.bfloat16).astype("float64") @ weights.astype("float64") + 1
    shape = ("m" if symbolic else rows, depth)
    lowered = lower(module_of(lambda v: layer(weights, v), [shape], ["float32"]), AMX)
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(depth, 1.0))


@HERE
def test_weights_that_are_not_numbers_stay_where_they_are() -> None:
    weights = np.zeros((40, 32), ml_dtypes.bfloat16)
    weights[31], weights[39, 7] = np.inf, np.nan
    x = np.ones((33, 40), np.float32)
    lowered = lower(module_of(lambda v: layer(weights, v), [x.shape], ["float32"]), AMX)
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    want = np.full((33, 32), np.inf)
    want[:, 7] = np.nan
    np.testing.assert_array_equal(got, want)


def test_code_describes_the_registers_once_and_has_no_call_in_steps() -> None:
    weights = normal(64, 64).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: layer(weights, v), [(96, 64)], ["float32"]), AMX)
    assembly = assembly_of(build(lowered.module, AMX))
    assert "tdpbf16ps" in assembly
    assert "prefetch" in assembly
    calls = [line.split()[-1] for line in assembly.splitlines() if line.split()[:1] in (["call"], ["callq"])]
    assert {name.split("@")[0] for name in calls if "optimizer_tiles" in name} <= {"optimizer_tiles_begin"}


@pytest.mark.parametrize(("rows", "columns", "depth"), [(3136, 96, 96), (197, 768, 768), (1500, 384, 384)])
def test_products_have_tasks_for_all_cores(rows: int, columns: int, depth: int) -> None:
    weights = normal(depth, columns).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: layer(weights, v), [(rows, depth)], ["bfloat16"]), AMX)
    (block,) = [kernel.parameters["row_block"] for kernel in lowered.kernels if kernel.family == "matmul"]
    assert -(-rows // block) * (columns // 32) >= 2 * AMX.cores
    assert block >= 128


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "block"),
    [(1500, 1536, 384, 768), (1576, 768, 3072, 160), (1024, 1024, 1024, 512)],
)
def test_cores_divide_rows_that_none_of_their_caches_holds(rows: int, columns: int, depth: int, block: int) -> None:
    weights = normal(depth, columns).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: layer(weights, v), [(rows, depth)], ["bfloat16"]), AMX)
    # All columns of a block of rows follow each other, and two cores take whole blocks.
    assert f"task // T.int64({columns // 32}) * T.int64({block})" in lowered.module.script()
    assert -(-rows // block) % 2 == 0


@pytest.mark.parametrize(("rows", "columns", "depth"), [(512, 512, 512), (197, 768, 3072), (197, 768, 768)])
def test_cores_divide_the_columns_of_fewer_rows(rows: int, columns: int, depth: int) -> None:
    weights = normal(depth, columns).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: layer(weights, v), [(rows, depth)], ["bfloat16"]), AMX)
    assert f"task // T.int64({columns // 32})" not in lowered.module.script()


def product_alone(weights: np.ndarray, x: relax.Var) -> relax.Expr:
    return op.matmul(op.astype(x, "bfloat16"), relax.const(weights, "bfloat16"), out_dtype="float32")


@pytest.mark.parametrize(("columns", "once"), [(64, True), (48, True), (41, False)])
def test_sums_that_nothing_follows_are_stored_once(columns: int, once: bool) -> None:
    weights = normal(64, columns).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: product_alone(weights, v), [(96, 64)], ["bfloat16"]), AMX)
    (product,) = [each for each in lowered.module.functions.values() if "tdpbf16ps" in str(each)]
    assert ("sums" not in str(product)) == once


@HERE
@given(
    rows=st.one_of(st.integers(1, 70), st.sampled_from([197, 257])),
    columns=st.sampled_from([17, 32, 48, 64, 131]),
    depth=st.sampled_from([32, 33, 80, 416, 800, 1184]),
    symbolic=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_sums_stored_at_once_are_those_of_rounded_operands(rows: int, columns: int, depth: int, symbolic: bool) -> None:
    weights, x = normal(depth, columns).astype(ml_dtypes.bfloat16), normal(rows, depth, seed=1)
    shape = ("m" if symbolic else rows, depth)
    lowered = lower(module_of(lambda v: product_alone(weights, v), [shape], ["bfloat16"]), AMX)
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x.astype(ml_dtypes.bfloat16))).numpy()
    want = x.astype(ml_dtypes.bfloat16).astype("float64") @ weights.astype("float64")
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(depth, 1.0))


@HERE
@pytest.mark.parametrize("rows", [1500, 1553])
def test_sums_of_divided_rows_are_those_of_rounded_operands(rows: int) -> None:
    depth, columns = 416, 72
    weights, x = normal(depth, columns).astype(ml_dtypes.bfloat16), normal(rows, depth, seed=1)
    want = x.astype(ml_dtypes.bfloat16).astype("float64") @ weights.astype("float64") + 1
    lowered = lower(module_of(lambda v: layer(weights, v), [x.shape], ["bfloat16"]), AMX)
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x.astype(ml_dtypes.bfloat16))).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=sum_tolerance(depth, 1.0))


def test_steps_ask_for_the_lines_that_the_block_writes() -> None:
    weights = normal(64, 64).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: layer(weights, v), [(96, 64)], ["bfloat16"]), AMX)
    assembly = assembly_of(build(lowered.module, AMX))
    assert "prefetchw" in assembly


@pytest.mark.parametrize(("rows", "passes"), [(96, True), (32, False)])
def test_several_blocks_of_rows_pass_by_the_cache_that_holds_weights(rows: int, passes: bool) -> None:
    depth = 2048
    weights = normal(depth, 64).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: layer(weights, v), [(rows, depth)], ["bfloat16"]), AMX)
    assert ("optimizer_tiles_step_tdpbf16ps_passing_rows" in lowered.module.script()) == passes


def test_weights_of_a_part_of_the_depth_take_half_of_the_first_level_cache() -> None:
    weights = normal(3072, 64).astype(ml_dtypes.bfloat16)
    lowered = lower(module_of(lambda v: layer(weights, v), [(128, 3072)], ["bfloat16"]), AMX)
    assembly = assembly_of(build(lowered.module, AMX))
    # 12 steps of 2 KiB: those of the first part and of one between follow each other without a loop.
    steps = [line for line in assembly.splitlines() if "tdpbf16ps" in line]
    assert AMX.caches.level1 // 2 // 2048 == 12
    assert len(steps) >= 2 * 12 * 4


@HERE
@pytest.mark.parametrize("rows", [1, 33])
def test_nothing_is_read_behind_the_last_row(rows: int) -> None:
    depth = 1024
    weights = normal(depth, 32).astype(ml_dtypes.bfloat16)

    def product(x: relax.Var) -> relax.Expr:
        return op.matmul(x, relax.const(weights, "bfloat16"), out_dtype="float32")

    lowered = lower(module_of(product, [("m", depth)], ["bfloat16"]), AMX)
    machine = relax.VirtualMachine(build(lowered.module, AMX), tvm.cpu())
    # The rows end where a page begins that must not be read.
    size = -(-rows * depth * 2 // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    pages = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(pages.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    x = pages[size - rows * depth * 2 : size].view(ml_dtypes.bfloat16).reshape(rows, depth)
    x[:] = normal(rows, depth, seed=1)
    got = machine["main"](wrap_bytes(x.reshape(-1).view(np.uint8), "bfloat16", x.shape)).numpy()
    np.testing.assert_allclose(
        got, x.astype("float64") @ weights.astype("float64"), rtol=1e-6, atol=sum_tolerance(depth, 1.0)
    )
