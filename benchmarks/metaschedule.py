"""TVM's own auto-tuner: `python -m benchmarks.metaschedule MODEL CASES.npz TRIALS FOLDER THREADS`.

The model is imported with the shapes of the inputs, fused by TVM's "zero" pipeline, and every task is tuned by
MetaSchedule with its defaults. Two things are mended, without which nothing is measured in TVM 0.27: the function that
builds a candidate does not import TVM's tensor intrinsics in each worker (which takes longer than a build may), and
workers run as many threads as the other engines. Prints the trials in all, those that failed, and the seconds as JSON,
or why there are none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tvm

_TRIALS_AT_ONCE = 16
_MIN_REPEAT_MS = 50


def build(module: tvm.IRModule, target: tvm.target.Target, _params: object) -> tvm.runtime.Module:
    """Build one candidate in a worker."""
    from tvm import tirx  # noqa: PLC0415
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock  # noqa: PLC0415

    return tirx.build(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target=target)


def imported(model: Path, shapes: Mapping[str, tuple[int, ...]]) -> tvm.IRModule:
    """Return the module that is tuned, and that the found schedules apply to."""
    import onnx  # noqa: PLC0415
    from tvm import relax  # noqa: PLC0415
    from tvm.relax.frontend.onnx import from_onnx  # noqa: PLC0415

    module = from_onnx(onnx.load(model), shape_dict={name: list(shape) for name, shape in shapes.items()})
    return relax.get_pipeline("zero")(module)


def tune(model: Path, shapes: Mapping[str, tuple[int, ...]], trials: int, folder: Path) -> dict[str, float]:
    """Tune a model into the database in `folder`, which may hold earlier trials; return what that took."""
    from tvm.s_tir import meta_schedule  # noqa: PLC0415

    from optimizer.compile import find_target  # noqa: PLC0415

    target = find_target("host").tvm_target()
    start = time.perf_counter()
    with target:
        module = imported(model, shapes)
    database = meta_schedule.relax_integration.tune_relax(
        module,
        {},
        target,
        str(folder),
        max_trials_global=trials,
        num_trials_per_iter=_TRIALS_AT_ONCE,
        builder=meta_schedule.builder.LocalBuilder(f_build=build),
        runner=meta_schedule.runner.LocalRunner(
            evaluator_config=meta_schedule.runner.EvaluatorConfig(min_repeat_ms=_MIN_REPEAT_MS)
        ),
        seed=0,
    )
    # MetaSchedule keeps what it measured; what failed to build or run is not among it.
    measured = len(database)
    return {"trials": trials, "failed": max(0, trials - measured), "seconds": time.perf_counter() - start}


def main(model: str, cases: str, trials: str, folder: str, threads: str) -> None:
    """Tune and print what it took."""
    os.environ["TVM_NUM_THREADS"] = threads
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TVM prints must not mix with the answer
    with np.load(cases) as stored:
        shapes = {name.partition("/")[2]: stored[name].shape for name in stored.files}
    try:
        answer: dict[str, float | str] = {**tune(Path(model), shapes, int(trials), Path(folder))}
    except Exception as error:  # TVM's importer and its search refuse in many ways; each is a row of the table
        answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    from benchmarks.metaschedule import main as importable  # so that workers find `build` by its module's name

    importable(*sys.argv[1:6])
