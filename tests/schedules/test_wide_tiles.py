"""Products whose register tiles are three vectors wide, where a core begins two multiply-adds in a cycle."""

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
from schedules import matmul
from schedules.register_tile import WIDE_TILE, wide_block, wide_tile
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import assembly_of, module_of, normal, sum_tolerance

TWO_UNITS, ONE_UNIT = targets.get("x86-avx512-amx"), targets.get("x86-avx512")
HERE = [target for target in (TWO_UNITS, ONE_UNIT) if not missing_features(target)]


def layer(weights: np.ndarray, rows: int | str, target: Target, *, normalized: bool = False) -> tvm.relax.VMExecutable:
    columns = weights.shape[1]

    def product(x: relax.Var) -> relax.Expr:
        result = op.add(op.matmul(x, relax.const(weights)), relax.const(normal(columns, seed=2)))
        scale, shift = relax.const(np.ones(columns, np.float32)), relax.const(np.zeros(columns, np.float32))
        return op.nn.layer_norm(result, scale, shift, axes=[-1]) if normalized else op.nn.relu(result)

    return build(lower(module_of(product, [(rows, weights.shape[0])], ["float32"]), target).module, target)


def loops_of(assembly: str) -> list[list[str]]:
    """Return the lines of each loop without branches in it."""
    found, label, body = [], "", []
    for line in assembly.splitlines():
        if line.startswith(".LBB"):
            label, body = line.split(":")[0], []
        elif label and line.split()[:1] and line.split()[0].startswith("j") and line.split()[-1] == label:
            found.append(list(body))
        else:
            body.append(line)
    return found


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 8, 9, 10, 17, 16, 19, 37, 64, 127, 197]),
    columns=st.sampled_from([48, 96, 144, 240, 768]),
    depth=st.sampled_from([1, 2, 7, 31, 64, 521, 2049]),
    symbolic=st.booleans(),
    normalized=st.booleans(),
)
def test_products_of_any_size(
    target: Target, rows: int, columns: int, depth: int, *, symbolic: bool, normalized: bool
) -> None:
    x, weights = normal(rows, depth), normal(depth, columns, seed=1)
    executable = layer(weights, "m" if symbolic else rows, target, normalized=normalized)
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    want = x.astype("float64") @ weights + normal(columns, seed=2)
    if normalized:
        deviation = np.sqrt(want.var(-1, keepdims=True) + 1e-5)
        want = (want - want.mean(-1, keepdims=True)) / deviation
        # A sum's error grows by the scale of its row, and the mean's stands beside it.
        allowed = 2 * sum_tolerance(depth + columns, 1.0) * np.maximum(1, 1 / deviation.min())
    else:
        want, allowed = np.maximum(want, 0), sum_tolerance(depth, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=allowed)


def test_sums_stay_in_registers() -> None:
    """Without fences between steps LLVM keeps two of 27 sums on the stack."""
    lines = assembly_of(layer(normal(96, 96), 99, TWO_UNITS)).splitlines()
    rows, vectors = WIDE_TILE
    assert sum("vfmadd" in line and "zmm" in line for line in lines) >= rows * vectors
    assert not [line for line in lines if "zmm" in line and "rsp" in line]


@pytest.mark.parametrize("depth", [2048, 3072])
@pytest.mark.parametrize("tiles", [7, 8, 11, 14])
def test_sums_in_parts_stay_in_registers(tiles: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a dozen steps follow each other LLVM keeps two of 27 sums on the stack, from one step to the next."""
    monkeypatch.setattr(matmul, "rows_that_stay", lambda *_: tiles * WIDE_TILE[0])
    rows, vectors = WIDE_TILE
    assembly = assembly_of(layer(normal(depth, 768), tiles * rows, TWO_UNITS))
    whole = [body for body in loops_of(assembly) if sum("vfmadd" in line for line in body) >= rows * vectors]
    assert any(sum("vfmadd" in line for line in body) > rows * vectors for body in whole)
    assert not [line for body in whole for line in body if "zmm" in line and "rsp" in line]


def test_blocks_are_wide_where_nothing_is_left_of_them() -> None:
    assert wide_block(TWO_UNITS, "float32", 768) == 48
    assert wide_block(TWO_UNITS, "float32", 64) is None
    assert wide_block(TWO_UNITS, "bfloat16", 768) is None
    assert wide_block(ONE_UNIT, "float32", 768) is None


def test_tiles_leave_all_cores_as_many_rows() -> None:
    assert wide_tile(TWO_UNITS, 1024)[0] == 8
    assert wide_tile(TWO_UNITS, 1576) == WIDE_TILE


def test_sums_fit_the_registers() -> None:
    rows, vectors = WIDE_TILE
    assert rows * vectors + vectors + 1 <= TWO_UNITS.vector_registers
    # A chain of sums goes on after four cycles.
    assert rows * vectors >= 4 * TWO_UNITS.multiply_adds
