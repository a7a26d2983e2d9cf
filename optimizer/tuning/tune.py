"""Tuning a model: plan it with default schedules, search, and leave the decisions in the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import targets
from optimizer.compile import CompileOptions, plan_model
from optimizer.errors import TuningError
from optimizer.progress import Watcher
from optimizer.runtime.threads import resolve_thread_count
from optimizer.tuning.log import TuningLog
from optimizer.tuning.pool import BenchPool
from optimizer.tuning.records import origin_of
from optimizer.tuning.session import Budget, Progress, TuningSession
from optimizer.tuning.tasks import Sizes, tasks_of
from targets.execution import how_executed


@dataclass(frozen=True)
class TuneOptions:
    """How to tune: `log` is the folder of all targets' logs, `sizes` the symbolic dimensions to measure at."""

    log: Path
    budget: Budget
    sizes: Sizes
    threads: int | None = None


def tune_model(
    model: Path,
    options: CompileOptions,
    tuning: TuneOptions,
    watcher: Watcher | None = None,
    watch: Callable[[Sequence[Progress]], None] = lambda _: None,
) -> tuple[Progress, ...]:
    """Search the schedules of a model on this machine and return where the search of each task ended.

    Raises TuningError where this machine cannot execute the target or nothing could be measured.
    """
    target = options.target
    if target.device != "cpu" or how_executed(target) != "native":
        raise TuningError(
            f"this machine cannot measure {target.name}: times under an emulator say nothing, and schedules of GPUs "
            "have no space yet; tune on a machine of that kind"
        )
    threads = resolve_thread_count(tuning.threads)
    _, plan = plan_model(model, replace(options, tuning_log=None), watcher)
    tasks = tasks_of(plan.lowered, tuning.sizes)
    log = TuningLog(tuning.log, target.name)
    siblings = [TuningLog(tuning.log, sibling.name) for sibling in targets.siblings(target)]
    seeds = [record for sibling in siblings for record in sibling.read().records]
    with BenchPool(target, threads) as pool:
        session = TuningSession(tasks, pool, log, origin_of(target, threads), seeds)
        session.run(tuning.budget, watch)
    return tuple(session.progress)
