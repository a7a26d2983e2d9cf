"""What holds for every function of a module, whatever its family."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax import op

import targets
from schedules import schedule_function, schedule_module
from tests.schedules.execution import TARGET, build, normal, scheduled


def network(x: relax.Expr, w: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    x = op.nn.relu(op.nn.conv2d(x, w, padding=1))
    x = op.nn.max_pool2d(x, (2, 2), (2, 2))
    x = op.permute_dims(x, [0, 2, 3, 1])
    return op.nn.softmax(op.nn.layer_norm(x, scale, bias, axes=[-1]), axis=-1)


SHAPES = [("n", 3, 12, 12), (8, 3, 3, 3), (8,), (8,)]


def module() -> tvm.IRModule:
    return build(network, SHAPES, ["float32"] * 4)


@pytest.mark.parametrize("name", ["x86-avx512", "x86-avx2", "arm64", "cuda"])
def test_every_function_is_marked_and_reported(name: str) -> None:
    result, reports = schedule_module(module(), targets.get(name))
    functions = {v.name_hint: f for v, f in result.functions_items() if isinstance(f, tirx.PrimFunc)}
    assert {report.function for report in reports} == set(functions)
    assert all(function.attrs["tirx.is_scheduled"] for function in functions.values())
    assert "opaque" not in {report.family for report in reports}


def test_relax_functions_and_scheduled_functions_are_left_alone() -> None:
    before = module()
    once, _ = schedule_module(before, TARGET)
    tvm.ir.assert_structural_equal(once["main"], before["main"])
    twice, reports = schedule_module(once, TARGET)
    assert reports == ()
    tvm.ir.assert_structural_equal(twice, once)


def test_every_gpu_function_runs_on_threads() -> None:
    result, _ = schedule_module(module(), targets.get("cuda"))
    for _, function in result.functions_items():
        if isinstance(function, tirx.PrimFunc):
            loops: list[tirx.For] = []
            tvm_ffi.structural_walk(function.body, (tirx.For, loops.append))
            assert any(loop.kind == tirx.ForKind.THREAD_BINDING for loop in loops)


@pytest.mark.parametrize("parameters", [{"rows": 4, "vectors": 1}, {"rows": 12, "panel_rows": 0}, {"row_block": 16}])
def test_any_parameters_give_the_same_result(parameters: dict[str, int]) -> None:
    a, b = normal(37, 29), normal(29, 43, seed=1)
    plain = build(op.matmul, [a.shape, b.shape], ["float32", "float32"])
    functions = dict(plain.functions_items())
    for variable, function in functions.items():
        if isinstance(function, tirx.PrimFunc):
            functions[variable], report = schedule_function(function, TARGET, parameters)
            assert parameters.items() <= report.parameters.items()
    tuned, _ = scheduled(tvm.IRModule(functions))
    default, _ = scheduled(plain)
    np.testing.assert_array_equal(tuned(a, b), default(a, b))


def test_an_unknown_parameter_is_refused_with_the_known_ones() -> None:
    plain = build(op.matmul, [(4, 40), (40, 40)], ["float32", "float32"])
    function = next(f for _, f in plain.functions_items() if isinstance(f, tirx.PrimFunc))
    with pytest.raises(KeyError, match="it has rows, vectors"):
        schedule_function(function, TARGET, {"columns": 8})
