"""One measuring process, replaced when it crashes or hangs, and the device that it leases."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

import tvm

from optimizer.runtime.device_server import Description
from optimizer.tuning.bench import Build, CheckHealth, Command, Lease, MeasurePeaks, SetTask, Time, serve
from optimizer.tuning.machines import Address, Health, LostError
from optimizer.tuning.peak import Peaks
from optimizer.tuning.tasks import Task
from schedules.family import Parameters, defaults
from targets.base import Target

BUILD_SECONDS = 120.0
TIME_SECONDS = 60.0
START_SECONDS = 180.0
# A tracker that has no free device answers when one comes back.
LEASE_SECONDS = 120.0

_Result = TypeVar("_Result")


class DiedError(Exception):
    """A process crashed or did not answer in time; the message says which."""


class FailedError(Exception):
    """A process answered that a command failed; the message says why."""


@dataclass(frozen=True)
class Times:
    """Seconds of a call in each round, of a candidate and of the default; of a hopeless candidate one alone."""

    own: Sequence[float]
    default: Sequence[float]


class BenchProcess:
    """A process, started when first needed and again after it died. All methods raise LostError without a device.

    A device whose reference kernel takes over `slowest` seconds is not accepted.
    """

    def __init__(self, target: Target, threads: int | None, address: Address | None) -> None:
        self._target = target
        self._threads = threads
        self._address = address
        self._context = multiprocessing.get_context("spawn")
        self._process: BaseProcess | None = None
        self._health: Health | None = None
        self._task: Task | None = None
        self._built: list[Parameters] = []
        self.slowest: float | None = None

    def lease(self) -> Description:
        """Return what runs the candidates."""
        self.stop()
        return self._start()

    def check_health(self) -> Health:
        """Return what the device makes of the reference kernel."""
        try:
            self._health = cast("Health", self._ask(CheckHealth(), BUILD_SECONDS))
        except (DiedError, FailedError) as error:
            raise LostError(f"{self._address}: the reference kernel fails: {error}") from error
        return self._health

    def require_healthy(self) -> None:
        """Raise LostError where the reference kernel's result was wrong or it was too slow."""
        health = self._health or self.check_health()
        if not health.right:
            raise LostError(f"{self._address}: the reference kernel's result is wrong")
        if self.slowest is not None and health.seconds > self.slowest:
            raise LostError(
                f"{self._address}: the reference kernel takes {health.seconds * 1e3:.2f} ms, "
                f"over the limit of {self.slowest * 1e3:.2f} ms"
            )

    def measure_peaks(self, threads: int) -> Peaks:
        """Return what the machine does at best; raises DiedError or FailedError."""
        return cast("Peaks", self._ask(MeasurePeaks(threads), BUILD_SECONDS))

    def begin(self, task: Task) -> None:
        """Build the default schedule of a task, unless that was done; raises FailedError where that fails."""
        if self._task is task and self._process is not None:
            return
        self._task, self._built = task, []
        try:
            self._again_if_it_died(self._start_task)
        except (DiedError, FailedError) as error:
            self.stop()
            raise FailedError(f"the default schedule: {error}") from error

    def build(self, parameters: Parameters) -> int | str:
        """Return the number of a candidate, or why there is none."""

        def build() -> int:
            self._ask(Build(parameters), BUILD_SECONDS)
            self._built.append(parameters)
            return len(self._built) - 1

        try:
            return self._again_if_it_died(build)
        except FailedError as error:
            return str(error)
        except DiedError as error:
            self._recover()
            return f"{error} while it was built or first run"

    def time(self, numbers: Sequence[int | str], rounds: int) -> list[Times | str]:
        """Return the times of each number, and the failure itself for what is none."""
        good = [number for number in numbers if isinstance(number, int)]
        measured: dict[int, Times | str] = {}
        try:
            measured.update(zip(good, self._time(good, rounds), strict=True))
        except (DiedError, FailedError):
            measured.update((number, self._time_alone(number, rounds)) for number in good)
        return [number if isinstance(number, str) else measured[number] for number in numbers]

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
            self._health = None

    def _time_alone(self, number: int, rounds: int) -> Times | str:
        try:
            self._recover()
            return self._time([number], rounds)[0]
        except (DiedError, FailedError) as error:
            return f"{error} while it was timed"

    def _time(self, numbers: Sequence[int], rounds: int) -> list[Times]:
        with_default = [0, *(number for number in numbers if number)]
        answer = self._ask(Time(tuple(with_default), rounds), TIME_SECONDS * len(with_default))
        assert isinstance(answer, list)
        return [Times(times, answer[0]) for times in answer[1 - (0 in numbers) :]]

    def _again_if_it_died(self, act: Callable[[], _Result]) -> _Result:
        """Return what `act` returns; where a device died in the middle, what it returns on another one."""
        try:
            return act()
        except DiedError:
            if self._address is None:
                raise
            self._recover()
            return act()

    def _recover(self) -> None:
        """Start again and build again what had been built; raises FailedError where that fails."""
        self.stop()
        built = self._built[1:]
        try:
            self._start_task()
            for parameters in built:
                self._ask(Build(parameters), BUILD_SECONDS)
                self._built.append(parameters)
        except DiedError as error:
            raise FailedError(f"what was built before: {error}") from error

    def _start_task(self) -> None:
        assert self._task is not None
        if self._process is None:
            self._start()
            if self._address is not None:
                self.require_healthy()
        task, default = self._task, defaults(self._task.space)
        self._ask(SetTask(tvm.ir.save_json(task.function), task.arguments, task.outputs, task.is_cold), START_SECONDS)
        self._ask(Build(default), BUILD_SECONDS)
        self._built = [default]

    def _start(self) -> Description:
        self._connection, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self._target), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        try:
            return cast("Description", self._ask(Lease(self._address, self._threads), LEASE_SECONDS))
        except DiedError as error:
            raise LostError(f"{self._address or 'the measuring process'}: {error}") from error

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
        if status == "lost":
            if isinstance(command, Lease):
                raise LostError(str(result))
            raise DiedError(f"the device was lost ({result})")
        return result
