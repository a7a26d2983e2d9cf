"""The engines that are compared. Each one runs in a process of its own, so that no thread pool disturbs another's."""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tvm import relax

Arrays = Mapping[str, np.ndarray]
Cases = Mapping[str, Arrays]


class EngineError(Exception):
    """An engine cannot run a model; the message is the reason, for the table."""


def peak_bytes(who: int) -> int:
    """Return the most memory that this process (RUSAGE_SELF) or any of its children ever held."""
    return resource.getrusage(who).ru_maxrss * 1024


class Engine:
    """One engine with one model loaded as it was exported, dynamic dimensions included, and inputs by case.

    `compile_peak_bytes` is the most memory that the process which prepared the model for execution ever held.
    """

    name: str
    compile_seconds: float
    compile_peak_bytes: int

    def __init__(self, model: Path, cases: Cases, threads: int) -> None:
        raise NotImplementedError

    @staticmethod
    def version() -> str:
        """Return the engine's version."""
        raise NotImplementedError

    def call(self, case: str) -> object:
        """Run the model once; this is what is timed."""
        raise NotImplementedError

    def seconds(self, case: str) -> float:
        """Return how long it takes to run the model once."""
        start = time.perf_counter()
        self.call(case)
        return time.perf_counter() - start

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        """Run the model once and return its outputs by name."""
        raise NotImplementedError


UNTUNED = "optimizer"
_TUNED = "optimizer@"
_META_SCHEDULE = "tvm@"


class Optimizer(Engine):
    """This project: compiled to a package with default schedules, loaded by its runtime."""

    name = UNTUNED
    log_options: tuple[str, ...] = ("--no-log",)
    precision: str = "model"

    def __init__(self, model: Path, cases: Cases, threads: int) -> None:
        from optimizer.runtime import load  # noqa: PLC0415

        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "package"
            command = ["compile", str(model), "-o", str(package), "--no-certificate", "--json", *self.log_options]
            command += ["--precision", self.precision]
            # In a process of its own, so that the memory measured is the runtime's.
            done = subprocess.run([sys.executable, "-m", "optimizer", *command], capture_output=True, check=False)
            if done.returncode != 0:
                raise EngineError(done.stderr.decode().strip().splitlines()[-1])
            self.compile_seconds = sum(json.loads(done.stdout)["stage_seconds"].values())
            self.compile_peak_bytes = peak_bytes(resource.RUSAGE_CHILDREN)
            self._model = load(package, threads=threads)
        self._cases = cases

    @staticmethod
    def version() -> str:
        return metadata.version("optimizer")

    def call(self, case: str) -> object:
        return self._model(self._cases[case], outputs="dlpack")

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        return self._model(self._cases[case])


class OptimizerKernels(Optimizer):
    """This project's kernels alone, from the beginning to the end of each: what to hold against the machine's peak.

    The call from Python, with its checks, is not in it; looking on costs each kernel about a microsecond.
    """

    name = "optimizer-kernels"

    def seconds(self, case: str) -> float:
        from optimizer.report.kernel_times import Stopwatch  # noqa: PLC0415

        stopwatch = Stopwatch()
        self._model.observe(stopwatch)
        self.call(case)
        return sum(stopwatch.seconds[kernel.name] for kernel in self._model.manifest.kernels)


class OptimizerBf16(Optimizer):
    """This project with products of bfloat16, summed in fp32."""

    name = "optimizer-bf16"
    precision = "bf16"


class OptimizerBf16Kernels(OptimizerKernels):
    """This project's kernels alone, with products of bfloat16: what to hold against `peak-bf16`."""

    name = "optimizer-bf16-kernels"
    precision = "bf16"


class OnnxRuntime(Engine):
    """onnxruntime with all graph optimizations."""

    name = "onnxruntime"

    def __init__(self, model: Path, cases: Cases, threads: int) -> None:
        import onnxruntime  # noqa: PLC0415

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        start = time.perf_counter()
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.compile_seconds = time.perf_counter() - start
        self.compile_peak_bytes = peak_bytes(resource.RUSAGE_SELF)
        self._cases = cases
        self._names = [output.name for output in self._session.get_outputs()]

    @staticmethod
    def version() -> str:
        return metadata.version("onnxruntime")

    def call(self, case: str) -> object:
        return self._session.run(None, self._cases[case])

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        results = self._session.run(None, self._cases[case])
        return {name: np.asarray(value) for name, value in zip(self._names, results, strict=True)}


