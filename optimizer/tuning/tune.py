"""Tuning a model: plan it with default schedules, search, and leave the decisions in the log."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import targets
from optimizer.compile import CompileOptions, plan_model
from optimizer.progress import Silent, Timeline, Watcher
from optimizer.runtime.device_server import Description
from optimizer.runtime.machine import resolve_thread_count
from optimizer.tuning import devices
from optimizer.tuning.in_step import PlannedModel, StepError, compare_in_step
from optimizer.tuning.log import TuningLog
from optimizer.tuning.peak import Peaks
from optimizer.tuning.pool import BenchPool
from optimizer.tuning.records import origin_of
from optimizer.tuning.session import Budget, Progress, TuningSession
from optimizer.tuning.tasks import Sizes, tasks_of


@dataclass(frozen=True)
class TuneOptions:
    """How to tune: `log` is the folder of all targets' logs, `sizes` the symbolic dimensions to measure at.

    `device` is "host", "emulator" or "rpc:KEY@HOST:PORT" (`optimizer.tuning.devices`).
    """

    log: Path
    budget: Budget
    sizes: Sizes
    threads: int | None = None
    device: str = "host"


@dataclass(frozen=True)
class Tuned:
    """Where the search of each task ended, on what; `refused` says which devices were given up, and why.

    `unconfirmed` says why decisions were not compared with defaults in a step of the model, where they could not be.
    An emulated device's figures are in no log: they only show that candidates build and compute right.
    """

    progress: tuple[Progress, ...]
    machine: Description
    devices: int
    refused: tuple[str, ...]
    unconfirmed: str = ""


def tune_model(
    model: Path,
    options: CompileOptions,
    tuning: TuneOptions,
    watcher: Watcher | None = None,
    watch: Callable[[Sequence[Progress]], None] = lambda _: None,
) -> Tuned:
    """Search the schedules of a model by measurements and return where the search ended.

    Raises TuningError where nothing can execute the target or nothing could be measured.
    """
    target = options.target
    with devices.opened(tuning.device, target) as chosen:
        threads = resolve_thread_count(tuning.threads) if chosen.address is None else tuning.threads
        source, plan = plan_model(model, replace(options, tuning_log=None), watcher)
        tasks = tasks_of(plan.lowered, tuning.sizes)
        with BenchPool(target, threads, chosen.count, chosen.address) as pool:
            machine = pool.open()
            with _log_for(machine, tuning.log, target.name) as log:
                siblings = [TuningLog(tuning.log, sibling.name) for sibling in targets.siblings(target)]
                seeds = [record for sibling in siblings for record in sibling.read().records]
                origin = origin_of(target, machine.cpu, threads or machine.threads)
                session = TuningSession(tasks, pool, log, origin, seeds)
                if target.device == "cpu" and not machine.emulated:
                    _note_peaks(session.progress, pool.measure_peaks(origin.threads))
                session.run(tuning.budget, watch)
                unconfirmed = ""
                if target.device == "cpu" and chosen.address is None:
                    planned = PlannedModel(source, plan, options, tuning.sizes)
                    with Timeline(watcher or Silent()).stage("compare whole steps"):
                        unconfirmed = _confirm(session, planned, origin.threads)
            return Tuned(tuple(session.progress), machine, pool.size, tuple(pool.refused), unconfirmed)


def _confirm(session: TuningSession, model: PlannedModel, threads: int) -> str:
    """Compare the session's decisions with defaults in a step of the model; return why that could not be done."""
    try:
        session.confirm(lambda decided: compare_in_step(model, decided, threads))
    except StepError as error:
        return str(error)
    return ""


def _note_peaks(progress: Sequence[Progress], peaks: Peaks | None) -> None:
    if peaks is None:
        return
    for each in progress:
        task = each.task
        each.least_seconds = peaks.least_seconds(task.operations, task.bytes, task.operands)


@contextmanager
def _log_for(machine: Description, root: Path, target: str) -> Iterator[TuningLog]:
    """Yield the log of a target, or one that is thrown away where times mean nothing."""
    if not machine.emulated:
        yield TuningLog(root, target)
        return
    with tempfile.TemporaryDirectory(prefix="optimizer-emulated-") as folder:
        yield TuningLog(Path(folder), target)
