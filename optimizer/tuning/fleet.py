"""The fleet of this machine: a tracker, and the devices that are started here; what others join."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from optimizer.errors import TuningError
from optimizer.json_records import RecordError, decode, encode, parse
from optimizer.tuning import devices
from optimizer.tuning.devices import Started
from optimizer.tuning.tracker import wait_for_devices
from targets.base import Target
from targets.cache import cache_directory
from targets.errors import ToolchainError

_TRACKER = "optimizer.tuning.tracker"
_SECONDS_TO_JOIN = 30.0
_LOOPBACK, _ANY = "127.0.0.1", "0.0.0.0"  # noqa: S104 - compared with, not bound to
# A process started this close to the second that was written down is the one that was started.
_SAME_START = 1.0


@dataclass(frozen=True)
class Member:
    """A process of the fleet, the leader of its group; `started` (seconds of the epoch) tells a reused number."""

    pid: int
    started: float
    what: str


@dataclass(frozen=True)
class Fleet:
    """A tracker that listens at `host`:`port`, and the processes that were started with it, itself the first."""

    host: str
    port: int
    members: tuple[Member, ...]

    @property
    def running(self) -> tuple[Member, ...]:
        """Return the members that still run."""
        return tuple(member for member in self.members if _runs(member))


def state_file() -> Path:
    """Return where the fleet of this machine is written down."""
    return cache_directory("fleet") / "fleet.json"


def current() -> Fleet | None:
    """Return the fleet that was started here, None where there is none or its tracker has ended."""
    try:
        fleet = decode(Fleet, parse(state_file().read_bytes(), "the fleet's state"), "the fleet's state")
    except (OSError, RecordError):
        return None
    return fleet if fleet.members and _runs(fleet.members[0]) else None


def up(host: str, port: int, key: str, servers: int, emulated: Target | None, report: Callable[[str], None]) -> Fleet:
    """Start a tracker at `host`, `servers` devices of this machine under `key`, and one emulated device.

    The emulated one's key is its target's name. Raises TuningError where a fleet runs already or one does not start.
    """
    running = current()
    if running is not None:
        raise TuningError(
            f"a fleet runs already, its tracker at {running.host}:{running.port}; end it with 'optimizer fleet down'"
        )
    if importlib.util.find_spec("tornado") is None:
        raise TuningError("the tracker needs tornado: run 'python -m pip install tornado'")
    started: list[tuple[str, Started]] = []

    def note(what: str, process: Started, more: str = "") -> None:
        started.append((what, process))
        report(f"{what} at {process.host}:{process.port}{more}")

    try:
        tracker = devices.start_module(_TRACKER, [host, str(port)])
        note("tracker", tracker)
        where = f"{_LOOPBACK if host == _ANY else host}:{tracker.port}"
        for _ in range(servers):
            note(f"device '{key}'", devices.start_here([key, "--tracker", where]))
        if emulated is not None:
            server = devices.start_emulated(emulated, [emulated.name, "--tracker", where])
            note(f"device '{emulated.name}'", server, ", emulated: for checks, its times count for nothing")
        joined = len(started) - 1
        if not wait_for_devices(host, tracker.port, joined, _SECONDS_TO_JOIN):
            raise TuningError(f"the tracker does not see all {joined} devices")
        fleet = Fleet(host, tracker.port, tuple(_member(what, process) for what, process in started))
        state_file().write_text(json.dumps(encode(fleet)), encoding="utf-8")
    except (TuningError, ToolchainError, OSError) as error:
        for _, process in started:
            devices.stop(process.pid)
        raise TuningError(f"the fleet was not started: {error}") from error
    return fleet


def down() -> int:
    """End what `up` started and return how many processes that were; raises TuningError where nothing runs."""
    fleet = current()
    if fleet is None:
        raise TuningError("no fleet was started on this machine; 'optimizer fleet up' starts one")
    running = fleet.running
    for member in running:
        devices.stop(member.pid)
    state_file().unlink()
    return len(running)


def _member(what: str, process: Started) -> Member:
    return Member(process.pid, psutil.Process(process.pid).create_time(), f"{what} at {process.host}:{process.port}")


def _runs(member: Member) -> bool:
    try:
        process = psutil.Process(member.pid)
        return abs(process.create_time() - member.started) < _SAME_START and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
