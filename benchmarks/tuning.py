"""What tuning gains and costs: the default schedules, those after so many trials, and the other engines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.comparison import Row, compare
from benchmarks.engines import UNTUNED, meta_schedule_engine, tuned_engine
from benchmarks.tables import REFERENCE, Subject

PEERS = (REFERENCE, "openvino")
TRIALS = (64, 256, 1000)

COLUMNS = (
    "model",
    "schedules",
    "ms",
    "spread",
    "default / this",
    "trials",
    "failed",
    "tuning s",
    "s / trial",
    "max difference",
)


@dataclass(frozen=True)
class Search:
    """What a search up to so many trials took: `seconds` in all, of `trials` measurements, `failed` of them."""

    trials: int
    failed: int
    seconds: float


class TuningFailedError(Exception):
    """`optimizer tune` failed; the message is its last words."""


@dataclass(frozen=True)
class Kept:
    """Whose log a search writes, and a folder that keeps what searches found, if one is given.

    Searches that the folder holds are not made again, so that a table can be made in parts, and again.
    """

    target: str = "host"
    folder: Path | None = None


def lines(
    subject: Subject, trials: Sequence[int], threads: int, rounds: int, *, stock_trials: int = 0, kept: Kept = Kept()
) -> Iterator[str]:
    """Yield the rows of one model. Each search goes on where the one of fewer trials ended.

    With `stock_trials` TVM's MetaSchedule searches, too, so many trials, at the shapes of the first case.
    """
    with tempfile.TemporaryDirectory(prefix="optimizer-tuning-") as temporary:
        folder = (kept.folder or Path(temporary)) / subject.label
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Search] = {}
        for log, search in searches(subject, folder, trials, threads, kept.target):
            found[tuned_engine(log)] = search
        if stock_trials:
            try:
                stock, search = _search_of_stock(subject, folder, stock_trials, threads)
                found[meta_schedule_engine(stock)] = search
            except TuningFailedError as error:
                yield f"| {subject.label} | MetaSchedule | {error} |"
        engines = [UNTUNED, *found, *PEERS]
        results = compare(subject.path, subject.cases, engines, threads=threads, rounds=rounds, reference=REFERENCE)
        for case, rows in results.items():
            label = f"{subject.label}, {case}" if len(results) > 1 else subject.label
            default = next(row for row in rows if row.engine == UNTUNED)
            for row in rows:
                yield _line(label, row, default.median, found.get(row.engine))


def searches(
    subject: Subject, folder: Path, trials: Sequence[int], threads: int, target: str
) -> Iterator[tuple[Path, Search]]:
    """Yield the log after each number of trials, and what the search took up to there."""
    before, spent = None, Search(0, 0, 0.0)
    for count in sorted(trials):
        log = folder / str(count)
        if (known := _spent(log)) is None:
            shutil.rmtree(log, ignore_errors=True)  # of a search that was interrupted
            if before is not None:
                shutil.copytree(before, log)
            found = _tune(subject, log, count, threads, target)
            known = _spend(log, Search(found.trials, found.failed, spent.seconds + found.seconds))
        before, spent = log, known
        yield log, known


def _search_of_stock(subject: Subject, folder: Path, trials: int, threads: int) -> tuple[Path, Search]:
    """Return MetaSchedule's database after so many trials, and what the search took."""
    database = folder / f"metaschedule-{trials}"
    if (known := _spent(database)) is None:
        shutil.rmtree(database, ignore_errors=True)
        database.mkdir()
        known = _spend(database, _tune_stock(subject, database, trials, threads))
    return database, known


def _spent(search: Path) -> Search | None:
    """Return what the search in a folder took, None where none has ended there."""
    note = search.with_suffix(".json")
    return Search(**json.loads(note.read_text())) if note.exists() else None


def _spend(search: Path, spent: Search) -> Search:
    search.with_suffix(".json").write_text(json.dumps(asdict(spent)))
    return spent


def _tune(subject: Subject, log: Path, trials: int, threads: int, target: str) -> Search:
    sizes = [option for name, size in subject.sizes.items() for option in ("--dim", f"{name}={size}")]
    command = [
        "tune",
        str(subject.path),
        *sizes,
        "--target",
        target,
        "--log",
        str(log),
        "--trials",
        str(trials),
        "--threads",
        str(threads),
        "--json",
    ]
    done = subprocess.run([sys.executable, "-m", "optimizer", *command], capture_output=True, check=False, text=True)
    if done.returncode != 0:
        raise TuningFailedError(done.stderr.strip().splitlines()[-1])
    report = json.loads(done.stdout)
    failed = sum(sum(task["failures"].values()) for task in report["tasks"])
    return Search(report["trials"], failed, report["seconds"])


def _tune_stock(subject: Subject, folder: Path, trials: int, threads: int) -> Search:
    inputs = next(iter(subject.cases.values()))
    cases = folder / "inputs.npz"
    np.savez(cases, **{f"case/{name}": array for name, array in inputs.items()})  # pyright: ignore[reportArgumentType]
    command = [str(subject.path), str(cases), str(trials), str(folder), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.metaschedule", *command], capture_output=True, check=False, text=True
    )
    if done.returncode != 0:
        raise TuningFailedError(done.stderr.strip().splitlines()[-1])
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise TuningFailedError(answer["error"])
    return Search(**answer)


def _line(label: str, row: Row, default: float, search: Search | None) -> str:
    by = "MetaSchedule" if row.engine.startswith("tvm") else "tuned"
    name = row.engine if search is None else f"{by}, {search.trials} trials"
    if row.error is not None:
        return f"| {label} | {name} | {row.error} |"
    cost = "| | | | |"
    if search is not None:
        cost = f"| {search.trials} | {search.failed} | {search.seconds:.0f} | {search.seconds / search.trials:.2f} |"
    return (
        f"| {label} | {'default' if row.engine == UNTUNED else name} | {row.median * 1e3:.2f} | ±{row.spread:.0%} "
        f"| {default / row.median:.2f} {cost} {row.difference:.1e} |"
    )
