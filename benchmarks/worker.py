"""The process of one engine: reads commands as JSON lines, answers each with one JSON line.

`python -m benchmarks.worker ENGINE MODEL INPUTS.npz THREADS`; the inputs are keyed CASE/NAME. Commands:
{"case": CASE, "run": N} times N calls, {"case": CASE, "outputs": FILE} writes the outputs as .npz; the end of the
commands ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np

from benchmarks.engines import Engine, EngineError, find_engine
from optimizer.package.alignment import aligned_copy


def main() -> None:
    """Load the model and serve commands until told to stop."""
    name, model, inputs_file, threads = sys.argv[1:5]
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(inputs_file) as stored:
        for key in stored.files:
            case, _, input_name = key.partition("/")
            cases.setdefault(case, {})[input_name] = aligned_copy(stored[key])  # no engine copies it
    try:
        engine = find_engine(name)(Path(model), cases, int(threads))
        for case in cases:
            engine.call(case)
    except (EngineError, ImportError) as error:
        print(json.dumps({"error": str(error)}), file=answers)
        return
    loaded = {"version": engine.version(), "seconds": engine.compile_seconds, "peak_bytes": engine.compile_peak_bytes}
    print(json.dumps(loaded), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        case = command["case"]
        if "run" in command:
            print(json.dumps({"seconds": _timed(engine, case, command["run"])}), file=answers)
        else:
            np.savez(command["outputs"], **engine.outputs(case))  # pyright: ignore[reportArgumentType]
            print(json.dumps({"resident_bytes": _resident_bytes()}), file=answers)


def _timed(engine: Engine, case: str, count: int) -> list[float]:
    engine.call(case)  # wakes the engine's threads
    return [engine.seconds(case) for _ in range(count)]


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
