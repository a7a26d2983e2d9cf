"""Which machine measures: this one, an emulated one, or the devices that a tracker lends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from optimizer.errors import OptionError, TuningError
from optimizer.runtime.device_server import EMULATED, parse_address
from optimizer.tuning.machines import Address
from optimizer.tuning.tracker import tracker_state
from targets.base import Target
from targets.emulator import Emulator
from targets.errors import ToolchainError
from targets.execution import how_executed
from targets.gpu import gpus

_SERVER = "optimizer.runtime.device_server"
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Devices:
    """What measures: `count` devices at `address`, or this process where that is None."""

    address: Address | None
    count: int


@contextmanager
def opened(device: str, target: Target) -> Iterator[Devices]:
    """Make ready what `--device` names: "host", "emulator", or "rpc:KEY@HOST:PORT" of a tracker.

    Raises OptionError for another text, TuningError where nothing there can measure code for `target`.
    """
    if target.device != "cpu" and device != "host":
        raise TuningError(f"kernels of {target.name} are measured where the GPU is: tune there, with --device host")
    if device == "host":
        if target.device != "cpu" and not gpus():
            raise TuningError(
                f"there is no NVIDIA GPU here to measure kernels of {target.name}; tune where there is one"
            )
        if how_executed(target) != "native":
            raise TuningError(
                f"this machine cannot measure {target.name}: times under an emulator say nothing; tune on a machine of "
                "that kind, or on such devices with --device rpc:KEY@HOST:PORT ('optimizer fleet --help')"
            )
        yield Devices(None, 2)
    elif device == "emulator":
        with _emulated(target) as address:
            yield Devices(address, 1)
    elif device.startswith("rpc:"):
        address = _tracked(device)
        yield Devices(address, count_devices(address))
    else:
        raise OptionError(f"--device '{device}' is none of host, emulator, rpc:KEY@HOST:PORT")


def _tracked(device: str) -> Address:
    key, at, where = device.removeprefix("rpc:").rpartition("@")
    try:
        host, port = parse_address(where)
    except ValueError as error:
        raise OptionError(f"--device '{device}': {error}; give rpc:KEY@HOST:PORT") from error
    if not (key and at) or len(key.split()) != 1:
        raise OptionError(f"--device '{device}' names no key of devices; give rpc:KEY@HOST:PORT")
    return Address(host, port, key, tracked=True)


def count_devices(address: Address) -> int:
    """Return how many devices a tracker has of a key; raises TuningError where there are none."""
    keys = [each.key for each in tracker_state(address.host, address.port).devices]
    if address.key not in keys:
        known = ", ".join(sorted(set(keys))) or "none"
        raise TuningError(
            f"the tracker at {address.host}:{address.port} has no device of '{address.key}', only {known}"
        )
    return keys.count(address.key)


@contextmanager
def _emulated(target: Target) -> Iterator[Address]:
    """Start a device under the emulator and yield its address."""
    server = start_emulated(target, ["emulator"])
    try:
        yield Address(server.host, server.port, "emulator", tracked=False)
    finally:
        stop(server.pid)


@dataclass(frozen=True)
class Started:
    """A process that listens at an address, the leader of a group of its own."""

    pid: int
    host: str
    port: int


def start_emulated(target: Target, arguments: Sequence[str]) -> Started:
    """Start a device server with `arguments` on an emulated machine; raises TuningError."""
    try:
        command, environment = Emulator().program(
            ["-m", _SERVER, *arguments], target, env={EMULATED: "1"}, python_path=[_ROOT]
        )
    except ToolchainError as error:
        raise TuningError(str(error)) from error
    return _start(command, environment)


def start_here(arguments: Sequence[str]) -> Started:
    """Start a device server with `arguments` on this machine; raises TuningError."""
    return start_module(_SERVER, arguments)


def start_module(module: str, arguments: Sequence[str]) -> Started:
    """Start a module of this project that listens and prints where; raises TuningError."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return _start([sys.executable, "-m", module, *arguments], {**os.environ, "PYTHONPATH": path})


def _start(command: list[str], environment: Mapping[str, str]) -> Started:
    """Start a program that goes on without this one, and wait until it says where it listens."""
    read, write = os.pipe()
    try:
        pid = os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, write, 1),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            ],
            setsid=True,
        )
    finally:
        os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as output:
        line = output.readline()
    try:
        return Started(pid, *parse_address(line.strip().rpartition(" ")[2]))
    except ValueError as error:
        stop(pid)
        raise TuningError(
            "a server did not start; its address cannot be listened at, or its ports are taken"
        ) from error


def stop(pid: int) -> None:
    """Kill a process with its group, if it is still there."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # it is another process's child
        os.waitpid(pid, 0)
