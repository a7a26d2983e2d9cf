"""The table of decoders: prefill and decode of every engine, interleaved in one run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.llm.engines import ENGINES, compile_package, package_path
from benchmarks.llm.models import DECODERS, Decoder
from benchmarks.processes import EngineProcess

_REPOSITORY = Path(__file__).resolve().parents[2]
_OWN = ("optimizer", "read")
# Libraries, code, and what lies between products.
_REST_BYTES = 64e6
_STARTS = 3
"""Times that each engine is started, in turns: the first one reads files that are not in memory yet."""
_COLUMNS = (
    "decoder",
    "engine",
    "prefill tokens/s",
    "ours / it",
    "decode tokens/s",
    "ours / it",
    "fraction of reads",
    "first token s",
    "resident MB",
    "bound MB",
)


@dataclass
class DecoderRow:
    """What one engine took, in seconds: for prompts, for tokens after them, from its start to the first token."""

    engine: str
    version: str = ""
    first_token: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    resident_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Workload:
    """A prompt's length, how many tokens follow it, and how often every engine takes its turn."""

    prompt: int
    steps: int
    threads: int
    rounds: int

    @property
    def context(self) -> int:
        """The longest text."""
        return self.prompt + self.steps + 1


def lines(
    decoders: Sequence[str], engines: Sequence[str], workload: Workload, python: str, *, keep: bool
) -> Iterator[str]:
    """Yield the lines of the table; `python` has the other engines; packages are made anew unless kept."""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"|{'---|' * len(_COLUMNS)}"
    for name in decoders or tuple(DECODERS):
        decoder = DECODERS[name]
        if not decoder.onnx_path.exists():
            yield f"| {name} | not made: run `python -m benchmarks.llm.models {name}` |"
            continue
        if "optimizer" in engines and not (keep and package_path(decoder).exists()):
            compile_package(decoder)
        rows = _measured(decoder, engines, workload, python)
        ours = next((row for row in rows if row.engine == "optimizer" and row.error is None), None)
        reads = next((row for row in rows if row.engine == "read" and row.error is None), None)
        yield from (_line(name, row, ours, reads, workload) for row in rows if row.engine != "read")


def _measured(decoder: Decoder, engines: Sequence[str], workload: Workload, python: str) -> list[DecoderRow]:
    rows, processes = [DecoderRow(name) for name in engines], dict[str, EngineProcess]()
    try:
        for row in rows * _STARTS:
            if row.engine in processes:
                processes.pop(row.engine).close()
            start = time.perf_counter()
            process = _process(row.engine, decoder, workload, python)
            answer = process.answer()
            if "error" in answer:
                row.error = str(answer["error"])
                continue
            row.first_token.append(time.perf_counter() - start)
            row.version = str(answer["version"])
            processes[row.engine] = process
        for _ in range(workload.rounds):
            for row in rows:
                if row.engine in processes:
                    command = {"prompt": workload.prompt, "steps": workload.steps}
                    answer = processes[row.engine].ask(command)
                    row.prefill.append(answer["prefill"])
                    row.decode.append(answer["decode"])
                    row.resident_bytes = answer["resident_bytes"]
    finally:
        for process in processes.values():
            process.close()
    return rows


def _process(engine: str, decoder: Decoder, workload: Workload, python: str) -> EngineProcess:
    interpreter = sys.executable if engine in _OWN else python
    arguments = [engine, decoder.name, str(workload.threads), str(workload.context)]
    paths = [str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
    return EngineProcess([interpreter, "-m", "benchmarks.llm.worker", *arguments], environment)


def _line(name: str, row: DecoderRow, ours: DecoderRow | None, reads: DecoderRow | None, workload: Workload) -> str:
    if row.error is not None:
        return f"| {name} | {row.engine} | {row.error} |"
    prefill, decode = float(np.median(row.prefill)), float(np.median(row.decode))
    of_prefill = prefill / float(np.median(ours.prefill)) if ours is not None else float("nan")
    of_decode = decode / float(np.median(ours.decode)) if ours is not None else float("nan")
    fraction = float(np.median(reads.decode)) / decode if reads is not None else float("nan")
    return (
        f"| {name} | {row.engine} {row.version} | {workload.prompt / prefill:.1f} | {of_prefill:.2f} "
        f"| {workload.steps / decode:.1f} | {of_decode:.2f} | {fraction:.0%} | {float(np.median(row.first_token)):.2f} "
        f"| {row.resident_bytes / 1e6:.0f} | {_bound(DECODERS[name], workload) / 1e6:.0f} |"
    )


def _bound(decoder: Decoder, workload: Workload) -> float:
    """Return the bytes that a frugal engine needs: weights, a cache of 16-bit floats, and a little."""
    return 1.1 * decoder.weight_bytes + decoder.cache_bytes(workload.context, 2) + _REST_BYTES


__all__ = ["ENGINES", "DecoderRow", "Workload", "lines"]
