"""What can be chosen of a GPU's kernels: every choice binds loops to threads. That they compute right needs a GPU."""

from __future__ import annotations

import inspect

import pytest
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.s_tir.schedule import ScheduleError
from tvm.script import tirx as T  # noqa: N812 - as TVM writes it

import targets
from optimizer.lowering import lower
from optimizer.tuning import machines
from optimizer.tuning.tasks import Task, tasks_of
from schedules import cuda, schedule_function
from schedules.family import Space, defaults
from schedules.loops import prefetch
from targets.base import Target
from tests.passes.graph import graph

CUDA: Target = targets.get("cuda", ["sm_80"])


def task(dtype: str = "float32", rows: int | str = 200, inner: int = 96, columns: int = 130) -> Task:
    """Return the task of a product with sums in fp32 and a ReLU."""
    module = graph(
        lambda x, w: relax.op.nn.relu(relax.op.matmul(x, w, out_dtype="float32")),
        (rows, inner),
        (inner, columns),
        dtype=dtype,
    )
    (found,) = tasks_of(lower(module, CUDA), {})
    return found


def elementwise() -> Task:
    """Return the task of a ReLU."""
    (found,) = tasks_of(lower(graph(relax.op.nn.relu, (500, 300)), CUDA), {})
    return found


def softmax() -> Task:
    """Return the task of a softmax."""
    (found,) = tasks_of(lower(graph(relax.op.nn.softmax, ("rows", 300)), CUDA), {})
    return found


def source(task: Task, parameters: dict[str, int]) -> str:
    """Return the CUDA C++ of a task's kernel."""
    module = machines.build(task.function, CUDA, parameters).mod  # pyright: ignore[reportAttributeAccessIssue]
    (device,) = module._collect_from_import_tree(lambda imported: imported.kind == "cuda")
    return device.inspect_source("cuda")


def threads_of(function: tirx.PrimFunc) -> set[int]:
    """Return the extents of the loops along threadIdx.x."""
    loops: list[tirx.For] = []
    tvm_ffi.structural_walk(function.body, (tirx.For, loops.append))
    return {
        int(loop.extent)
        for loop in loops
        if loop.kind == tirx.ForKind.THREAD_BINDING and loop.thread_binding.thread_tag == "threadIdx.x"
    }


def test_products_of_16_bit_floats_may_do_without_tensor_cores() -> None:
    half = task("float16", rows=128, columns=128)
    assert defaults(half.space) == {"tensor_cores": 1}
    assert "wmma::mma_sync" in source(half, {"tensor_cores": 1})
    assert "wmma" not in source(half, {"tensor_cores": 0})


def test_stacks_have_their_lines_of_source_afterwards() -> None:
    schedule_function(task("float16", rows=128, columns=128).function, CUDA)
    assert "inspect.stack" in "".join(inspect.stack()[0].code_context or ())


@pytest.mark.parametrize("narrow", [task("float32"), task("float16", inner=64)], ids=["fp32", "short"])
def test_other_products_have_tiles(narrow: Task) -> None:
    assert {choice.name for choice in narrow.space} >= {"threads_x", "tile_x", "tile_k"}


def points(space: Space) -> st.SearchStrategy[dict[str, int]]:
    """Draw parameters of a space."""
    return st.fixed_dictionaries({choice.name: st.sampled_from(choice.candidates) for choice in space})


@settings(max_examples=10)
@given(points(task().space), st.sampled_from([task(), task(rows="rows"), task(rows=7, inner=13)]))
def test_tiles_of_any_size_bind_threads(parameters: dict[str, int], product: Task) -> None:
    function, report = schedule_function(product.function, CUDA, parameters)
    assert threads_of(function) == {parameters["threads_x"]}
    assert report.parameters == parameters


def test_a_block_has_the_threads_that_were_chosen() -> None:
    assert threads_of(schedule_function(elementwise().function, CUDA, {"threads": 64})[0]) == {64}


def test_a_reduction_may_take_a_later_rule() -> None:
    found = softmax()
    (rule,) = found.space
    general, fallback = (schedule_function(found.function, CUDA, {"rule": place})[0] for place in rule.candidates)
    assert threads_of(general) != threads_of(fallback)


@pytest.fixture
def no_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no rule bind anything in blocks of 64 threads."""
    is_bound = cuda._is_bound
    monkeypatch.setattr(cuda, "_is_bound", lambda function: is_bound(function) and threads_of(function) != {64})


@pytest.mark.usefixtures("no_small_blocks")
def test_parameters_that_bind_nothing_are_refused() -> None:
    with pytest.raises(ScheduleError, match="'threads': 64"):
        schedule_function(elementwise().function, CUDA, {"threads": 64})


@pytest.mark.usefixtures("no_small_blocks")
def test_a_decision_that_binds_nothing_leaves_the_default_and_a_reason() -> None:
    function, report = schedule_function(elementwise().function, CUDA, decide=lambda _: {"threads": 64})
    assert threads_of(function) == {1024}
    assert not report.tuned
    assert "'threads': 64" in report.reason


def test_a_decision_is_reported() -> None:
    function, report = schedule_function(elementwise().function, CUDA, decide=lambda _: {"threads": 128})
    assert threads_of(function) == {128}
    assert (report.tuned, report.parameters) == (True, {"threads": 128})


def test_a_thread_in_order_asks_for_no_lines() -> None:
    @T.prim_func(s_tir=True)
    def asking(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
        for i in range(64):
            T.evaluate(prefetch(x[i]).value)
            y[i] = x[i]

    assert "prefetch" in asking.script()
    assert "prefetch" not in schedule_function(asking, CUDA)[0].script()
