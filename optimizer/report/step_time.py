"""The time of one step of a package that was just compiled, where this machine can run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optimizer.errors import IncompatibleMachineError, InputMismatchError
from optimizer.package.manifest import Manifest
from optimizer.report.inputs import complete_inputs
from optimizer.report.timing import Timing, measure
from optimizer.runtime import load


@dataclass(frozen=True)
class StepTime:
    """The timing of one call, None where this machine cannot run the package; `text` says it in words."""

    timing: Timing | None
    text: str


def step_time(package: Path, manifest: Manifest, seconds: float = 0.5) -> StepTime:
    """Load a package and time its main entry point on random inputs."""
    try:
        model = load(package, verify=False)
    except IncompatibleMachineError as error:
        return StepTime(None, f"not measured: {error}")
    inputs = complete_inputs(manifest, {}, {}, seed=0)
    try:
        timing = measure(lambda: model(inputs, outputs="dlpack"), seconds=seconds, most_runs=100)
    except InputMismatchError:
        return StepTime(
            None, "not measured: its inputs' values say sizes, and random ones do not fit; see `bench --input`"
        )
    shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape)) or 'scalar'}" for name, array in inputs.items())
    shown = shapes if len(shapes) <= 100 else f"{shapes[:97]}..."
    return StepTime(timing, f"{timing.median * 1e3:.2f} ms ({model.threads} threads; {shown})")
