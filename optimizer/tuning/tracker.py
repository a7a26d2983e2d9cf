"""TVM's tracker, which lends the devices of a fleet: its process, and what one that runs knows."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from optimizer.errors import TuningError

_PORTS = 100
_CONNECT_SECONDS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Listed:
    """A device that a tracker knows: its key, and the address that it is reached at."""

    key: str
    host: str
    port: int


@dataclass(frozen=True)
class TrackerState:
    """What a tracker knows: its devices, and how many of each key are free."""

    devices: tuple[Listed, ...]
    free: Mapping[str, int]


def tracker_state(host: str, port: int) -> TrackerState:
    """Ask a tracker; raises TuningError where none answers."""
    from tvm.rpc import connect_tracker  # noqa: PLC0415 - seconds

    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            pass  # TVM's client would wait for minutes
        summary = connect_tracker(host, port).summary()
        devices = [
            Listed(str(each["key"]).removeprefix("server:"), str(each["addr"][0]), int(each["addr"][1]))
            for each in summary["server_info"]
        ]
        free = {str(key): int(queue["free"]) for key, queue in summary["queue_info"].items()}
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise TuningError(
            f"no tracker answers at {host}:{port} ({error}); start one with 'optimizer fleet up'"
        ) from error
    return TrackerState(tuple(sorted(devices, key=lambda each: (each.key, each.host, each.port))), free)


def wait_for_devices(host: str, port: int, count: int, seconds: float) -> bool:
    """Wait until a tracker has `count` devices; return whether it has within so many seconds."""
    return _wait(lambda: len(tracker_state(host, port).devices) >= count, seconds)


def wait_for_free(host: str, port: int, key: str, seconds: float) -> bool:
    """Wait until a tracker has a free device of a key; return whether it has within so many seconds."""
    return _wait(lambda: tracker_state(host, port).free.get(key, 0) > 0, seconds)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True


def main(host: str, port: int) -> None:
    """Listen on the first free port from `port` on, and print which."""
    from tvm.rpc.tracker import PopenTrackerServerState  # noqa: PLC0415 - seconds

    state = PopenTrackerServerState(host, port, port + _PORTS, silent=True)
    print(f"listening on {host}:{state.port}", flush=True)
    state.thread.join()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
