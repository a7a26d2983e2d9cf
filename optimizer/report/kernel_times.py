"""How the time of a call divides between the kernels of a package, with the ONNX nodes that each computes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from optimizer.package.manifest import SEVERAL_KERNELS
from optimizer.runtime.model import CompiledModel


@dataclass(frozen=True)
class KernelTime:
    """Median seconds of all `calls` of a kernel in one call of the model, and the ONNX nodes that they compute."""

    name: str
    family: str
    calls: int
    seconds: float
    nodes: tuple[str, ...]


def kernel_times(model: CompiledModel, call: Callable[[], object], *, runs: int) -> tuple[KernelTime, ...]:
    """Return the kernels that `call` ran, those that take longest first, over `runs` calls after one to warm up.

    Kernels that a step of a single row goes through in one launch are one row, without nodes. The model stays observed,
    which costs each kernel's call about a microsecond.
    """
    call()
    rounds = [Stopwatch() for _ in range(runs)]
    for stopwatch in rounds:
        model.observe(stopwatch)
        call()
    found = [
        KernelTime(
            kernel.name,
            kernel.family,
            rounds[-1].calls[kernel.name],
            statistics.median(each.seconds.get(kernel.name, 0.0) for each in rounds),
            tuple(dict.fromkeys(node for nodes in kernel.nodes for node in nodes)),
        )
        for kernel in model.manifest.kernels
        if kernel.name in rounds[-1].calls
    ]
    found += [
        KernelTime(name, "one-launch", calls, statistics.median(each.seconds.get(name, 0.0) for each in rounds), ())
        for name, calls in rounds[-1].calls.items()
        if name.startswith(SEVERAL_KERNELS)
    ]
    return tuple(sorted(found, key=lambda kernel: -kernel.seconds))


class Stopwatch:
    """Adds up the time between the beginning and the end of functions by their names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._began: list[float] = []

    def __call__(self, name: str, before: bool) -> None:
        now = time.perf_counter()
        if before:
            self._began.append(now)
            return
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began.pop()
        self.calls[name] = self.calls.get(name, 0) + 1
