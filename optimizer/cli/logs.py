"""`optimizer logs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optimizer.errors import OptionError

if TYPE_CHECKING:
    from optimizer.tuning.log import TuningLog

_log_option = click.option(
    "--log", type=click.Path(path_type=Path), help="Folder of tuning logs; by default the project's own."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.group(name="logs")
def command() -> None:
    """Look after tuning logs: list, show, merge, prune, export, import, check."""


@command.command(name="list")
@_log_option
@_json_option
def list_logs(log: Path | None, as_json: bool) -> None:
    """List the targets that have a log, and how much each holds."""
    import dataclasses

    from optimizer.cli.console import print_table
    from optimizer.cli.plain_text import print_json
    from optimizer.tuning import upkeep

    summaries = [upkeep.summarize(each) for each in _logs(log, None)]
    if as_json:
        print_json([dataclasses.asdict(summary) for summary in summaries])
        return
    rows = [
        (s.target, str(s.workloads), str(s.decisions), str(s.trials), str(s.failures), str(s.unusable))
        for s in summaries
    ]
    print_table("tuning logs", ("target", "workloads", "decisions", "trials", "failed", "unusable lines"), rows)


@command.command(name="show")
@click.argument("target")
@_log_option
@click.option("--trials", is_flag=True, help="Trials too, not decisions alone.")
@_json_option
def show(target: str, log: Path | None, trials: bool, as_json: bool) -> None:
    """Show the decisions in the log of TARGET."""
    from optimizer.cli.console import print_table
    from optimizer.cli.plain_text import print_json, seconds_text
    from optimizer.json_records import encode
    from optimizer.tuning.log import ratios_in_steps

    (chosen,) = _logs(log, target)
    everything = chosen.read().records
    records = [record for record in everything if record.kind == "decision" or (trials and record.kind == "trial")]
    if as_json:
        print_json([encode(record) for record in records])
        return
    in_steps = ratios_in_steps(everything)
    rows = [
        (
            record.description,
            ", ".join(f"{name}={value}" for name, value in record.parameters.items()),
            seconds_text(record.seconds),
            f"{1 / record.ratio:.2f}" if record.ratio else record.failure,
            _speed_up_in_step(in_steps.get((record.key, record.choice))),
            f"{record.origin.cpu}, {record.origin.threads} threads",
        )
        for record in records
    ]
    print_table(f"{chosen.folder}", ("workload", "parameters", "time", "speed-up", "in a step", "measured on"), rows)


def _speed_up_in_step(ratio: float | None) -> str:
    """Return in words what confirmations say of parameters."""
    if ratio is None:
        return ""
    return f"{1 / ratio:.2f}" + (", taken back" if ratio >= 1 else "")


@command.command(name="merge")
@click.argument("other", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_log_option
def merge(other: Path, log: Path | None) -> None:
    """Add the records of another folder of logs, OTHER, that are not there yet."""
    from optimizer.tuning import upkeep
    from optimizer.tuning.log import SHIPPED, TuningLog

    for target in upkeep.targets_in(other):
        added = upkeep.merge(TuningLog(other, target).read().records, TuningLog(log or SHIPPED, target))
        click.echo(f"{target}: {added} records added")


@command.command(name="prune")
@click.argument("target")
@click.option("--keep", type=click.IntRange(0), default=8, show_default=True, help="Trials of a workload to keep.")
@_log_option
def prune(target: str, keep: int, log: Path | None) -> None:
    """Drop from the log of TARGET what no compile uses: old versions, failures, all but the best trials."""
    from optimizer.tuning import upkeep

    (chosen,) = _logs(log, target)
    click.echo(f"{target}: {upkeep.prune(chosen, keep)} records dropped")


@command.command(name="export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--target", help="One target alone.")
@_log_option
def export(file: Path, target: str | None, log: Path | None) -> None:
    """Write all records to one FILE."""
    from optimizer.tuning import upkeep

    records = [record for each in _logs(log, target) for record in each.read().records]
    upkeep.export(records, file)
    click.echo(f"{file}: {len(records)} records")


@command.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@_log_option
def import_(file: Path, log: Path | None) -> None:
    """Add the records of an exported FILE, each to its target's log. A file with a malformed line changes nothing."""
    from optimizer.tuning import upkeep
    from optimizer.tuning.log import SHIPPED, TuningLog

    records = upkeep.read_archive(file)
    for target in sorted({record.origin.target for record in records}):
        mine = [record for record in records if record.origin.target == target]
        added = upkeep.merge(mine, TuningLog(log or SHIPPED, target))
        click.echo(f"{target}: {added} records added")


@command.command(name="check")
@_log_option
@_json_option
def check(log: Path | None, as_json: bool) -> None:
    """Say which records cannot be used and why; exit code 1 where there are any."""
    from optimizer.cli.plain_text import print_json
    from optimizer.tuning import upkeep

    found = [trouble for each in _logs(log, None) for trouble in upkeep.check(each)]
    if as_json:
        print_json(found)
    else:
        click.echo("\n".join(found) or "all records can be used")
    if found:
        sys.exit(1)


def _logs(root: Path | None, target: str | None) -> list[TuningLog]:
    """Return the log of a target, or all; raises OptionError for a target without one."""
    from optimizer.tuning import upkeep
    from optimizer.tuning.log import SHIPPED, TuningLog

    folder = root or SHIPPED
    known = upkeep.targets_in(folder)
    if target is not None and target not in known:
        raise OptionError(f"{folder} has no log of '{target}'; it has {', '.join(known) or 'none'}")
    return [TuningLog(folder, name) for name in known if target in (None, name)]
