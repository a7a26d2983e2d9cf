"""What commands print tables with, and progress that suits a terminal or a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from optimizer.cli.plain_text import seconds_text

# Typical shares of a compile's time, for the estimate of the time left.
_SHARES = {
    "read": 2,
    "import": 10,
    "passes": 10,
    "lower": 25,
    "generate code": 25,
    "link": 8,
    "certify and write": 20,
}


def console() -> Console:
    """Return the console for results. Output to a file or pipe is not cut to the width of a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a title."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values under a title."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    console().print(table)


class StageProgress:
    """A watcher that shows stages: a bar with the time left on a terminal, else a line for each finished stage."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._progress: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task("", total=sum(_SHARES.values()))

    def __enter__(self) -> StageProgress:
        """Begin to show."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear the bar."""
        if self._progress is not None:
            self._progress.stop()

    def started(self, stage: str) -> None:
        """Show the stage that runs now."""
        if self._progress is not None:
            self._progress.update(self._task, description=stage)

    def finished(self, stage: str, seconds: float) -> None:
        """Advance the bar, or print the stage with its time."""
        if self._progress is not None:
            self._progress.advance(self._task, _SHARES.get(stage, 1))
        elif not self._quiet and seconds >= 0.05:
            click.echo(f"{stage}: {seconds_text(seconds)}", err=True)


@contextmanager
def progress_bar(description: str, total: int, *, quiet: bool = False) -> Iterator[_Advance]:
    """Yield a function to call after each of `total` steps; shows a bar with the time left on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield _Advance(None, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Advance(bar, bar.add_task(description, total=total))


class _Advance:
    def __init__(self, bar: Progress | None, task: object) -> None:
        self._bar = bar
        self._task = task

    def __call__(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)  # pyright: ignore[reportArgumentType] -- a TaskID, an int in disguise
