"""One device of a fleet: it runs kernels for those who tune, over TVM's RPC.

`python -m optimizer.runtime.device_server KEY --tracker HOST:PORT` on the device, or `optimizer fleet serve`. It needs
TVM's runtime and its Python modules, not the compiler. Whoever can reach its port can run code on it: it listens on the
loopback address unless told otherwise, and belongs into a network that is trusted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.json_records import encode
from optimizer.runtime import machine
from optimizer.runtime.library import tvm_version
from optimizer.runtime.threads import use_threads

DESCRIBE = "optimizer.fleet.describe"
USE_THREADS = "optimizer.fleet.use_threads"
EMULATED = "OPTIMIZER_EMULATED"
"""An environment variable that an emulator sets for what runs in it: times taken there say nothing."""

_PORTS = 100
_SECONDS_BEFORE_RESTART = 0.5


@dataclass(frozen=True)
class Description:
    """What a device says of itself: `features` are the CPU's as Linux names them, `threads` one per physical core."""

    architecture: str
    features: tuple[str, ...]
    cpu: str
    threads: int
    emulated: bool
    tvm: str

    @staticmethod
    def of_this_machine() -> Description:
        """Describe the machine that this process runs on."""
        return Description(
            machine.architecture(),
            tuple(sorted(machine.cpu_features())),
            machine.cpu_model(),
            machine.default_thread_count(),
            bool(os.environ.get(EMULATED)),
            tvm_version(),
        )


def serve(key: str, *, host: str, port: int, tracker: tuple[str, int] | None, address: str | None = None) -> None:
    """Serve one client after the other, and never return.

    The device is known as `key`, to `tracker` if there is one, under `address` if the tracker cannot see its own.
    Listens on the first free port from `port` on.
    """
    announce = True
    while True:
        # A kernel that crashes ends TVM's listening thread with it.
        server = multiprocessing.Process(target=_listen, args=(key, host, port, tracker, address, announce))
        server.start()
        server.join()
        announce = False  # whoever started this reads one line
        time.sleep(_SECONDS_BEFORE_RESTART)


def _listen(
    key: str, host: str, port: int, tracker: tuple[str, int] | None, address: str | None, announce: bool
) -> None:
    from tvm.rpc import server  # noqa: PLC0415 - a second; describing a machine does not need it

    actual = server._popen_start_rpc_server(
        host,
        port,
        port + _PORTS,
        tracker_addr=tracker,
        key=key,
        custom_addr=address,
        silent=True,
        server_init_callback=_register,
    )
    if announce:
        print(f"listening on {host}:{actual}", flush=True)
    state = server.PopenRPCServerState.current
    assert state is not None
    state.thread.join()


def _register() -> None:
    import tvm_ffi  # noqa: PLC0415

    tvm_ffi.register_global_func(DESCRIBE, lambda: json.dumps(encode(Description.of_this_machine())), override=True)
    tvm_ffi.register_global_func(USE_THREADS, use_threads, override=True)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"'{text}' is not HOST:PORT")
    return host, int(port)


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Offer this machine's CPU to those who tune.")
    parser.add_argument("key", help="what devices of this kind are called")
    parser.add_argument("--tracker", type=parse_address, metavar="HOST:PORT", help="where the tracker listens")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=9200, help="the first port to try; default: %(default)s")
    parser.add_argument("--address", help="how others reach this machine, if the tracker cannot see it")
    given = parser.parse_args(arguments)
    serve(given.key, host=given.host, port=given.port, tracker=given.tracker, address=given.address)


if __name__ == "__main__":
    main(sys.argv[1:])
