"""Time per call of something that runs many times, with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the tenth and ninetieth percentile, over `runs` calls."""

    median: float
    low: float
    high: float
    runs: int


def measure(
    call: Callable[[], object], *, seconds: float = 1.0, most_runs: int = 200, after: Callable[[], None] | None = None
) -> Timing:
    """Call repeatedly for about `seconds` after one warm-up call, at least 3 times. `after` is called after each."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < most_runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if after is not None:
            after()
    low, median, high = np.percentile(times, (10, 50, 90))
    return Timing(float(median), float(low), float(high), len(times))
