"""The process that builds and runs candidates, so that one that crashes or hangs takes nothing else with it.

It holds the built candidates of one task and is told over a pipe what to build and what to time. They run in the
process itself, or on a device that it has leased.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import tvm
from tvm import tirx

from optimizer.package.dtypes import numpy_dtype
from optimizer.runtime.device_server import Description
from optimizer.tuning import machines
from optimizer.tuning.machines import Address, Health, LostError, Machine, RemoteMachine, ThisMachine
from optimizer.tuning.peak import Peaks
from optimizer.tuning.tasks import Argument
from schedules.family import Parameters
from targets.base import Target

# One round of timing takes about this long, so that what wakes the threads and reads the clock does not count.
ROUND_SECONDS = 0.01
# TVM's function that drops all arguments but the first from a CPU's caches.
_FLUSH = "cache_flush_cpu_non_first_arg"
# Schedules sum in different orders, so results differ by rounding; a wrong schedule is off by whole elements.
WRONG = 1e-2
# A candidate that is this many times slower than the default in its first call is not timed again.
HOPELESS = 4


@dataclass(frozen=True)
class Lease:
    """Lease a device at `address`, or take this process where that is None."""

    address: Address | None
    threads: int | None


@dataclass(frozen=True)
class CheckHealth:
    """Run the reference kernel."""


@dataclass(frozen=True)
class MeasurePeaks:
    """Measure what the machine does at best with so many threads."""

    threads: int


@dataclass(frozen=True)
class SetTask:
    """Forget the last task; from now on build candidates for `function` (TVM's JSON) and call them with `arguments`."""

    function: str
    arguments: tuple[Argument, ...]
    outputs: int
    is_cold: bool


@dataclass(frozen=True)
class Build:
    """Build a candidate and check its outputs against those of the first one that was built."""

    parameters: Parameters


@dataclass(frozen=True)
class Time:
    """Time built candidates, one after the other, `rounds` times over; the first is the default."""

    candidates: tuple[int, ...]
    rounds: int


Command = Lease | CheckHealth | MeasurePeaks | SetTask | Build | Time
Answer = None | int | list[list[float]] | Description | Health | Peaks


class CandidateError(Exception):
    """A candidate cannot be used; the message says why."""


def serve(connection: Connection, target: Target) -> None:
    """Answer commands until the other side closes: ("ok", result), ("failed", reason), ("lost", reason).

    "lost" is the last answer: there is no device, or it does not answer any more.
    """
    bench = _Bench(target)
    while True:
        try:
            command: Command = connection.recv()
        except EOFError:
            return
        try:
            answer = "ok", bench.do(command)
        except LostError as error:
            answer = "lost", str(error)
        except Exception as error:  # whatever a schedule, LLVM or a kernel throws is one candidate's failure
            answer = ("failed" if bench.answers() else "lost"), last_line(error)
        connection.send(answer)
        if answer[0] == "lost":
            connection.close()
            os._exit(1)  # what is left of a broken session ends the process in other ways


def last_line(error: Exception) -> str:
    """Return the type of an error and the last line of its message, which may be empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


class _Bench:
    """A machine, and the task that it was given last."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._machine: Machine | None = None
        self._task: _TaskBench | None = None

    def do(self, command: Command) -> Answer:
        """Carry out one command."""
        if isinstance(command, Lease):
            return self._lease(command)
        assert self._machine is not None
        match command:
            case CheckHealth():
                return machines.reference_health(self._machine, self._target)
            case MeasurePeaks():
                return machines.measured_peaks(self._machine, self._target, command.threads)
            case SetTask():
                self._task = _TaskBench(command, self._target, self._machine)
                return None
            case Build():
                assert self._task is not None
                return self._task.build(command.parameters)
            case Time():
                assert self._task is not None
                return self._task.time(command.candidates, command.rounds)

    def _lease(self, command: Lease) -> Description:
        if command.address is None:
            assert command.threads is not None
            here = ThisMachine(self._target, command.threads)
            self._machine = here
            return here.describe()
        remote = RemoteMachine(command.address, self._target, command.threads)
        self._machine = remote
        return remote.description

    def answers(self) -> bool:
        """Return whether the machine is still there."""
        return self._machine is None or self._machine.answers()


class _TaskBench:
    """The candidates of one task, with arguments to call them with."""

    def __init__(self, task: SetTask, target: Target, machine: Machine) -> None:
        self._function: tirx.PrimFunc = tvm.ir.load_json(task.function)
        self._target = target
        self._machine = machine
        self._is_cold = task.is_cold and target.device == "cpu"
        generator = np.random.default_rng(0)
        self._arguments = [_argument(argument, generator, machine.device) for argument in task.arguments]
        self._results = [tensor for tensor in self._arguments[-task.outputs :] if not isinstance(tensor, int)]
        self._built: list[tvm.runtime.Module] = []
        self._expected: list[np.ndarray] = []

    def build(self, parameters: Parameters) -> int:
        """Return the number of the candidate."""
        built = self._machine.load(machines.build(self._function, self._target, parameters))
        self._check(built)
        self._built.append(built)
        return len(self._built) - 1

    def _check(self, built: tvm.runtime.Module) -> None:
        built["main"](*self._arguments)
        results = [tensor.numpy() for tensor in self._results]
        if not self._built:
            self._expected = [result.copy() for result in results]
            return
        for result, expected in zip(results, self._expected, strict=True):
            off = np.abs(result.astype(np.float64) - expected.astype(np.float64))
            scale = np.abs(expected.astype(np.float64))
            finite = np.isfinite(scale)
            if not np.array_equal(np.isfinite(result.astype(np.float64)), finite):
                raise CandidateError("wrong result: other elements are finite")
            if finite.any() and off[finite].max() > WRONG * max(1.0, scale[finite].max()):
                raise CandidateError(f"wrong result: off by {off[finite].max():.1e}")

    def time(self, candidates: tuple[int, ...], rounds: int) -> list[list[float]]:
        """Return seconds per call for each candidate and round; one time only for a hopeless one."""
        once = [self._evaluate(candidate, 1) for candidate in candidates]
        times: list[list[float]] = [[seconds] if seconds > HOPELESS * once[0] else [] for seconds in once]
        for _ in range(rounds):
            for candidate, seconds, taken in zip(candidates, once, times, strict=True):
                if seconds <= HOPELESS * once[0]:
                    taken.append(self._evaluate(candidate, max(1, math.ceil(ROUND_SECONDS / max(seconds, 1e-7)))))
        return times

    def _evaluate(self, candidate: int, calls: int) -> float:
        built, device = self._built[candidate], self._machine.device
        if not self._is_cold:
            return float(built.time_evaluator("main", device, number=calls, repeat=1)(*self._arguments).results[0])
        # As in a step, whose other kernels' weights have been there since: else what reads them again and again wins.
        cold = built.time_evaluator("main", device, number=1, repeat=calls, f_preproc=_FLUSH)
        return float(np.median(cold(*self._arguments).results))


def _argument(
    argument: Argument, generator: np.random.Generator, device: tvm.runtime.Device
) -> tvm.runtime.Tensor | int:
    """Return random values: floats about 0, integers 0 or 1 (valid as an index), bytes of packed weights any."""
    if argument.scalar is not None:
        return argument.scalar
    dtype = numpy_dtype(argument.dtype)
    if argument.dtype in ("int8", "uint8"):
        values = generator.integers(0, 100, argument.shape).astype(dtype)
    elif argument.dtype == "bool" or argument.dtype.startswith(("int", "uint")):
        values = generator.integers(0, 2, argument.shape).astype(dtype)
    else:
        values = (generator.standard_normal(argument.shape) * 0.25).astype(dtype)
    return tvm.runtime.tensor(values, device)
