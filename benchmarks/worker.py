"""The process of one engine: reads commands as JSON lines, answers each with one JSON line.

`python -m benchmarks.worker ENGINE MODEL INPUTS.npz THREADS`. Commands: {"run": N} times N calls, {"outputs": FILE}
writes the outputs as .npz, {"stop": true} ends.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.engines import EngineError, find_engine


def main() -> None:
    """Load the model and serve commands until told to stop."""
    name, model, inputs_file, threads = sys.argv[1:5]
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with np.load(inputs_file) as stored:
        inputs = {key: stored[key] for key in stored.files}
    before = _resident_bytes()
    try:
        engine = find_engine(name)(Path(model), inputs, int(threads))
        engine.call()
    except (EngineError, ImportError) as error:
        print(json.dumps({"error": str(error)}), file=answers)
        return
    loaded = {"version": engine.version(), "compile_seconds": engine.compile_seconds, "baseline_bytes": before}
    print(json.dumps(loaded), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        if "run" in command:
            print(json.dumps({"seconds": _timed(engine.call, command["run"])}), file=answers)
        elif "outputs" in command:
            np.savez(command["outputs"], **engine.outputs())  # pyright: ignore[reportArgumentType]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({"peak_bytes": peak, "resident_bytes": _resident_bytes()}), file=answers)
        else:
            return


def _timed(call: Callable[[], object], count: int) -> list[float]:
    times: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