class OpenVino(Engine):
    """OpenVINO for latency, in fp32 (its default on CPUs with bf16 would be bf16)."""

    name = "openvino"
    precision: str = "f32"

    def __init__(self, model: Path, cases: Cases, threads: int) -> None:
        openvino = importlib.import_module("openvino")

        core = openvino.Core()
        read = core.read_model(str(model))
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        start = time.perf_counter()
        self._request = core.compile_model(read, "CPU", settings).create_infer_request()
        self.compile_seconds = time.perf_counter() - start
        self.compile_peak_bytes = peak_bytes(resource.RUSAGE_SELF)
        self._cases = cases

    @staticmethod
    def version() -> str:
        return metadata.version("openvino")

    def call(self, case: str) -> object:
        return self._request.infer(self._cases[case], share_inputs=True, share_outputs=True)

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        results = self._request.infer(self._cases[case])
        return {next(iter(port.names)): np.array(value) for port, value in results.items()}


class OpenVinoBf16(OpenVino):
    """OpenVINO as it computes by default on CPUs with bf16."""

    name = "openvino-bf16"
    precision = "bf16"


class StockTvm(Engine):
    """TVM as shipped: its own ONNX importer and `tvm.compile`, nothing tuned, or by MetaSchedule's `database`."""

    name = "tvm"
    database: str | None = None

    def __init__(self, model: Path, cases: Cases, threads: int) -> None:
        import onnx  # noqa: PLC0415
        import tvm  # noqa: PLC0415
        from tvm import relax  # noqa: PLC0415

        from optimizer.runtime.threads import use_threads  # noqa: PLC0415

        use_threads(threads)  # before anything else runs: the pool never grows
        start = time.perf_counter()
        try:
            executable = self._compiled(model, next(iter(cases.values())))
        except Exception as error:  # TVM's importer refuses in many ways; each is a row of the table
            raise EngineError(f"does not compile: {type(error).__name__}") from error
        self.compile_seconds = time.perf_counter() - start
        self.compile_peak_bytes = peak_bytes(resource.RUSAGE_SELF)
        self._entry = relax.VirtualMachine(executable, tvm.cpu())["main"]
        self._arguments = {
            case: [tvm.runtime.tensor(array) for array in inputs.values()] for case, inputs in cases.items()
        }
        self._names = [output.name for output in onnx.load(model, load_external_data=False).graph.output]

    def _compiled(self, model: Path, inputs: Arrays) -> relax.VMExecutable:
        import onnx  # noqa: PLC0415
        import tvm  # noqa: PLC0415
        from tvm import relax  # noqa: PLC0415
        from tvm.relax.frontend.onnx import from_onnx  # noqa: PLC0415

        from benchmarks.metaschedule import imported  # noqa: PLC0415
        from optimizer.compile import find_target  # noqa: PLC0415

        target = find_target("host").tvm_target()
        if self.database is None:
            return tvm.compile(from_onnx(onnx.load(model)), target=target)
        with target:
            module = imported(model, {name: array.shape for name, array in inputs.items()})
            module = relax.transform.MetaScheduleApplyDatabase(self.database)(module)
        return tvm.compile(module, target=target)

    @staticmethod
    def version() -> str:
        return metadata.version("apache-tvm")

    def call(self, case: str) -> object:
        return self._entry(*self._arguments[case])

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        result = self._entry(*self._arguments[case])
        results = [result] if hasattr(result, "numpy") else list(result)
        return {name: value.numpy() for name, value in zip(self._names, results, strict=False)}


ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Optimizer, OnnxRuntime, OpenVino, StockTvm)}
# Those that round more than the others, and kernels without the call: for who asks for them.
OTHER_ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (OptimizerBf16, OpenVinoBf16, OptimizerKernels, OptimizerBf16Kernels)
}


# Single kernels at best, what floats multiply being fp32 or bfloat16.
PEAKS = ("peak", "peak-bf16")


def tuned_engine(log: Path) -> str:
    """Return the name of the engine that compiles with the decisions of the logs under `log`."""
    return f"{_TUNED}{log}"


def meta_schedule_engine(database: Path) -> str:
    """Return the name of the engine that is TVM with what MetaSchedule found."""
    return f"{_META_SCHEDULE}{database}"


def find_engine(name: str) -> type[Engine]:
    """Return the engine called `name`; the machine's peak is one, but only single kernels can be held against it."""
    if name.startswith(_TUNED):
        return type("TunedOptimizer", (Optimizer,), {"log_options": ("--log", name.removeprefix(_TUNED))})
    if name.startswith(_META_SCHEDULE):
        return type("TunedTvm", (StockTvm,), {"database": name.removeprefix(_META_SCHEDULE)})
    if name in PEAKS:
        from benchmarks.peak import Bf16Peak, Peak  # noqa: PLC0415 - TVM is not to weigh on the other engines' memory

        return next(peak for peak in (Peak, Bf16Peak) if peak.name == name)
    return {**ENGINES, **OTHER_ENGINES}[name]
