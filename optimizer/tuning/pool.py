"""What measures candidates: processes that build side by side, each running them itself or on a device of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np

from optimizer.errors import TuningError
from optimizer.runtime.device_server import Description
from optimizer.tuning.machines import Address, LostError
from optimizer.tuning.peak import Peaks
from optimizer.tuning.process import BenchProcess, DiedError, FailedError, Times
from optimizer.tuning.tasks import Task
from schedules.family import Parameters
from targets.base import Target

# A device whose reference kernel takes this many times as long as the fastest one's is another machine, or is busy.
SLOW = 1.5
# A kernel's first calls are slower: threads of the process that built beside it may still spin.
DEFAULT_ROUNDS = 5

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Measurement:
    """Median seconds of a call, the central 80 % of it relative to that, and the median ratio to the default.

    All 0 where `failure` says why the candidate was not measured.
    """

    seconds: float = 0.0
    spread: float = 0.0
    ratio: float = 0.0
    failure: str = ""


class BenchPool:
    """Measures the candidates of one task at a time with `threads` threads (None: as many as the device has cores).

    Without an `address` `processes` processes build, and one after the other runs what it built, since the kernels use
    all cores. With one there are as many as devices, and each runs what it built whenever it is ready. A device that
    is lost, wrong or slow returns its work to the others; `refused` says why each was given up.
    """

    def __init__(self, target: Target, threads: int | None, processes: int = 2, address: Address | None = None) -> None:
        self._target = target
        self._devices = address is not None
        self._processes = [BenchProcess(target, threads, address) for _ in range(processes)]
        self.refused: list[str] = []

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

    @property
    def size(self) -> int:
        """Return how many processes, or devices, there are left."""
        return len(self._processes)

    def open(self) -> Description:
        """Lease all devices, keep those that compute right and as fast as the fastest, and return what they are.

        Raises TuningError where none is left, or where they are of several kinds.
        """
        described = self._on_all(lambda process: process.lease())
        kinds = sorted({(each.cpu, each.threads) for each in described})
        if len(kinds) > 1:
            raise TuningError(
                f"the devices are of several kinds: {', '.join(f'{cpu} ({cores} cores)' for cpu, cores in kinds)}; "
                "give each kind a key of its own, since their times cannot be compared"
            )
        lacking = sorted(set(self._target.features) - set(described[0].features))
        if described[0].architecture != self._target.architecture or lacking:
            what = f"lacks {', '.join(lacking)}" if lacking else f"is {described[0].architecture}"
            raise TuningError(f"the device {what}: it cannot run code for {self._target.name}")
        if self._devices:
            self._check_health()
        return described[0]

    def measure_peaks(self, threads: int) -> Peaks | None:
        """Return what one of the machines does at best, None where that cannot be measured."""
        try:
            return self._processes[0].measure_peaks(threads)
        except (DiedError, FailedError):
            self._processes[0].stop()
            return None

    def _check_health(self) -> None:
        # One after the other, in case several share a machine.
        taken = [self._attempt(process.check_health, process) for process in list(self._processes)]
        healthy = [health for health in taken if health is not None]
        if healthy:
            limit = SLOW * min(health.seconds for health in healthy)
            for process in self._processes:
                process.slowest = limit
            for process in list(self._processes):
                self._attempt(process.require_healthy, process)
        self._require_any()

    def measure_defaults(self, tasks: Sequence[Task]) -> Iterator[Measurement]:
        """Yield a measurement of each task's default schedule, with the reason where there is none."""
        done = 0
        while done < len(tasks):
            chosen = tasks[done : done + len(self._processes)]
            for measured in self._measured_defaults(chosen):
                if measured is None:  # its device was lost: it and those after it come again
                    break
                done += 1
                yield measured

    def _measured_defaults(self, tasks: Sequence[Task]) -> list[Measurement | None]:
        pairs = list(zip(self._processes, tasks, strict=False))

        def begin(pair: tuple[BenchProcess, Task]) -> str:
            try:
                pair[0].begin(pair[1])
            except FailedError as error:
                return str(error)
            return ""

        begun = self._together(begin, pairs)

        def time(place: int) -> Measurement | None:
            failure = begun[place]
            if failure:
                return Measurement(failure=failure)
            if failure is None:
                return None
            process = pairs[place][0]
            times = self._attempt(lambda: process.time([0], DEFAULT_ROUNDS), process)
            return None if times is None else measurement_of(times[0])

        return [time(place) for place in range(len(pairs))]

    def measure(self, task: Task, candidates: Sequence[Parameters], rounds: int) -> list[Measurement]:
        """Return a measurement of the default schedule, and after it of each candidate in the same rounds.

        Raises FailedError where the default itself cannot be built or run, TuningError where no device is left.
        """
        default: Measurement | None = None
        results: dict[int, Measurement] = {}
        while default is None or len(results) < len(candidates):
            left = [position for position in range(len(candidates)) if position not in results]
            # The default is measured in each process; where there are no candidates the first is enough.
            working = self._processes[: max(1, len(left))]
            shares = [left[number :: len(working)] for number in range(len(working))]
            for share, measured in zip(shares, self._shares(task, working, candidates, shares, rounds), strict=True):
                if measured is not None:
                    default = default or measured[0]
                    results.update(zip(share, measured[1:], strict=True))
        if default.failure:
            raise FailedError(f"the default schedule: {default.failure}")
        return [default, *(results[position] for position in range(len(candidates)))]

    def _shares(
        self,
        task: Task,
        working: Sequence[BenchProcess],
        candidates: Sequence[Parameters],
        shares: Sequence[Sequence[int]],
        rounds: int,
    ) -> list[list[Measurement] | None]:
        """Return the measurements of each process, the default's first; None where its device was lost."""

        def build(pair: tuple[BenchProcess, Sequence[int]]) -> list[int | str]:
            process, share = pair
            process.begin(task)
            return [process.build(candidates[position]) for position in share]

        def time(pair: tuple[BenchProcess, list[int | str] | None]) -> list[Measurement] | None:
            process, numbers = pair
            if numbers is None:
                return None
            return list(map(measurement_of, process.time([0, *numbers], rounds)))

        built = self._together(build, list(zip(working, shares, strict=True)))
        pairs = list(zip(working, built, strict=True))
        if self._devices:
            return self._together(time, pairs)
        return [time(pair) for pair in pairs]

    def _on_all(self, act: Callable[[BenchProcess], _Result]) -> list[_Result]:
        """Return what each process answers, without those that are lost; raises TuningError if all are."""
        answers = self._together(lambda pair: act(pair[0]), [(process, None) for process in self._processes])
        self._require_any()
        return [answer for answer in answers if answer is not None]

    def _together(
        self, act: Callable[[tuple[BenchProcess, _Item]], _Result], pairs: Sequence[tuple[BenchProcess, _Item]]
    ) -> list[_Result | None]:
        """Return the result for each pair at the same time, None where the process's device is lost."""
        with ThreadPoolExecutor(max(1, len(pairs))) as executor:
            results = list(executor.map(lambda pair: self._attempt(lambda: act(pair), pair[0]), pairs))
        self._require_any()
        return results

    def _attempt(self, act: Callable[[], _Result], process: BenchProcess) -> _Result | None:
        """Return what `act` returns; give up the process if its device is lost."""
        try:
            return act()
        except LostError as error:
            process.stop()
            self._processes.remove(process)
            self.refused.append(str(error))
            return None

    def _require_any(self) -> None:
        if not self._processes:
            raise TuningError(f"no device is left: {'; '.join(dict.fromkeys(self.refused))}")


def measurement_of(times: Times | str) -> Measurement:
    """Return what the times of a candidate, and of the default in the same rounds, come to."""
    if isinstance(times, str):
        return Measurement(failure=times)
    low, median, high = np.percentile(times.own, (10, 50, 90))
    if len(times.own) < len(times.default):  # timed once: hopeless
        return Measurement(float(median), 0.0, float(median) / statistics.median(times.default))
    ratio = statistics.median(own / other for own, other in zip(times.own, times.default, strict=True))
    return Measurement(float(median), float((high - low) / median), ratio)
