"""What this machine has of what compiling and running need, and how to mend what it lacks."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import targets
from optimizer.errors import OptionError, TargetError
from optimizer.runtime import machine
from targets import cuda_compiler, gpu, linking
from targets.emulator import Emulator
from targets.execution import how_executed

Status = Literal["ok", "warn", "fail"]

_REINSTALL = "bash bootstrap.sh test"
_PYTHON = (3, 11)
_BANDWIDTH_BYTES = 256 << 20  # more than any level of cache, little enough to read in a moment
_BANDWIDTH_SECONDS = 0.5
_RPC_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """One thing looked at: "fail" stops what was asked for, "warn" limits it; `fix` is what to do, "" when ok."""

    name: str
    status: Status
    found: str
    fix: str = ""


def run_checks(target_names: Sequence[str] | None = None, rpc: str | None = None) -> list[Check]:
    """Look at everything that the named targets need (all targets for None), and at an RPC device if one is given.

    `rpc` is "KEY@HOST:PORT" of a TVM RPC tracker. Takes some seconds; the first time for an architecture up to a
    minute, because the linker then builds its support library. What only one of all targets needs is a warning
    unless that target was named. Raises TargetError for an unknown target, OptionError for a malformed `rpc`.
    """
    tracker = None if rpc is None else _parse_tracker(rpc)
    try:
        wanted = [targets.get(name) for name in (target_names or targets.names())]
    except targets.UnknownTargetError as error:
        raise TargetError(str(error)) from error
    missing: Status = "warn" if target_names is None else "fail"
    checks = [_python(), *_packages(), _compiler(), *_linkers(wanted), _native_targets(), _threads(), _bandwidth()]
    if any(target.device == "cuda" for target in wanted):
        checks += [_cuda_compiler(missing), _gpu()]
    if any(target.emulated_cpu for target in wanted):
        checks.append(_emulator(wanted))
    if tracker is not None:
        checks.append(_rpc_device(*tracker))
    return checks


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == _PYTHON:
        return Check("Python", "ok", found)
    return Check("Python", "fail", found, f"install python{'.'.join(map(str, _PYTHON))}, then run: {_REINSTALL}")


def _packages() -> Iterator[Check]:
    """Yield a check for each dependency that is pinned to one version, because others were found to break."""
    try:
        requirements = metadata.requires("optimizer") or []
    except metadata.PackageNotFoundError:
        yield Check("optimizer", "fail", "not installed", "python -m pip install --editable .")
        return
    for requirement in requirements:
        name, pinned, version = requirement.partition("==")
        if not pinned or ";" in requirement:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        fits = found == version
        yield Check(name, "ok" if fits else "fail", found, "" if fits else f"python -m pip install '{requirement}'")


def _compiler() -> Check:
    try:
        import tvm  # noqa: PLC0415 - a broken installation is to be reported, and importing takes a second
    except (ImportError, OSError, RuntimeError) as error:
        return Check("TVM compiler", "fail", f"cannot be loaded: {error}", f"reinstall it: {_REINSTALL}")
    if os.environ.get("TVM_USE_RUNTIME_LIB") == "1" or not tvm.runtime.enabled("llvm"):
        return Check("TVM compiler", "fail", "the runtime only", "unset TVM_USE_RUNTIME_LIB, or reinstall apache-tvm")
    return Check("TVM compiler", "ok", "with LLVM")


def _linkers(wanted: Sequence[targets.Target]) -> Iterator[Check]:
    """Yield a check for each architecture: whether a trivial library can be linked for it."""
    for architecture in dict.fromkeys(target.architecture for target in wanted):
        target = next(target for target in wanted if target.architecture == architecture)
        name = f"linker for {architecture}"
        with tempfile.TemporaryDirectory(prefix="optimizer-doctor-") as folder:
            source = Path(folder) / "empty.c"
            source.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
            try:
                linking.link([source], target, Path(folder) / "empty.so")
            except targets.ToolchainError as error:
                yield Check(name, "fail", str(error), f"reinstall it: {_REINSTALL}")
            else:
                yield Check(name, "ok", "zig")


def _native_targets() -> Check:
    native = [name for name in targets.names() if how_executed(targets.get(name)) == "native"]
    try:
        best = targets.resolve_host()
    except targets.UnknownTargetError as error:
        return Check("CPU features", "warn", str(error), "run what you compile on another machine or the emulator")
    return Check("CPU features", "ok", f"runs {', '.join(native)}; host is {best.name}")


def _threads() -> Check:
    """Compare the cores with what TVM would use by itself; packages loaded by our runtime use the right number."""
    cores = machine.default_thread_count()
    by_itself = _in_a_thread_of_its_own(_tvm_thread_count)
    found = f"{cores} physical cores for this process; TVM by itself would use {by_itself} threads"
    if by_itself == cores:
        return Check("threads", "ok", found)
    return Check("threads", "warn", found, f"for programs without optimizer.runtime: export TVM_NUM_THREADS={cores}")


def _tvm_thread_count() -> int:
    import tvm  # noqa: PLC0415 - takes a second

    count = tvm.get_global_func("runtime.NumThreads")()
    assert isinstance(count, int)
    return count


def _in_a_thread_of_its_own(function: Callable[[], int]) -> int:
    """Call in a new thread: TVM makes a pool for the calling thread and changes the CPUs that it may run on."""
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0] if result else 0


def _bandwidth() -> Check:
    """Measure how fast all cores together read memory, which bounds how fast a language model decodes."""
    import numpy as np  # noqa: PLC0415 - keeps importing this module light

    cores = machine.default_thread_count()
    parts = np.array_split(np.ones(_BANDWIDTH_BYTES // 4, "int32"), cores)
    best = float("inf")
    end = time.perf_counter() + _BANDWIDTH_SECONDS
    with ThreadPoolExecutor(cores) as pool:
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return Check("memory bandwidth", "ok", f"{_BANDWIDTH_BYTES / best / 1e9:.1f} GB/s read by {cores} threads")


def _cuda_compiler(missing: Status) -> Check:
    try:
        version = cuda_compiler.compiler_version()
        cuda_compiler.compile_fat_binary('extern "C" __global__ void nothing() {}', ["sm_80"])
    except targets.ToolchainError as error:
        return Check("CUDA compiler", missing, str(error), "python -m pip install --editable '.[cuda]'")
    return Check("CUDA compiler", "ok", f"NVRTC {version}")


def _gpu() -> Check:
    version = gpu.driver_version()
    fix = "install NVIDIA's driver 580 or newer to run CUDA packages here; building them needs none"
    if version is None:
        return Check("GPU", "warn", "no NVIDIA driver", fix)
    served = f"driver for CUDA {version // 1000}.{version % 1000 // 10}"
    found = ", ".join(f"{each.name} ({each.architecture})" for each in gpu.gpus())
    if not found:
        return Check("GPU", "warn", f"{served}, but no GPU", "make a GPU visible to this process, or run elsewhere")
    if version < gpu.REQUIRED_DRIVER_VERSION:
        return Check("GPU", "fail", f"{found}, {served}", fix)
    return Check("GPU", "ok", f"{found}, {served}")


def _emulator(wanted: Sequence[targets.Target]) -> Check:
    foreign = [target for target in wanted if target.emulated_cpu and targets.missing_features(target)]
    if not foreign:
        return Check("arm64 emulator", "ok", "not needed: this machine runs the arm64 targets itself")
    reason = Emulator().available()
    if reason is None:
        return Check("arm64 emulator", "ok", f"runs {', '.join(target.name for target in foreign)}")
    return Check("arm64 emulator", "warn", reason.partition(":")[0], "python -m targets.emulator install")


def _parse_tracker(rpc: str) -> tuple[str, str, int]:
    """Return key, host and port of "KEY@HOST:PORT"."""
    key, _, address = rpc.rpartition("@")
    host, _, port = address.rpartition(":")
    if not key or not host or not port.isdecimal():
        raise OptionError(f"'{rpc}' names no RPC device; write KEY@HOST:PORT, such as pi5@192.168.1.9:9190")
    return key, host, int(port)


def _rpc_device(key: str, host: str, port: int) -> Check:
    import socket  # noqa: PLC0415 - needed with --rpc only

    from tvm import rpc  # noqa: PLC0415 - takes a second

    name = f"RPC device {key}"
    tracker = f"python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}"
    try:
        # TVM itself would wait for as long as the network lets it.
        socket.create_connection((host, port), _RPC_TIMEOUT_SECONDS).close()
        summary = rpc.connect_tracker(host, port).summary()
    except (OSError, RuntimeError) as error:
        return Check(name, "fail", f"no tracker answers at {host}:{port} ({error})", f"on {host}: {tracker}")
    devices = sum(each["key"] == f"server:{key}" for each in summary["server_info"])
    free = summary["queue_info"].get(key, {}).get("free", 0)
    if devices == 0:
        server = f"python -m tvm.exec.rpc_server --tracker {host}:{port} --key {key}"
        return Check(name, "fail", f"the tracker at {host}:{port} has no such device", f"on the device: {server}")
    if free == 0:
        return Check(name, "warn", f"{devices} registered, none free", "wait for the sessions that hold them to end")
    return Check(name, "ok", f"{devices} registered, {free} free")
