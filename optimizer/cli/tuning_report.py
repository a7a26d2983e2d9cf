"""What `optimizer tune` shows while it runs and at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from optimizer.cli.console import StageProgress, print_facts, print_table
from optimizer.cli.plain_text import print_json, seconds_text
from optimizer.compile import CompileOptions
from optimizer.tuning.session import Progress
from optimizer.tuning.tune import Tuned, TuneOptions, tune_model

_COLUMNS = ("task", "calls", "default", "best", "speed-up", "GFLOP/s", "of peak", "trials", "failed")
# Lines of the live table, the heaviest tasks first.
_MOST_ROWS = 20
# Without a terminal: a line at most this often.
_SECONDS_BETWEEN_LINES = 10.0


class _LiveTable:
    """A table on a terminal that is redrawn after each batch, or else a line now and then."""

    def __init__(self, tuning: TuneOptions, *, quiet: bool) -> None:
        self._budget = tuning.budget
        self._quiet = quiet
        self._begin = time.monotonic()
        self._last_line = self._begin
        self._done_before: int | None = None
        self._live = Live(console=Console(stderr=True), transient=True) if sys.stderr.isatty() and not quiet else None

    def __enter__(self) -> _LiveTable:
        """Begin to show."""
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the table."""
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def update(self, progress: Sequence[Progress]) -> None:
        """Show where the search stands."""
        if self._done_before is None:
            self._done_before = sum(task.trials for task in progress)
        if self._live is not None:
            if not self._live.is_started:
                self._live.start()
            table = Table(*_COLUMNS, box=None, caption=self._status(progress), caption_justify="left")
            for row in _rows(progress)[:_MOST_ROWS]:
                table.add_row(*map(Text, row))
            self._live.update(table)
        elif not self._quiet and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            click.echo(self._status(progress), err=True)

    def _status(self, progress: Sequence[Progress]) -> str:
        done = sum(task.trials for task in progress)
        before, after = _step_seconds(progress)
        elapsed = time.monotonic() - self._begin
        left = self._seconds_left(done, elapsed)
        text = f"{done} trials, kernels {seconds_text(before)} -> {seconds_text(after)}"
        return text if left is None else f"{text}, {left:.0f} s left"

    def _seconds_left(self, done: int, elapsed: float) -> float | None:
        lefts: list[float] = []
        new = done - (self._done_before or 0)
        if self._budget.trials is not None and new:
            lefts.append(max(0, self._budget.trials - done) * elapsed / new)
        if self._budget.seconds is not None:
            lefts.append(max(0.0, self._budget.seconds - elapsed))
        return min(lefts, default=None)


def run(model: Path, options: CompileOptions, tuning: TuneOptions, *, quiet: bool) -> Tuned:
    """Tune a model, showing how far it is."""
    with StageProgress(quiet=quiet) as stages, _LiveTable(tuning, quiet=quiet) as table:
        return tune_model(model, options, tuning, stages, table.update)


def run_and_show(model: Path, options: CompileOptions, tuning: TuneOptions, *, as_json: bool) -> None:
    """Tune a model and print what came of each task."""
    begin = time.monotonic()
    tuned = run(model, options, tuning, quiet=as_json)
    progress, seconds = tuned.progress, time.monotonic() - begin
    before, after = _step_seconds(progress)
    folder = None if tuned.machine.emulated else str(tuning.log / options.target.name)
    trials = sum(task.trials for task in progress)
    if as_json:
        tasks = [_document(task) for task in progress]
        totals = {"default_seconds": before, "tuned_seconds": after, "seconds": seconds, "trials": trials}
        print_json({"model": str(model), "log": folder, **totals, **_measured_on(tuned), "tasks": tasks})
        return
    print_table(f"{model} for {options.target.name}", _COLUMNS, _rows(progress))
    failed = sum(sum(task.failures.values()) for task in progress)
    facts = [
        ("kernels", f"{seconds_text(before)} -> {seconds_text(after)} a step, at the sizes that were measured"),
        ("measured on", f"{tuned.devices} x {tuned.machine.cpu}" if tuning.device != "host" else tuned.machine.cpu),
        *(("given up", reason) for reason in tuned.refused),
        *(("in a step", text) for text in _in_step(tuned)),
        (
            "trials",
            f"{trials} {'checked' if folder is None else 'in the log'}, {failed} failed",
        ),
        ("time", seconds_text(seconds)),
        ("log", folder or "nothing: the device is emulated, its times count for nothing"),
    ]
    print_facts("", facts)


def _in_step(tuned: Tuned) -> Iterator[str]:
    """Yield what came of comparing decisions with defaults in a step of the model."""
    if tuned.unconfirmed:
        yield f"decisions were not compared with defaults there: {tuned.unconfirmed}"
    elif compared := [task for task in tuned.progress if task.in_step]:
        back = sum(task.in_step >= 1 for task in compared)
        yield f"{len(compared)} decisions compared with defaults there, {back} of them no faster and taken back"


def _measured_on(tuned: Tuned) -> dict[str, object]:
    return {
        "cpu": tuned.machine.cpu,
        "emulated": tuned.machine.emulated,
        "devices": tuned.devices,
        "given_up": list(tuned.refused),
        "unconfirmed": tuned.unconfirmed or None,
    }


def _step_seconds(progress: Sequence[Progress]) -> tuple[float, float]:
    """Return the seconds of all tasks' calls in a step, by default and under the best parameters."""
    before = sum(task.task.calls * task.default_seconds for task in progress)
    return before, sum(task.weight for task in progress)


def _rows(progress: Sequence[Progress]) -> list[tuple[str, ...]]:
    ordered = sorted(progress, key=lambda task: -task.task.calls * task.default_seconds)
    return [
        (
            task.task.description,
            str(task.task.calls),
            seconds_text(task.default_seconds),
            seconds_text(task.best_seconds),
            f"{1 / task.ratio:.2f}",
            *_rates(task),
            str(task.trials),
            ", ".join(f"{count} {reason}" for reason, count in task.failures.items()) or task.skipped,
        )
        for task in ordered
    ]


def _rates(task: Progress) -> tuple[str, str]:
    """Return GFLOP/s and the fraction of the machine's peak, of a task that sums: others only move what they read."""
    if not (task.task.operations and task.best_seconds):
        return "", ""
    fraction = f"{task.least_seconds / task.best_seconds:.0%}" if task.least_seconds else ""
    return f"{task.task.operations / task.best_seconds / 1e9:.1f}", fraction


def _document(task: Progress) -> dict[str, object]:
    return {
        "workload": task.task.workload,
        "description": task.task.description,
        "family": task.task.family,
        "calls": task.task.calls,
        "default_seconds": task.default_seconds,
        "ratio": task.ratio,
        "ratio_in_step": task.in_step or None,
        "operations": task.task.operations,
        "least_seconds": task.least_seconds,
        "trials": task.trials,
        "failures": task.failures,
        "skipped": task.skipped,
        "parameters": dict(task.decided) if task.decided is not None else None,
    }
