"""What the machine does at best, timed like any other engine.

The engine does as much work as the model's metadata says (`kernels.py` writes them) and computes nothing of use: its
time is the least that a kernel of this work can take here, and its time over a kernel's is the fraction of peak. It is
that of the bare function on as many threads, to be held against the kernels alone (`optimizer-kernels`). A copy writes
to two arrays in turns, as a model does, whose last outputs live until the next call has returned: so the arrays take as
much of the caches.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tvm

from benchmarks.engines import Cases, Engine, EngineError, peak_bytes
from optimizer.compile import find_target
from optimizer.runtime.threads import use_threads
from optimizer.tuning import peak
from targets.base import Target

_KERNELS = {
    "compute": peak.multiply_add,
    "compute-bf16": peak.bf16_multiply_add,
    "integer": peak.integer_multiply_add,
    "read": peak.read,
}


def _kernel(target: Target, metadata: Mapping[str, str], threads: int) -> peak.Work:
    bound, work = metadata["bound"], int(metadata["work"])
    if bound == "copy":
        written = int(metadata["written"])
        return peak.move(target, work - written, written, threads)
    return _KERNELS[bound](target, work, threads)


class Peak(Engine):
    """Multiply-adds in registers, a copy or a read of memory: whichever the model's metadata asks for."""

    name = "peak"
    # What multiplications that are not of integers multiply.
    compute = "compute"

    def __init__(self, model: Path, cases: Cases, threads: int) -> None:
        import onnx  # noqa: PLC0415

        metadata = {entry.key: entry.value for entry in onnx.load(model, load_external_data=False).metadata_props}
        if "bound" not in metadata:
            raise EngineError("the model does not say what bounds it")
        use_threads(threads)
        start = time.perf_counter()
        target = find_target("host")
        try:
            function, arguments = _kernel(target, {**metadata, "bound": self._bound(metadata)}, threads)
        except LookupError as error:
            raise EngineError(str(error)) from error
        tensors = [tvm.runtime.tensor(array) for array in arguments]
        self._arguments = tensors
        self._others = [tensors[0], *(tvm.runtime.tensor(array) for array in arguments[1:])]
        self._entry = tvm.compile(function, target=target.tvm_target())["main"]
        self.compile_seconds = time.perf_counter() - start
        self.compile_peak_bytes = peak_bytes(resource.RUSAGE_SELF)

    def _bound(self, metadata: Mapping[str, str]) -> str:
        bound = metadata["bound"]
        return self.compute if bound == "compute" else bound

    @staticmethod
    def version() -> str:
        return ""

    def call(self, case: str) -> object:
        self._arguments, self._others = self._others, self._arguments
        return self._entry(*self._arguments)

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        return {}


class Bf16Peak(Peak):
    """Multiply-adds of bfloat16 where a kernel's are of floats: in tile registers where there are any."""

    name = "peak-bf16"
    compute = "compute-bf16"
