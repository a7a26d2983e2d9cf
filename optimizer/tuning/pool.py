"""Processes that build candidates side by side and time them one after the other, replaced when they crash or hang."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import TracebackType

import numpy as np
import tvm

from optimizer.tuning.bench import Build, Command, SetTask, Time, serve
from optimizer.tuning.tasks import Task
from schedules.family import Parameters, defaults
from targets.base import Target

BUILD_SECONDS = 120.0
TIME_SECONDS = 60.0
START_SECONDS = 180.0


@dataclass(frozen=True)
class Measurement:
    """Median seconds of a call, the central 80 % of it relative to that, and the median ratio to the default.

    All 0 where `failure` says why the candidate was not measured.
    """

    seconds: float = 0.0
    spread: float = 0.0
    ratio: float = 0.0
    failure: str = ""


class DiedError(Exception):
    """A process crashed or did not answer in time; the message says which."""


class FailedError(Exception):
    """A process answered that a command failed; the message says why."""


class BenchPool:
    """`processes` processes for the candidates of one task at a time, run with `threads` threads each."""

    def __init__(self, target: Target, threads: int, processes: int = 2) -> None:
        self._processes = [_Process(target, threads) for _ in range(processes)]
        self._task: Task | None = None

    def __enter__(self) -> BenchPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End all processes, whatever they are doing; the next measurement starts new ones."""
        for process in self._processes:
            process.stop()

    def measure_defaults(self, tasks: Sequence[Task]) -> Iterator[Measurement]:
        """Yield a measurement of each task's default schedule, with the reason where there is none."""
        count = len(self._processes)
        for first in range(0, len(tasks), count):
            chosen = list(zip(self._processes, tasks[first : first + count], strict=False))
            with ThreadPoolExecutor(count) as executor:
                failures = list(executor.map(lambda pair: pair[0].begin(pair[1]), chosen))
            for (process, _), failure in zip(chosen, failures, strict=True):
                yield Measurement(failure=failure) if failure else process.time([0], 1)[0]

    def measure(self, task: Task, candidates: Sequence[Parameters], rounds: int) -> list[Measurement]:
        """Return a measurement of the default schedule, and after it of each candidate in the same rounds.

        Raises FailedError where the default itself cannot be built or run.
        """
        count = len(self._processes)
        # The default is measured in each process; where there are no candidates the first is enough.
        working = self._processes[: max(1, min(count, len(candidates)))]
        shares = [candidates[position::count] for position in range(len(working))]
        with ThreadPoolExecutor(count) as executor:
            built = list(executor.map(lambda process, share: process.build(task, share), working, shares))
        results = [Measurement()] * (1 + len(candidates))
        # The kernels use all cores: one process at a time runs them.
        for position, (process, numbers) in enumerate(zip(working, built, strict=True)):
            results[0], *results[1 + position :: count] = process.time([0, *numbers], rounds)
        if results[0].failure:
            raise FailedError(f"the default schedule: {results[0].failure}")
        return results


class _Process:
    """One process, started when first needed and again after it died."""

    def __init__(self, target: Target, threads: int) -> None:
        self._target = target
        self._threads = threads
        self._context = multiprocessing.get_context("spawn")
        self._process: BaseProcess | None = None
        self._task: Task | None = None
        self._built: list[Parameters] = []

    def begin(self, task: Task) -> str:
        """Build the default schedule of a task; return why that fails, or nothing."""
        try:
            self._begin(task)
        except FailedError as error:
            return str(error)
        return ""

    def build(self, task: Task, candidates: Sequence[Parameters]) -> list[int | str]:
        """Return the number of each candidate, or why there is none; raises FailedError where the default fails."""
        self._begin(task)
        return [self._build(parameters) for parameters in candidates]

    def _build(self, parameters: Parameters) -> int | str:
        try:
            self._ask(Build(parameters), BUILD_SECONDS)
        except FailedError as error:
            return str(error)
        except DiedError as error:
            self._recover()
            return f"{error} while it was built or first run"
        self._built.append(parameters)
        return len(self._built) - 1

    def time(self, numbers: Sequence[int | str], rounds: int) -> list[Measurement]:
        """Return a measurement for each number, and the failure itself for what is none."""
        good = [number for number in numbers if isinstance(number, int)]
        try:
            measured = dict(zip(good, self._time(good, rounds), strict=True))
        except (DiedError, FailedError):
            measured = {number: self._time_alone(number, rounds) for number in good}
        return [Measurement(failure=number) if isinstance(number, str) else measured[number] for number in numbers]

    def _time_alone(self, number: int, rounds: int) -> Measurement:
        try:
            self._recover()
            return self._time([number], rounds)[0]
        except (DiedError, FailedError) as error:
            return Measurement(failure=f"{error} while it was timed")

    def _time(self, numbers: Sequence[int], rounds: int) -> list[Measurement]:
        with_default = [0, *(number for number in numbers if number)]
        answer = self._ask(Time(tuple(with_default), rounds), TIME_SECONDS * len(with_default))
        assert isinstance(answer, list)
        return [_measurement(times, answer[0]) for times in answer[1 - (0 in numbers) :]]

    def _begin(self, task: Task) -> None:
        if self._task is task and self._process is not None:
            return
        self._task, self._built = task, []
        try:
            self._start_task()
        except (DiedError, FailedError) as error:
            self.stop()
            raise FailedError(f"the default schedule: {error}") from error

    def _recover(self) -> None:
        """Start again and build again what had been built."""
        self.stop()
        built, self._built = self._built[1:], []
        self._start_task()
        for parameters in built:
            self._ask(Build(parameters), BUILD_SECONDS)
            self._built.append(parameters)

    def _start_task(self) -> None:
        assert self._task is not None
        if self._process is None:
            self._start()
        task = self._task
        self._ask(SetTask(tvm.ir.save_json(task.function), task.arguments, task.outputs), START_SECONDS)
        default = defaults(task.space)
        self._ask(Build(default), BUILD_SECONDS)
        self._built.append(default)

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self._target, self._threads), daemon=True)
        process.start()
        self._process = process
        theirs.close()

    def _ask(self, command: Command, seconds: float) -> object:
        try:
            self._connection.send(command)
            if not self._connection.poll(seconds):
                raise DiedError(f"no answer within {seconds:.0f} s")
            status, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise DiedError("the process crashed") from error
        if status == "failed":
            raise FailedError(str(result))
        return result

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _measurement(times: Sequence[float], default: Sequence[float]) -> Measurement:
    low, median, high = np.percentile(times, (10, 50, 90))
    if len(times) < len(default):  # timed once: hopeless
        return Measurement(float(median), 0.0, float(median) / statistics.median(default))
    ratio = statistics.median(own / other for own, other in zip(times, default, strict=True))
    return Measurement(float(median), float((high - low) / median), ratio)
