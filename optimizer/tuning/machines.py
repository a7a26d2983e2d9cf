"""Where candidates run: in the measuring process itself, or on a device that TVM's RPC reaches.

Builds are always local. A device is one that a tracker lends to whoever asks for its key, or one at a fixed address.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import tvm
from tvm import te

from optimizer import code_generation
from optimizer.errors import TuningError
from optimizer.json_records import decode, parse
from optimizer.runtime.device_server import DESCRIBE, USE_THREADS, Description
from optimizer.runtime.threads import use_threads
from optimizer.tuning import peak
from optimizer.tuning.peak import Peaks
from optimizer.tuning.tracker import wait_for_free
from schedules import schedule_function
from schedules.family import Parameters
from schedules.intrin.bf16_dot import bf16_dot
from schedules.intrin.integer_dot import integer_dot
from targets.base import Target
from targets.device_code import generating_source
from targets.gpu import gpus
from targets.linking import Executable, export_library

# A device whose kernel crashed is back within a second or two.
_SECONDS_UNTIL_FREE = 8.0
_REFERENCE_SIZE = 256
_REFERENCE_ROUNDS = 7
_REFERENCE_CALLS = 10
# Some milliseconds of multiply-adds; more bytes than the caches hold.
_PEAK_OPERATIONS = 400_000_000
_PEAK_BYTES = 256 << 20
_PEAK_ROUNDS = 10


@dataclass(frozen=True)
class Address:
    """Where a device is asked for: `tracked` says whether a tracker listens there, which lends devices of `key`."""

    host: str
    port: int
    key: str
    tracked: bool

    def __str__(self) -> str:
        return f"{self.key}@{self.host}:{self.port}"


class LostError(Exception):
    """No device can be had, or the one there was is gone or unfit; the message says why."""


class Machine(Protocol):
    """Takes what was compiled, and arrays to call it with."""

    @property
    def device(self) -> tvm.runtime.Device:
        """What runs the kernels, in whose memory their arrays lie."""
        ...

    def load(self, executable: Executable) -> tvm.runtime.Module:
        """Return a compiled module, ready to be called."""
        ...

    def answers(self) -> bool:
        """Return whether the machine is still there."""
        ...


class ThisMachine:
    """The process that measures: the CPU with `threads` threads, or the first GPU."""

    def __init__(self, target: Target, threads: int) -> None:
        use_threads(threads)
        self._target = target
        self.device: tvm.runtime.Device = tvm.cpu() if target.device == "cpu" else tvm.cuda(0)

    def describe(self) -> Description:
        """Return what this machine is; kernels of a GPU name that as their CPU."""
        described = Description.of_this_machine()
        return described if self._target.device == "cpu" else replace(described, cpu=gpus()[0].name)

    def load(self, executable: Executable) -> tvm.runtime.Module:
        """Return the module, linked in memory, or with device code for this GPU in a file."""
        if self._target.device == "cpu":
            return executable.jit()  # pyright: ignore[reportAttributeAccessIssue] - what tvm.compile returns has it
        with tempfile.TemporaryDirectory(prefix="optimizer-candidate-") as folder:
            library = Path(folder) / "candidate.so"
            export_library(executable, self._target, library)
            return tvm.runtime.load_module(str(library))

    def answers(self) -> bool:
        """Return True: if it did not, nothing would."""
        return True


class RemoteMachine:
    """A device, leased until the process ends. Raises LostError where none can be had."""

    def __init__(self, address: Address, target: Target, threads: int | None) -> None:
        from tvm import rpc  # noqa: PLC0415 - only where there is a device

        self._target = target
        self._loaded = 0
        try:
            if address.tracked:
                if not wait_for_free(address.host, address.port, address.key, _SECONDS_UNTIL_FREE):
                    raise LostError(f"{address}: no device is free; one that died has not come back")
                self._session = rpc.connect_tracker(address.host, address.port).request(address.key)
            else:
                self._session = rpc.connect(address.host, address.port, address.key)
            text = str(self._session.get_function(DESCRIBE)()).encode()
            self.description: Description = decode(Description, parse(text, "its description"), "its description")
            self.threads: int = threads or self.description.threads
            self._session.get_function(USE_THREADS)(self.threads)
        except (TuningError, RuntimeError, OSError, ValueError, AttributeError) as error:
            raise LostError(f"{address} lends no device: {error}") from error
        self.device: tvm.runtime.Device = self._session.cpu(0)

    def load(self, executable: Executable) -> tvm.runtime.Module:
        """Return the module, linked here for the target and sent there."""
        self._loaded += 1
        with tempfile.TemporaryDirectory(prefix="optimizer-candidate-") as folder:
            library = Path(folder) / f"candidate-{self._loaded}.so"
            export_library(executable, self._target, library)
            self._session.upload(str(library))
        return self._session.load_module(library.name)

    def answers(self) -> bool:
        """Return whether the device still answers."""
        try:
            self._session.get_function(DESCRIBE)()
        except (RuntimeError, OSError):
            return False
        return True


def build(function: tvm.tirx.PrimFunc, target: Target, parameters: Parameters | None) -> Executable:
    """Return `function` with the schedule that `parameters` choose (None: the default), compiled, as "main"."""
    return _compiled(schedule_function(function, target, parameters)[0], target)


def _compiled(function: tvm.tirx.PrimFunc, target: Target) -> Executable:
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    with target.tvm_target() as tvm_target, generating_source(), code_generation.options(target):
        return tvm.compile(module, tvm_target, tir_pipeline=code_generation.pipeline(target))


@dataclass(frozen=True)
class Health:
    """What a machine made of the reference kernel: seconds of a call, and whether its result is right."""

    seconds: float
    right: bool


def reference_health(machine: Machine, target: Target) -> Health:
    """Run a product of small integers in fp32, whose result is exact in any order, and time it."""
    size = _REFERENCE_SIZE
    left, right = (te.placeholder((size, size), name=name) for name in ("left", "right"))
    k = te.reduce_axis((0, size), name="k")
    product = te.compute((size, size), lambda i, j: te.sum(left[i, k] * right[k, j], axis=k), name="product")
    module = machine.load(build(te.create_prim_func([left, right, product]), target, None))
    generator = np.random.default_rng(0)
    values = [generator.integers(-4, 5, (size, size)).astype(np.float32) for _ in range(2)]
    arguments = [tvm.runtime.tensor(value, machine.device) for value in (*values, np.zeros_like(values[0]))]
    module["main"](*arguments)
    # Of integers: numpy's threads for products of floats would go on spinning beside what is measured next.
    expected = values[0].astype(np.int32) @ values[1].astype(np.int32)
    exact = np.array_equal(arguments[-1].numpy(), expected)
    evaluator = module.time_evaluator("main", machine.device, number=_REFERENCE_CALLS, repeat=_REFERENCE_ROUNDS)
    return Health(min(evaluator(*arguments).results), exact)


def measured_peaks(machine: Machine, target: Target, threads: int) -> Peaks:
    """Return what the machine reaches with so many threads; takes about a second."""

    def rate(make: Callable[[Target, int, int], peak.Work], work: int) -> float:
        function, arrays = make(target, work, threads)
        module = machine.load(_compiled(function, target))
        arguments = [tvm.runtime.tensor(array, machine.device) for array in arrays]
        evaluator = module.time_evaluator("main", machine.device, number=1, repeat=_PEAK_ROUNDS)
        return work / min(evaluator(*arguments).results)

    cached = threads * target.caches.level2 // 2
    integer, bf16 = integer_dot(target, bits=4) is not None, bf16_dot(target) is not None
    return Peaks(
        rate(peak.multiply_add, _PEAK_OPERATIONS * threads),
        rate(peak.bf16_multiply_add, _PEAK_OPERATIONS * threads) if bf16 else 0.0,
        rate(peak.integer_multiply_add, _PEAK_OPERATIONS * threads) if integer else 0.0,
        rate(peak.read, _PEAK_BYTES),
        rate(peak.copy, cached),
        cached,
    )
