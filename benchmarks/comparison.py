"""One model, several engines, interleaved: every round times each engine in turn, so that drift hits all alike."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

# A round of one engine lasts about this long, and at least one call.
_ROUND_SECONDS = 0.5
_MOST_CALLS = 50


@dataclass
class Row:
    """Results of one engine on one model: seconds per call, and why there are none if `error` is set.

    `difference` is the largest error of any output, relative to the reference engine's largest magnitude.
    """

    engine: str
    version: str = ""
    compile_seconds: float = float("nan")
    peak_bytes: int = 0
    resident_bytes: int = 0
    difference: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float:
        """Return the median seconds per call."""
        return float(np.median(self.seconds)) if self.seconds else float("nan")

    @property
    def spread(self) -> float:
        """Return half the distance between the 10th and 90th percentile, relative to the median."""
        if not self.seconds:
            return float("nan")
        low, high = np.percentile(self.seconds, (10, 90))
        return float((high - low) / 2 / self.median)


def compare(
    model: Path, inputs: Mapping[str, np.ndarray], engines: Sequence[str], *, threads: int, rounds: int, reference: str
) -> list[Row]:
    """Time every engine on one model; `reference` is the engine that outputs are compared with."""
    rows = {name: Row(name) for name in engines}
    with tempfile.TemporaryDirectory(prefix="optimizer-bench-") as folder:
        inputs_file = Path(folder) / "inputs.npz"
        np.savez(inputs_file, **inputs)  # pyright: ignore[reportArgumentType]
        workers: dict[str, _Worker] = {}
        try:
            for name in engines:
                worker = _Worker(name, model, inputs_file, threads)
                loaded = worker.answer()
                if "error" in loaded:
                    rows[name].error = str(loaded["error"])
                    continue
                workers[name] = worker
                rows[name].version = str(loaded["version"])
                rows[name].compile_seconds = float(loaded["compile_seconds"])
            counts = {name: _calls_per_round(worker) for name, worker in workers.items()}
            for _ in range(rounds):
                for name, worker in workers.items():
                    rows[name].seconds += worker.ask({"run": counts[name]})["seconds"]
            _check(rows, workers, Path(folder), reference)
        finally:
            for worker in workers.values():
                worker.close()
    return list(rows.values())


def _calls_per_round(worker: _Worker) -> int:
    once = min(worker.ask({"run": 2})["seconds"])
    return max(1, min(_MOST_CALLS, int(_ROUND_SECONDS / once)))


def _check(rows: Mapping[str, Row], workers: Mapping[str, _Worker], folder: Path, reference: str) -> None:
    results: dict[str, dict[str, np.ndarray]] = {}
    for name, worker in workers.items():
        file = folder / f"{name}.npz"
        memory = worker.ask({"outputs": str(file)})
        rows[name].peak_bytes, rows[name].resident_bytes = memory["peak_bytes"], memory["resident_bytes"]
        with np.load(file) as stored:
            results[name] = {key: stored[key] for key in stored.files}
    for name, outputs in results.items():
        if reference in results:
            rows[name].difference = max(
                (_difference(outputs[key], results[reference][key]) for key in outputs), default=np.nan
            )


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    scale = np.abs(wanted.astype(np.float64)).max(initial=1e-30)
    return float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max(initial=0.0) / scale)


class _Worker:
    """An engine's process, spoken to in JSON lines."""

    def __init__(self, engine: str, model: Path, inputs_file: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", engine, str(model), str(inputs_file), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._commands = cast("IO[str]", self._process.stdin)
        self._answers = cast("IO[str]", self._process.stdout)
        self._errors = cast("IO[str]", self._process.stderr)

    def answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if line:
            return json.loads(line)
        lines = self._errors.read().strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {self._process.wait()}"}

    def ask(self, command: dict[str, object]) -> dict[str, Any]:
        self._commands.write(json.dumps(command) + "\n")
        self._commands.flush()
        result = self.answer()
        if "error" in result:
            raise RuntimeError(str(result["error"]))
        return result

    def close(self) -> None:
        self._commands.close()
        self._process.wait(timeout=60)
