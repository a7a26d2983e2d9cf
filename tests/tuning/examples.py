"""Records, tasks and a stand-in for measuring processes that the tuning tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tvm import relax

import targets
from optimizer.lowering import lower
from optimizer.tuning.pool import Measurement
from optimizer.tuning.process import FailedError
from optimizer.tuning.records import Origin, Record, target_digest
from optimizer.tuning.tasks import Task, tasks_of
from schedules.family import Parameters, defaults
from schedules.matmul import Matmul
from targets.base import Target
from tests.passes.graph import graph

TARGET: Target = targets.get("x86-avx2")
ORIGIN = Origin(TARGET.name, target_digest(TARGET), "a CPU", 2, "0.27.0", "0.1.0")
RECORD = Record(
    kind="decision",
    workload="0123456789abcdef",
    family="matmul",
    version=Matmul.version,
    description="matmul 8x8 over 8 float32",
    parameters={"rows": 8, "vectors": 2},
    seconds=1e-4,
    spread=0.1,
    ratio=0.5,
    failure="",
    origin=ORIGIN,
    features={"bytes": 10.0},
)


def matmul_task(rows: int | str = 96, columns: int = 64, inner: int = 48, target: Target = TARGET) -> Task:
    """Return the task of one matrix product of two inputs."""
    module = graph(relax.op.matmul, (rows, inner), (inner, columns))
    (task,) = tasks_of(lower(module, target), {"rows": 24})
    return task


class Bench:
    """A stand-in for BenchPool: times are what `seconds` returns, and an exception is a failure of that candidate."""

    def __init__(self, seconds: Callable[[Task, Parameters], float]) -> None:
        self._seconds = seconds
        self.measured: list[Parameters] = []

    def measure_defaults(self, tasks: Sequence[Task]) -> list[Measurement]:
        """Return the times of the defaults."""
        return [self._one(task, defaults(task.space), None) for task in tasks]

    def measure(self, task: Task, candidates: Sequence[Parameters], rounds: int) -> list[Measurement]:
        """Return times without noise."""
        del rounds
        try:
            default = self._seconds(task, defaults(task.space))
        except ArithmeticError as error:
            raise FailedError(str(error)) from error
        self.measured += candidates
        return [Measurement(default, 0.0, 1.0), *(self._one(task, parameters, default) for parameters in candidates)]

    def _one(self, task: Task, parameters: Parameters, default: float | None) -> Measurement:
        try:
            seconds = self._seconds(task, parameters)
        except ArithmeticError as error:
            return Measurement(failure=str(error))
        return Measurement(seconds, 0.0, seconds / (default or seconds))


def decision_for(task: Task, parameters: Parameters, ratio: float = 0.5) -> Record:
    """Return a decision of `task`."""
    return replace(
        RECORD,
        workload=task.workload,
        family=task.family,
        version=task.version,
        parameters=dict(parameters),
        ratio=ratio,
    )
