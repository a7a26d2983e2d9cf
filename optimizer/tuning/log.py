"""The tuning log: a folder per target, a text file per operator family, one record a line, only ever appended to.

Lines of two branches may be merged in any order. A line that a crash cut short is reported and passed over; the next
record begins on a line of its own.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import targets
from optimizer.errors import TuningLogError
from optimizer.json_records import RecordError
from optimizer.tuning.records import Choice, Record, WorkloadKey, target_digest
from schedules import KernelReport
from schedules.family import Parameters, Space
from targets.base import Target

SUFFIX = ".jsonl"
SHIPPED = Path(__file__).resolve().parents[2] / "tuning_logs"
"""The logs that come with the project."""


@dataclass(frozen=True)
class Unusable:
    """A line that holds no record, or one that does not belong where it stands."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class LogContents:
    """All that a target's log holds."""

    records: tuple[Record, ...]
    unusable: tuple[Unusable, ...]


class TuningLog:
    """The records of one target under `root` (a folder that holds one folder per target)."""

    def __init__(self, root: Path, target: str) -> None:
        self.folder: Path = root / target
        self.target: str = target

    def read(self) -> LogContents:
        """Return all records; raises TuningLogError where a file cannot be read. No folder is an empty log."""
        records: list[Record] = []
        unusable: list[Unusable] = []
        if self.folder.is_dir():
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                for item in _read_file(path, self.target, _stamp(path)):
                    (records if isinstance(item, Record) else unusable).append(item)  # pyright: ignore[reportArgumentType]
        return LogContents(tuple(records), tuple(unusable))

    def append(self, records: Iterable[Record]) -> None:
        """Add records, each durable when this returns; raises TuningLogError where the folder cannot be written."""
        by_family: dict[str, list[Record]] = {}
        for record in records:
            by_family.setdefault(record.family, []).append(record)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for family, lines in by_family.items():
                _append_lines(self.folder / f"{family}{SUFFIX}", [record.to_line() for record in lines])
        except OSError as error:
            raise TuningLogError(f"cannot write to {self.folder}: {error}; give another folder with --log") from error

    def replace(self, records: Iterable[Record]) -> None:
        """Write the log anew with `records` alone; each file is whole or as it was."""
        by_family: dict[str, list[bytes]] = {path.stem: [] for path in self.folder.glob(f"*{SUFFIX}")}
        for record in records:
            by_family.setdefault(record.family, []).append(record.to_line())
        self.folder.mkdir(parents=True, exist_ok=True)
        for family, lines in by_family.items():
            path = self.folder / f"{family}{SUFFIX}"
            if not lines:
                path.unlink()
                continue
            temporary = path.with_suffix(".partial")
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))
            temporary.replace(path)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to."""
    try:
        status = path.stat()
    except OSError as error:
        raise TuningLogError(f"cannot read {path}: {error}") from error
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=64)
def _read_file(path: Path, target: str, _: tuple[int, int, int]) -> tuple[Record | Unusable, ...]:
    """Return the lines of a file as it is at a stamp: a process that compiles often reads it once."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise TuningLogError(f"cannot read {path}: {error}") from error
    return tuple(_lines_of(text, path, target))


def _lines_of(text: bytes, path: Path, target: str) -> Iterator[Record | Unusable]:
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = Record.from_line(line)
        except RecordError as error:
            yield Unusable(place, str(error))
            continue
        if record.origin.target != target:
            yield Unusable(place, f"it is of target {record.origin.target}, in the folder of {target}")
        elif record.family != path.stem:
            yield Unusable(place, f"it is of family {record.family}, in the file of {path.stem}")
        else:
            yield record


def _append_lines(path: Path, lines: list[bytes]) -> None:
    # Written at once and flushed: a crash leaves at most one line cut short, and never touches those before it.
    with path.open("ab") as file:
        cut_short = file.tell() > 0 and not _ends_with_newline(path)
        file.write(b"\n" * cut_short + b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


@dataclass(frozen=True)
class Decisions:
    """What logs decide for a target: by workload, family and version; `unusable` are lines that were passed over."""

    records: Mapping[WorkloadKey, Record]
    unusable: tuple[Unusable, ...] = ()

    def decide(self, report: KernelReport) -> Parameters | None:
        """Return the parameters for a kernel, None where no log has any that its space allows."""
        record = self.record_for(report)
        return record.parameters if record is not None else None

    def record_for(self, report: KernelReport) -> Record | None:
        """Return the record that decides a kernel."""
        record = self.records.get(report.key)
        return record if record is not None and fits(record.parameters, report.space) else None


def decisions_for(target: Target, root: Path) -> Decisions:
    """Return what the log of `target` under `root` decides, and where it has nothing those of its siblings."""
    contents = TuningLog(root, target.name).read()
    records = dict(decisions_of(contents, target).records)
    for sibling in targets.siblings(target):
        for key, record in decisions_of(TuningLog(root, sibling.name).read(), sibling).records.items():
            records.setdefault(key, record)
    return Decisions(records, contents.unusable)


def ratios_in_steps(records: Iterable[Record]) -> dict[tuple[WorkloadKey, Choice], float]:
    """Return the median ratio that confirmations of a workload's parameters found in steps of models."""
    found: dict[tuple[WorkloadKey, Choice], list[float]] = {}
    for record in records:
        if record.kind == "confirmation" and not record.failure:
            found.setdefault((record.key, record.choice), []).append(record.ratio)
    return {of: statistics.median(ratios) for of, ratios in found.items()}


def is_taken_back(record: Record, in_steps: Mapping[tuple[WorkloadKey, Choice], float]) -> bool:
    """Return whether what a record decides was no faster than the default in steps of models."""
    return in_steps.get((record.key, record.choice), 0.0) >= 1


def decisions_of(contents: LogContents, target: Target) -> Decisions:
    """Return the decision of each workload that was measured for just this `target`."""
    return Decisions(best_decisions(contents.records, target_digest(target)), contents.unusable)


def best_decisions(records: Iterable[Record], digest: str) -> dict[WorkloadKey, Record]:
    """Return the best decision of each workload, of those for the target with a digest.

    What gained most in steps of models is best, and where nothing was confirmed there, what gained most alone; what
    confirmations took back does not count. Where ratios are equal the parameters decide, so that the order of lines
    does not matter.
    """
    own = [record for record in records if record.origin.target_digest == digest and not record.failure]
    in_steps = ratios_in_steps(own)
    chosen: dict[WorkloadKey, Record] = {}
    for record in own:
        if record.kind != "decision" or is_taken_back(record, in_steps):
            continue
        best = chosen.get(record.key)
        if best is None or _rank(record, in_steps) < _rank(best, in_steps):
            chosen[record.key] = record
    return chosen


def _rank(record: Record, in_steps: Mapping[tuple[WorkloadKey, Choice], float]) -> tuple[bool, float, Choice]:
    ratio = in_steps.get((record.key, record.choice))
    return ratio is None, record.ratio if ratio is None else ratio, record.choice


def fits(parameters: Parameters, space: Space) -> bool:
    """Return whether `parameters` are those of `space`, with values that it allows."""
    allowed = {choice.name: {choice.default, *choice.candidates} for choice in space}
    return parameters.keys() == allowed.keys() and all(value in allowed[name] for name, value in parameters.items())
