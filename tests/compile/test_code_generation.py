"""What TVM's lowering does for a CPU to buffers of functions whose sizes only the run knows."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import tirx
from tvm.script import tirx as T  # noqa: N812 - what every TVMScript calls it
from tvm.tirx import compilation_pipeline

import targets
from optimizer import code_generation


@T.prim_func(s_tir=True)
def of_a_block(x: T.handle, y: T.handle):
    """A block allocates for all rows what each of eight tasks needs of its own."""
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    n = T.int64()
    source = T.match_buffer(x, (n, 4096), "float32")
    result = T.match_buffer(y, (n, 4096), "float32")
    with T.sblock("root"):
        twice = T.sblock_alloc_buffer((4096, 32), "float32")
        for task in T.parallel(8):
            for row, column in T.grid(512, 32):
                twice[task * 512 + row, column] = source[0, column] * T.float32(2)
            for row, column in T.grid(512, 32):
                result[0, task * 512 + row] = twice[task * 512 + row, 31 - column]


@T.prim_func(s_tir=True)
def of_a_statement(x: T.handle, y: T.handle):
    """A statement allocates more than what can be proven to be used."""
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    n = T.int64()
    source = T.match_buffer(x, (n,), "float32")
    result = T.match_buffer(y, (n,), "float32")
    with T.sblock("root"):
        twice = T.alloc_buffer((n,), "float32")
        for i in T.serial((n + 7) // 8 * 8 - 8):
            twice[i] = source[i] * T.float32(2)
        for i in T.serial((n + 7) // 8 * 8 - 8):
            result[i] = twice[i]


def _sizes(function: tirx.PrimFunc) -> list[tvm.ir.Expr]:
    """Return the sizes of the buffers that a function allocates once it is lowered."""
    target = targets.get("x86-avx512")
    with target.tvm_target() as tvm_target, code_generation.options(target):
        lower, _, _ = compilation_pipeline.get_tir_pipeline(code_generation.pipeline(target))
        bound = tirx.transform.BindTarget(tvm_target.with_host(tvm_target))(tvm.IRModule({"main": function}))
        module = lower(bound)
    found: list[tirx.AllocBuffer] = []
    for each in module.functions.values():
        tvm_ffi.structural_walk(each.body, (tirx.AllocBuffer, found.append))
    return [size for allocation in found for size in allocation.buffer.shape]


def test_what_a_block_allocates_for_all_rows_becomes_what_a_task_needs() -> None:
    assert [int(size) for size in _sizes(of_a_block)] == [512 * 32]


def test_what_a_statement_allocates_keeps_its_size() -> None:
    (size,) = _sizes(of_a_statement)
    assert isinstance(size, tirx.Var)
