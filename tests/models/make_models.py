"""Make the models in this folder and their reference data: `python -m tests.models.make_models [NAME ...]`.

Every architecture of `benchmarks.architectures` is built small with random weights and exported by both exporters of
torch; onnxruntime, with its graph optimizations off, gives the reference outputs, which must agree with torch.
Decoders in `NARROW` are exported with weights and caches of 16 bits as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.architecture import EXPORTERS, Architecture, Array
from benchmarks.architectures import ARCHITECTURES
from benchmarks.export import FlatModule, build, export, run_torch

FOLDER = Path(__file__).parent
# Two layers in fp32 differ by the order of summation alone: a hundred roundings of 2**-23, of the largest value.
TOLERANCE = 100 * 2.0**-23
# An output that varies less than this has collapsed, and would agree with almost anything.
LEAST_DEVIATION = 0.05
NARROW = {"llama": ("float16", "bfloat16")}


def make(name: str) -> None:
    """Write the model files and the reference files of the architecture called `name`."""
    architecture = ARCHITECTURES[name]
    module = build(architecture, architecture.small)
    for exporter in EXPORTERS:
        path = FOLDER / f"{name}_{exporter}.onnx"
        export(module, architecture, architecture.small, exporter, path)
        arrays = _reference(path, module, architecture)
        np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **arrays)
        print(f"{path.name}: {path.stat().st_size} bytes", flush=True)
    for dtype in NARROW.get(name, ()):
        path = FOLDER / "narrow" / f"{name}_{dtype}.onnx"
        export(build(architecture, architecture.small, dtype), architecture, architecture.small, "dynamo", path)


def _reference(path: Path, module: FlatModule, architecture: Architecture) -> dict[str, Array]:
    """Return inputs and onnxruntime's outputs of every case, keyed CASE/inputs/NAME and CASE/outputs/NAME."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    arrays: dict[str, Array] = {}
    for case in architecture.small.cases:
        inputs = architecture.small.draw(case)
        results = session.run(list(module.outputs), inputs)
        outputs = {key: np.asarray(value) for key, value in zip(module.outputs, results, strict=True)}
        _check(f"{path.name}, case {case}", outputs, run_torch(module, inputs))
        arrays |= {f"{case}/inputs/{key}": value for key, value in inputs.items()}
        arrays |= {f"{case}/outputs/{key}": value for key, value in outputs.items()}
    return arrays


def _check(where: str, outputs: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, reference in expected.items():
        np.testing.assert_allclose(
            outputs[name], reference, rtol=0, atol=TOLERANCE * np.abs(reference).max(), err_msg=f"{where}, {name}"
        )
        if reference.std() < LEAST_DEVIATION:
            raise AssertionError(f"{where}: {name} has collapsed to a deviation of {reference.std():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the small models that the tests import, with reference outputs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(ARCHITECTURES)}")
    names = parser.parse_args().names or list(ARCHITECTURES)
    if unknown := sorted(set(names) - set(ARCHITECTURES)):
        parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    for name in names:
        make(name)


if __name__ == "__main__":
    main()
