"""Keeping tuning logs: merging, thinning out, carrying them as one file, checking them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import targets
from optimizer.errors import TuningLogError
from optimizer.json_records import RecordError
from optimizer.tuning.log import TuningLog
from optimizer.tuning.records import Record, WorkloadKey, target_digest
from schedules.registry import versions

MAX_ARCHIVE_BYTES = 1 << 30


@dataclass(frozen=True)
class LogSummary:
    """How much a target's log holds."""

    target: str
    families: tuple[str, ...]
    workloads: int
    trials: int
    decisions: int
    failures: int
    unusable: int


def targets_in(root: Path) -> list[str]:
    """Return the targets that have a log under `root`."""
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []


def summarize(log: TuningLog) -> LogSummary:
    """Return the counts of a log."""
    contents = log.read()
    kinds = Counter(record.kind for record in contents.records)
    return LogSummary(
        log.target,
        tuple(sorted({record.family for record in contents.records})),
        len({record.key for record in contents.records}),
        kinds["trial"],
        kinds["decision"],
        sum(bool(record.failure) for record in contents.records),
        len(contents.unusable),
    )


def merge(records: Iterable[Record], log: TuningLog) -> int:
    """Add the records that `log` does not have yet and return how many; raises TuningLogError for another target's."""
    known = {record.to_line() for record in log.read().records}
    new: list[Record] = []
    for record in records:
        if record.origin.target != log.target:
            raise TuningLogError(
                f"a record of {record.origin.target} cannot go into the log of {log.target}: it would never apply"
            )
        if (line := record.to_line()) not in known:
            known.add(line)
            new.append(record)
    log.append(new)
    return len(new)


def prune(log: TuningLog, keep: int) -> int:
    """Keep of each workload its decisions of the current schedules and the `keep` best trials; return how many went.

    Of decisions for the same parameters, made on one machine with one version of everything, the last stays, and so
    does the last confirmation.
    """
    records = log.read().records
    known = _versions(log.target)
    current = [record for record in records if known.get(record.family) == record.version]
    chosen = {(r.kind, r.key, r.choice, r.origin): r for r in current if r.kind != "trial"}
    trials: dict[WorkloadKey, list[Record]] = {}
    for record in current:
        if record.kind == "trial" and not record.failure:
            trials.setdefault(record.key, []).append(record)
    best = [r for group in trials.values() for r in sorted(group, key=lambda record: record.ratio)[:keep]]
    kept = {id(record) for record in (*chosen.values(), *best)}
    log.replace(record for record in records if id(record) in kept)
    return len(records) - len(kept)


def _versions(target: str) -> dict[str, int]:
    """Return the current versions of families; of a target that is not known here, those of CPUs."""
    return versions(targets.get(target).device if target in targets.names() else "cpu")


def export(records: Sequence[Record], path: Path) -> None:
    """Write records of any targets as one file of lines, which appears only when it is complete."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_bytes(b"".join(record.to_line() + b"\n" for record in records))
        temporary.replace(path)
    except OSError as error:
        raise TuningLogError(f"cannot write {path}: {error}") from error


def read_archive(path: Path) -> list[Record]:
    """Return the records of an exported file; raises TuningLogError at the first line that is none."""
    try:
        size = path.stat().st_size
        if size > MAX_ARCHIVE_BYTES:
            raise TuningLogError(f"{path} has {size} bytes, over the limit of {MAX_ARCHIVE_BYTES}")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TuningLogError(f"cannot read {path}: {error}") from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append(Record.from_line(line))
            except RecordError as error:
                raise TuningLogError(f"{path}:{number}: {error}; nothing was imported") from error
    return records


def check(log: TuningLog) -> list[str]:
    """Return what keeps records of a log from being used, one line for each kind of trouble."""
    contents = log.read()
    found = [str(line) for line in contents.unusable]
    known = _versions(log.target)
    counts: Counter[str] = Counter()
    digest = target_digest(targets.get(log.target)) if log.target in targets.names() else None
    if digest is None and contents.records:
        found.append(f"{log.folder}: there is no target {log.target}")
    for record in contents.records:
        if record.family not in known:
            counts[f"of the unknown family {record.family}"] += 1
        elif record.version != known[record.family]:
            counts[f"of version {record.version} of the schedule {record.family}, now {known[record.family]}"] += 1
        elif digest is not None and record.origin.target_digest != digest:
            counts[f"of another definition of {log.target} (its features or caches have changed)"] += 1
        elif record.origin.tvm != metadata.version("apache-tvm"):
            counts[f"measured with TVM {record.origin.tvm}: used, but times may have changed"] += 1
    return found + [f"{log.folder}: {count} records {trouble}" for trouble, count in sorted(counts.items())]
