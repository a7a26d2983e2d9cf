from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from optimizer.lowering import lower
from optimizer.tuning import tasks
from optimizer.tuning.tasks import Argument, features_of, tasks_of
from tests.passes.graph import graph
from tests.tuning.examples import TARGET, matmul_task


def test_a_task_knows_the_arguments_of_its_call() -> None:
    task = matmul_task(96, 64, 48)
    assert task.arguments == (
        Argument("float32", (96, 48)),
        Argument("float32", (48, 64)),
        Argument("float32", (96, 64)),
    )
    assert (task.outputs, task.calls, task.family) == (1, 1, "matmul")
    assert task.bytes == 4 * (96 * 48 + 48 * 64 + 96 * 64)


def test_symbolic_dimensions_take_the_given_sizes() -> None:
    assert matmul_task("rows").arguments[0] == Argument("float32", (24, 48))


def test_a_size_that_nobody_gave_is_that_of_a_short_prompt() -> None:
    module = graph(relax.op.matmul, ("tokens", 48), (48, 64))
    (task,) = tasks_of(lower(module, TARGET), {})
    assert task.arguments[0].shape == (8, 48)


def test_equal_workloads_are_one_task_with_several_calls() -> None:
    module = graph(lambda x, y: relax.op.matmul(relax.op.matmul(x, y), y), (64, 64), (64, 64))
    (task,) = tasks_of(lower(module, TARGET), {})
    assert task.calls == 2


def test_names_do_not_make_another_workload() -> None:
    module = graph(lambda first, second: relax.op.matmul(x1=first, x2=second), (96, 48), (48, 64))
    (task,) = tasks_of(lower(module, TARGET), {})
    assert task.workload == matmul_task().workload


def test_other_sizes_are_another_workload_with_other_features() -> None:
    small, large = matmul_task(96), matmul_task(97)
    assert small.workload != large.workload
    assert features_of(small) != features_of(large)


def test_operations_are_those_of_one_call_at_its_sizes() -> None:
    assert matmul_task(96, 64, 48).operations == 2 * 96 * 64 * 48
    assert matmul_task("rows", 64, 48).operations == 2 * 24 * 64 * 48
    assert matmul_task().operands == "float32"


@pytest.mark.parametrize(("cached", "is_cold"), [(4 * 48 * 64, False), (4 * 48 * 64 - 1, True)])
def test_weights_that_no_cache_holds_come_from_memory(
    cached: int, is_cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "LAST_CACHE_BYTES", cached)
    weights = relax.const(np.ones((48, 64), np.float32))
    module = graph(lambda x: relax.op.matmul(x, weights), (96, 48))
    (task,) = tasks_of(lower(module, TARGET), {})
    assert task.is_cold == is_cold
