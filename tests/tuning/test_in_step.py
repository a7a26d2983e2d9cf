from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from onnx.parser import parse_model

from optimizer.compile import CompileOptions, plan_model
from optimizer.runtime.machine import resolve_thread_count
from optimizer.tuning.in_step import PlannedModel, StepError, compare_in_step
from optimizer.tuning.records import WorkloadKey
from optimizer.tuning.tasks import Sizes, tasks_of
from schedules.family import Parameters, defaults
from targets import get

_TARGET = get("x86-avx2")


def _model(folder: Path, *shapes: list[int | str]) -> Path:
    """Write a model that multiplies its inputs, one after the other."""
    inputs = [
        helper.make_tensor_value_info(f"x{place}", TensorProto.FLOAT, shape) for place, shape in enumerate(shapes)
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [shapes[0][0], shapes[-1][1]])
    nodes = [
        helper.make_node("MatMul", ["x0", "x1"], ["product"]),
        helper.make_node("MatMul", ["product", "x2"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "products", inputs, [result])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def _planned(path: Path, sizes: Sizes) -> tuple[PlannedModel, dict[WorkloadKey, Parameters]]:
    """Return a model with its plan and parameters for each of its kernels that are not the default."""
    options = CompileOptions(_TARGET, tuning_log=None)
    source, plan = plan_model(path, options)
    other: dict[WorkloadKey, Parameters] = {
        task.key: {**defaults(task.space), "rows": 12 if defaults(task.space)["rows"] != 12 else 4}
        for task in tasks_of(plan.lowered, sizes)
    }
    return PlannedModel(source, plan, options, sizes), other


def test_every_decision_is_measured_beside_the_default(tmp_path: Path) -> None:
    model, decided = _planned(_model(tmp_path, [64, 96], [96, 48], [48, 80]), {})
    measured = compare_in_step(model, decided, resolve_thread_count(None))
    assert measured.keys() == decided.keys()
    assert len(measured) == 2
    assert all(each.seconds > 0 and each.ratio > 0 for each in measured.values())


def test_steps_have_the_sizes_that_were_searched(tmp_path: Path) -> None:
    # Its two depths have to be equal, which only the sizes make them.
    path = _model(tmp_path, [8, "depth"], ["other", 8], [8, 8])
    model, decided = _planned(path, {"depth": 5, "other": 5})
    assert compare_in_step(model, decided, resolve_thread_count(None)).keys() == decided.keys()


def test_a_step_has_room_for_a_sliding_window_and_the_head_size_that_the_import_found(tmp_path: Path) -> None:
    model = parse_model("""
        <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        decoder (float[1, sequence, 128] packed, float[1, 2, past, head] past_key, float[1, 2, past, head] past_value,
                 int64[1, total] mask) => (float[1, sequence, 64] y, float[1, 2, a, b] key, float[1, 2, c, d] value) {
            one = Constant <value = int64 {1}> ()
            axes = Constant <value = int64[1] {1}> ()
            sum = ReduceSum <keepdims = 0> (mask, axes)
            before = Sub (sum, one)
            last = Cast <to = 6> (before)
            shape = Shape (mask)
            places = Gather <axis = 0> (shape, one)
            all = Cast <to = 6> (places)
            y, key, value = com.microsoft.GroupQueryAttention <
                num_heads = 4, kv_num_heads = 2, local_window_size = 12, sliding_window_cache = 1
            > (packed, , , past_key, past_value, last, all)
        }
    """)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    source, plan = plan_model(path, CompileOptions(_TARGET, tuning_log=None))
    decided = {task.key: defaults(task.space) for task in tasks_of(plan.lowered, {})}
    planned = PlannedModel(source, plan, CompileOptions(_TARGET, tuning_log=None), {})
    assert compare_in_step(planned, decided, resolve_thread_count(None)).keys() == decided.keys()


def test_a_model_that_does_not_run_is_an_error_with_the_reason(tmp_path: Path) -> None:
    path = _model(tmp_path, [8, "depth"], ["other", 8], [8, 8])
    model, decided = _planned(path, {"depth": 3, "other": 5})
    with pytest.raises(StepError, match="a step of the model fails"):
        compare_in_step(model, decided, resolve_thread_count(None))
