"""What the cost model of a log saves: trials until a search has 95 % of what it gains, with the log and without."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import Subject
from optimizer.compile import CompileOptions, find_target
from optimizer.tuning.log import SHIPPED
from optimizer.tuning.session import Budget, Progress
from optimizer.tuning.tune import TuneOptions, tune_model

COLUMNS = ("model", "search begins with", "best / default", "trials", "trials to 95 % of the gain")
TRIALS = 256
_ENOUGH = 0.95


@dataclass(frozen=True)
class Step:
    """Where a search stood: the trials so far, and the time of a step's kernels over that of the default schedules."""

    trials: int
    ratio: float


def lines(subject: Subject, trials: int, threads: int, target: str = "host") -> Iterator[str]:
    """Yield the rows of one model, which the shipped log must not hold for the comparison to mean anything.

    Both gains are held against the better of the two searches: what a search never reaches is said.
    """
    searches = {
        "nothing": search(subject, trials, threads, None, target),
        "the shipped log": search(subject, trials, threads, SHIPPED, target),
    }
    best = min(step.ratio for steps in searches.values() for step in steps)
    for name, steps in searches.items():
        reached = trials_to(_ENOUGH, steps, best)
        yield (
            f"| {subject.label} | {name} | {min(step.ratio for step in steps):.3f} | {steps[-1].trials} "
            f"| {'not reached' if reached is None else reached} |"
        )


def search(subject: Subject, trials: int, threads: int, begin: Path | None, target: str) -> list[Step]:
    """Tune a model into a copy of the logs in `begin` and return where the search stood after each batch."""
    steps = [Step(0, 1.0)]

    def note(progress: Sequence[Progress]) -> None:
        trials = sum(each.trials for each in progress)
        default = sum(each.task.calls * each.default_seconds for each in progress)
        if trials:
            steps.append(Step(trials, sum(each.weight for each in progress) / default))

    with tempfile.TemporaryDirectory(prefix="optimizer-transfer-") as folder:
        log = Path(folder) / "log"
        if begin is not None and begin.is_dir():
            shutil.copytree(begin, log)
        tuning = TuneOptions(log, Budget(trials), subject.sizes, threads)
        tune_model(subject.path, CompileOptions(find_target(target)), tuning, watch=note)
    return steps


def trials_to(share: float, steps: Sequence[Step], best: float) -> int | None:
    """Return after how many trials a search had `share` of the gain from its start down to `best`, None if never."""
    limit = steps[0].ratio - share * (steps[0].ratio - best)
    return next((step.trials for step in steps if step.ratio <= limit), None)
