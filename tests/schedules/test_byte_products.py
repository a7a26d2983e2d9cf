"""Products of bytes by dot products of fours, where the target has them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

import targets
from optimizer.lowering import build, fuse, lower
from schedules.intrin.bf16_dot import PAIR
from schedules.intrin.byte_dot import WORD, activation_types
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import TARGET, assembly_of, module_of

NAMES = ("x86-avx2", "x86-avx2-vnni", "x86-avx512", "x86-avx512-amx")
HERE = [target for target in map(targets.get, NAMES) if not missing_features(target)]


def product(weights: np.ndarray, x: relax.Var) -> relax.Expr:
    return op.matmul(x, relax.const(weights), out_dtype="int32")


def byte_values(*shape: int, dtype: str, seed: int = 0) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.random.default_rng([seed, *shape]).integers(limits.min, limits.max + 1, shape).astype(dtype)


def result(module: tvm.IRModule, x: np.ndarray, target: Target) -> np.ndarray:
    machine = relax.VirtualMachine(build(lower(module, target).module, target), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def packed_shapes(module: tvm.IRModule, target: Target) -> list[tuple[int, ...]]:
    functions = fuse(module, target).module.functions_items()
    return [
        tuple(map(int, parameter.shape))
        for _, function in functions
        if isinstance(function, tvm.tirx.PrimFunc)
        for parameter in function.params
        if str(parameter.dtype) == "int8" and len(parameter.shape) == 4
    ]


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 7, 13, 37, 64, 97]),
    columns=st.sampled_from([1, 16, 31, 33, 67]),
    depth=st.sampled_from([1, 2, 3, 4, 5, 31, 64, 65, 96, 127, 131, 256]),
    data=st.sampled_from(["uint8", "int8"]),
    symbolic=st.booleans(),
)
# One register of products, for which LLVM has an instruction of its own.
@example(rows=1, columns=1, depth=64, data="uint8", symbolic=False)
def test_sums_are_exact(target: Target, rows: int, columns: int, depth: int, data: str, *, symbolic: bool) -> None:
    weights, x = byte_values(depth, columns, dtype="int8"), byte_values(rows, depth, dtype=data)
    module = module_of(lambda v: product(weights, v), [("m" if symbolic else rows, depth)], [data])
    want = x.astype(np.int64) @ weights.astype(np.int64)
    np.testing.assert_array_equal(result(module, x, target), want)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 7, 37, 64]),
    columns=st.sampled_from([1, 16, 33, 67]),
    depth=st.sampled_from([1, 2, 3, 31, 64, 131]),
    data=st.sampled_from(["uint8", "int8"]),
    symbolic=st.booleans(),
)
def test_sums_of_words_are_exact(rows: int, columns: int, depth: int, data: str, *, symbolic: bool) -> None:
    target = targets.get("x86-avx2")
    if missing_features(target):
        pytest.skip("this machine does not have AVX2")
    weights, x = byte_values(depth, columns, dtype="int8"), byte_values(rows, depth, dtype=data)
    shape: list[int | str] = ["m" if symbolic else rows, depth]
    module = module_of(lambda v: product(weights, op.astype(v, WORD)), [shape], [data])
    want = x.astype(np.int64) @ weights.astype(np.int64)
    np.testing.assert_array_equal(result(module, x, target), want)
    assert all(shape[-1] == PAIR for shape in packed_shapes(module, target))


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("lanes", [8, 16, 32, 64])
def test_sums_of_products_of_one_register_are_exact(target: Target, lanes: int) -> None:
    x, y = byte_values(3, lanes, dtype="uint8"), byte_values(3, lanes, dtype="int8", seed=1)
    module = module_of(
        lambda a, b: op.sum(op.multiply(op.astype(a, "int32"), op.astype(b, "int32")), axis=-1),
        [x.shape, y.shape],
        ["uint8", "int8"],
    )
    machine = relax.VirtualMachine(build(lower(module, target).module, target), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(y)).numpy()
    np.testing.assert_array_equal(got, (x.astype(np.int64) * y).sum(-1))


@pytest.mark.parametrize("depth", [2, 64, 65])
def test_weights_lie_in_fours_where_the_target_takes_the_data(depth: int) -> None:
    weights = byte_values(depth, 40, dtype="int8")
    for name, kinds in (("x86-avx512", {"uint8"}), ("arm64", {"int8"}), ("arm64-i8mm", {"uint8", "int8"})):
        target = targets.get(name)
        assert set(activation_types(target)) == kinds
        blocks = -(-40 // target.layouts.column_block)
        for data in ("uint8", "int8"):
            module = module_of(lambda v: product(weights, v), [(16, depth)], [data])
            shapes = [(blocks, -(-depth // 4), target.layouts.column_block, 4)] if data in kinds else []
            assert packed_shapes(module, target) == shapes


@pytest.mark.parametrize(
    ("target", "data", "instruction"),
    [
        ("x86-avx512", "uint8", "vpdpbusd"),
        ("x86-avx512-amx", "uint8", "tdpbusd"),
        ("x86-avx2", "uint8", "vpmaddwd"),
        ("x86-avx2-vnni", "uint8", "vpdpbusd"),
        ("arm64", "int8", "sdot"),
        ("arm64-i8mm", "uint8", "sudot"),
    ],
)
def test_code_has_the_instruction_and_no_call(target: str, data: str, instruction: str) -> None:
    chosen, weights = targets.get(target), byte_values(67, 64, dtype="int8")
    lowered = lower(module_of(lambda v: product(weights, v), [(16, 67)], [data]), chosen)
    assembly = assembly_of(build(lowered.module, chosen))
    assert instruction in assembly
    calls = [
        line
        for line in assembly.splitlines()
        if "optimizer_" in line and "tiles_begin" not in line and ("call" in line or "\tbl\t" in line)
    ]
    assert not calls


def test_extremes_do_not_saturate() -> None:
    weights, x = np.full((64, 32), -128, np.int8), np.full((8, 64), 255, np.uint8)
    for target in HERE:
        module = module_of(lambda v: product(weights, v), [(8, 64)], ["uint8"])
        assert (result(module, x, target) == -128 * 255 * 64).all()


SCALES = np.linspace(0.001, 0.002, 40, dtype=np.float32)


def requantized(weights: np.ndarray, x: relax.Var) -> relax.Expr:
    scaled = op.multiply(op.astype(product(weights, x), "float32"), relax.const(SCALES))
    return op.astype(op.clip(op.add(op.round(scaled), relax.const(np.float32(128))), 0, 255), "uint8")


def test_what_follows_is_computed_in_the_kernel() -> None:
    weights, x = byte_values(64, 40, dtype="int8"), byte_values(9, 64, dtype="uint8")
    lowered = lower(module_of(lambda v: requantized(weights, v), [(9, 64)], ["uint8"]), TARGET)
    assert [kernel.family for kernel in lowered.kernels] == ["matmul"]
    machine = relax.VirtualMachine(build(lowered.module, TARGET), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x)).numpy()
    sums = (x.astype(np.int64) @ weights.astype(np.int64)).astype(np.float32) * SCALES
    np.testing.assert_array_equal(got, np.clip(np.rint(sums) + 128, 0, 255).astype(np.uint8))


def test_sums_are_rounded_to_codes_in_vectors() -> None:
    weights, chosen = byte_values(64, 40, dtype="int8"), targets.get("x86-avx512")
    lowered = lower(module_of(lambda v: requantized(weights, v), [(16, 64)], ["uint8"]), chosen)
    assembly = assembly_of(build(lowered.module, chosen))
    assert "vpmovdb" in assembly
    assert not {"vroundss", "vrndscaless"} & set(assembly.split())
