"""One model, several engines, interleaved: every round times each engine in turn, so that drift hits all alike."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.processes import EngineProcess
from optimizer.certificate.comparison import MOST_LOOSENED

# A round of one engine lasts about this long, and at least one call.
_ROUND_SECONDS = 0.5
_MOST_CALLS = 2000
# Threads of an engine whose turn is over spin for some milliseconds before they sleep.
_SETTLE_SECONDS = 0.1


Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Judge:
    """Who decides where an engine differs from the reference by more than `tolerance`: outputs, if there are.

    With `loosened` these are of a quantized model that is not computed in integers. As in a certificate, others may
    then be as far off as the reference is, up to MOST_LOOSENED tolerances: a code that rounding changes changes others.
    """

    name: str
    tolerance: float
    outputs: Callable[[Arrays], Arrays | None]
    loosened: bool = False


@dataclass
class Row:
    """Results of one engine on one model: seconds per call, and why there are none if `error` is set.

    `difference` is the largest error of any output, relative to the largest magnitude of the reference engine's, or of
    those of `judge`; it may be up to `tolerance`.
    """

    engine: str
    version: str = ""
    compile_seconds: float = float("nan")
    compile_peak_bytes: int = 0
    resident_bytes: int = 0
    difference: float = float("nan")
    tolerance: float = float("nan")
    judge: str = ""
    seconds: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float:
        """Return the median seconds per call."""
        return float(np.median(self.seconds)) if self.seconds else float("nan")

    @property
    def least(self) -> float:
        """Return the seconds of the fastest call."""
        return min(self.seconds, default=float("nan"))

    @property
    def spread(self) -> float:
        """Return half the distance between the 10th and 90th percentile, relative to the median."""
        if not self.seconds:
            return float("nan")
        low, high = np.percentile(self.seconds, (10, 90))
        return float((high - low) / 2 / self.median)


def compare(
    model: Path,
    cases: Mapping[str, Mapping[str, np.ndarray]],
    engines: Sequence[str],
    *,
    threads: int,
    rounds: int,
    reference: str,
    judge: Judge | None = None,
) -> dict[str, list[Row]]:
    """Time every engine on one model with each case's inputs; returns the rows by case.

    `reference` is the engine that outputs are compared with, until `judge` is asked.
    """
    with tempfile.TemporaryDirectory(prefix="optimizer-bench-") as folder:
        inputs_file = Path(folder) / "inputs.npz"
        arrays = {f"{case}/{name}": array for case, inputs in cases.items() for name, array in inputs.items()}
        np.savez(inputs_file, **arrays)  # pyright: ignore[reportArgumentType]
        workers: dict[str, _Worker] = {}
        loaded: dict[str, Row] = {}
        try:
            for name in engines:
                worker = _Worker(name, model, inputs_file, threads)
                loaded[name] = worker.loaded()
                if loaded[name].error is None:
                    workers[name] = worker
            timed = {case: _timed(case, loaded, workers, rounds, Path(folder), reference) for case in cases}
            return {
                case: judged(rows, outputs, judge, cases[case], reference) for case, (rows, outputs) in timed.items()
            }
        finally:
            for worker in workers.values():
                worker.close()


def _timed(
    case: str,
    loaded: Mapping[str, Row],
    workers: Mapping[str, _Worker],
    rounds: int,
    folder: Path,
    reference: str,
) -> tuple[dict[str, Row], Mapping[str, Arrays]]:
    rows = {name: replace(row, seconds=[]) for name, row in loaded.items()}
    counts = {name: _calls_per_round(worker, case) for name, worker in workers.items()}
    for _ in range(rounds):
        for name, worker in workers.items():
            time.sleep(_SETTLE_SECONDS)
            rows[name].seconds += worker.ask({"case": case, "run": counts[name]})["seconds"]
    return rows, _check(case, rows, workers, folder, reference)


def _calls_per_round(worker: _Worker, case: str) -> int:
    once = min(worker.ask({"case": case, "run": 2})["seconds"])
    return max(1, min(_MOST_CALLS, int(_ROUND_SECONDS / once)))


def _check(
    case: str, rows: Mapping[str, Row], workers: Mapping[str, _Worker], folder: Path, reference: str
) -> Mapping[str, Arrays]:
    """Enter what the engines' outputs differ from the reference engine's; returns all outputs."""
    results: dict[str, dict[str, np.ndarray]] = {}
    for number, (name, worker) in enumerate(workers.items()):
        file = folder / f"{number}.npz"
        rows[name].resident_bytes = worker.ask({"case": case, "outputs": str(file)})["resident_bytes"]
        with np.load(file) as stored:
            results[name] = {key: stored[key] for key in stored.files}
    for name, outputs in results.items():
        if reference in results:
            rows[name].difference = _largest_difference(outputs, results[reference])
    return results


def judged(
    rows: dict[str, Row], results: Mapping[str, Arrays], judge: Judge | None, inputs: Arrays, reference: str
) -> list[Row]:
    """Return the rows; where one differs beyond the judge's tolerance, all are compared with the judge's outputs."""
    if judge is None:
        return list(rows.values())
    found = {name: outputs for name, outputs in results.items() if outputs}
    disputed = not all(rows[name].difference <= judge.tolerance for name in found)
    decisive = judge.outputs(inputs) if disputed else None
    if decisive is None:
        return [replace(row, tolerance=judge.tolerance) for row in rows.values()]
    differences = {name: _largest_difference(outputs, decisive) for name, outputs in found.items()}
    tolerance = judge.tolerance
    if judge.loosened and reference in differences:
        tolerance = max(tolerance, min(differences[reference], MOST_LOOSENED * tolerance))
    return [
        replace(row, difference=differences.get(name, row.difference), tolerance=tolerance, judge=judge.name)
        for name, row in rows.items()
    ]


def _largest_difference(found: Arrays, wanted: Arrays) -> float:
    differences = [_difference(found[key], wanted[key]) for key in found]
    # Unlike Python's own, this maximum is NaN where one of them is.
    return float(np.max(differences)) if differences else float("nan")


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    scale = np.abs(wanted.astype(np.float64)).max(initial=1e-30)
    return float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max(initial=0.0) / scale)


class _Worker(EngineProcess):
    """An engine's process with one model and its inputs."""

    def __init__(self, engine: str, model: Path, inputs_file: Path, threads: int) -> None:
        super().__init__(
            [sys.executable, "-m", "benchmarks.worker", engine, str(model), str(inputs_file), str(threads)]
        )
        self._engine = engine

    def loaded(self) -> Row:
        """Return the row of the engine once it has the model, with the reason if it has not."""
        answer = self.answer()
        if "error" in answer:
            return Row(self._engine, error=str(answer["error"]))
        return Row(self._engine, str(answer["version"]), float(answer["seconds"]), int(answer["peak_bytes"]))
