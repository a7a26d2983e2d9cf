"""Buffers of generated code have the sizes that schedules gave them."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx import compilation_pipeline

import targets
from optimizer import code_generation
from schedules.loops import index, load, local, loop, store, with_local


def test_a_symbolic_size_is_not_computed_from_the_places_of_a_buffer() -> None:
    n = tirx.Var("n", "int64")
    given, made = (tirx.decl_buffer([n], "float32", name) for name in ("given", "made"))
    inside = local([n], "float32", "inside")
    half = tirx.floordiv(n, index(2))
    kept = loop(half, lambda i: store(inside, load(given, [i]), [i + half]))
    body = with_local([inside], [kept, loop(half, lambda i: store(made, load(inside, [i + half]), [i]))])
    function = tirx.PrimFunc([given, made], body).with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
    target = targets.get("x86-avx2")
    lower, _, _ = compilation_pipeline.get_tir_pipeline(code_generation.pipeline(target))
    with target.tvm_target() as tvm_target, code_generation.options(target):
        bound = tirx.transform.BindTarget(tvm_target.with_host(tvm_target))(tvm.IRModule({"main": function}))
        lowered = lower(bound)
    sizes: list[tirx.AllocBuffer] = []
    tvm_ffi.structural_walk(lowered["main"].body, (tirx.AllocBuffer, sizes.append))
    (allocated,) = [each for each in sizes if each.buffer.name == "inside"]
    assert [str(extent) for extent in allocated.buffer.shape] == ["n"]
