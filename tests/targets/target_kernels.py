"""Small TIR functions, each standing on one instruction set, and the numpy arithmetic that they must equal."""

from __future__ import annotations

import numpy as np
from tvm import s_tir
from tvm.ir import IRModule
from tvm.script import tirx as T  # noqa: N812 - what every TVMScript calls it
from tvm.target import Target as TVMTarget

ROWS, COLUMNS, REDUCTION = 8, 16, 64


@T.prim_func(s_tir=True)
def matmul(
    a: T.Buffer((ROWS, REDUCTION), "float32"),
    b: T.Buffer((REDUCTION, COLUMNS), "float32"),
    c: T.Buffer((ROWS, COLUMNS), "float32"),
):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for i, j, k in T.grid(ROWS, COLUMNS, REDUCTION):
        with T.sblock("matmul"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                c[vi, vj] = T.float32(0)
            c[vi, vj] = c[vi, vj] + a[vi, vk] * b[vk, vj]


@T.prim_func(s_tir=True)
def dot_product_matmul(
    a: T.Buffer((ROWS, REDUCTION), "int8"),
    b: T.Buffer((COLUMNS // 4, REDUCTION // 4, 4, 4), "int8"),
    c: T.Buffer((ROWS, COLUMNS), "int32"),
):
    """Arm SDOT: four int8 products summed into each of four lanes."""
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    with T.sblock("root"):
        total = T.sblock_alloc_buffer((4,), "int32", scope="local")
        for i in T.serial(ROWS):
            for j in range(COLUMNS // 4):
                total[T.ramp(0, 1, 4)] = T.broadcast(T.int32(0), 4)
                for k in range(REDUCTION // 4):
                    total[T.ramp(0, 1, 4)] = T.call_llvm_pure_intrin(
                        T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot.v4i32.v16i8"),
                        total[T.ramp(0, 1, 4)],
                        T.reinterpret(
                            T.broadcast(T.reinterpret(a.vload([i, k * 4], "int8x4"), dtype="int32"), 4), dtype="int8x16"
                        ),
                        b.vload([j, k, 0, 0], "int8x16"),
                        dtype="int32x4",
                    )
                c[i, T.ramp(j * 4, 1, 4)] = total[T.ramp(0, 1, 4)]


@T.prim_func(s_tir=True)
def matrix_multiply_accumulate(
    a: T.Buffer((ROWS // 2, REDUCTION // 8, 2, 8), "int8"),
    b: T.Buffer((COLUMNS // 2, REDUCTION // 8, 2, 8), "int8"),
    c: T.Buffer((ROWS // 2, COLUMNS // 2, 4), "int32"),
):
    """Arm SMMLA: a 2x8 by 8x2 int8 product added to a 2x2 tile."""
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    with T.sblock("root"):
        total = T.sblock_alloc_buffer((4,), "int32", scope="local")
        for i in T.serial(ROWS // 2):
            for j in range(COLUMNS // 2):
                total[T.ramp(0, 1, 4)] = T.broadcast(T.int32(0), 4)
                for k in range(REDUCTION // 8):
                    total[T.ramp(0, 1, 4)] = T.call_llvm_pure_intrin(
                        T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.smmla.v4i32.v16i8"),
                        total[T.ramp(0, 1, 4)],
                        a.vload([i, k, 0, 0], "int8x16"),
                        b.vload([j, k, 0, 0], "int8x16"),
                        dtype="int32x4",
                    )
                c[i, j, T.ramp(0, 1, 4)] = total[T.ramp(0, 1, 4)]


@T.prim_func(s_tir=True)
def scaled_sum(a: T.Buffer((100,), "float32"), b: T.Buffer((100,), "float32"), c: T.Buffer((100,), "float32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for i in range(100):
        with T.sblock("sum"):
            vi = T.axis.spatial(100, i)
            c[vi] = a[vi] * T.float32(2) + b[vi]


def scalable_scaled_sum(target: TVMTarget) -> IRModule:
    """Return `scaled_sum` vectorized over registers whose length is known only at run time."""
    schedule = s_tir.Schedule(IRModule({"main": scaled_sum}))
    (loop,) = schedule.get_loops(schedule.get_sblock("sum"))
    with target:
        _, inner = schedule.split(loop, factors=[None, 4 * T.vscale()])
        schedule.vectorize(inner)
    return schedule.mod


def integers(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Return small whole numbers, whose sums of products are exact in float32 in whatever order they are added."""
    return np.random.default_rng(seed).integers(-100, 100, shape).astype(dtype)


def dot_product_layout(b: np.ndarray) -> np.ndarray:
    """Pack [K, N] as [N/4, K/4, 4, 4] with neighbours of K innermost."""
    reduction, columns = b.shape
    return np.ascontiguousarray(b.reshape(reduction // 4, 4, columns // 4, 4).transpose(2, 0, 3, 1))


def matrix_layout(a: np.ndarray) -> np.ndarray:
    """Pack [M, K] as [M/2, K/8, 2, 8]."""
    rows, reduction = a.shape
    return np.ascontiguousarray(a.reshape(rows // 2, 2, reduction // 8, 8).transpose(0, 2, 1, 3))
