"""`optimizer fleet`."""

from __future__ import annotations

import sys

import click

from optimizer.errors import OptionError

_PORT = 9190
_host_option = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")


@click.group(name="fleet")
def command() -> None:
    """Lend devices to those who tune: `optimizer tune --device rpc:KEY@HOST:PORT`.

    A tracker on one machine knows the devices; each device runs `optimizer fleet serve`. Whoever reaches their ports
    can run code on them: listen on other addresses than the loopback one only within a network that is trusted.
    """


@command.command(name="up")
@_host_option
@click.option("--port", type=click.IntRange(1, 65535), default=_PORT, show_default=True, help="First port to try.")
@click.option("--key", default="host", show_default=True, help="What this machine's devices are called.")
@click.option("--devices", type=click.IntRange(0), default=1, show_default=True, help="Devices of this machine.")
@click.option("--emulate", metavar="TARGET", help="Add an emulated device, such as arm64, to check code on.")
def up(host: str, port: int, key: str, devices: int, emulate: str | None) -> None:
    """Start a tracker on this machine, and devices beside it; they run until `fleet down`."""
    from optimizer.compile import find_target
    from optimizer.tuning import fleet

    _require_word(key)
    emulated = None if emulate is None else find_target(emulate)
    started = fleet.up(host, port, key, devices, emulated, click.echo)
    where = f"{started.host}:{started.port}"
    click.echo(f"join from another machine: optimizer fleet serve KEY --tracker {where}")
    click.echo(f"tune on the fleet: optimizer tune MODEL --device rpc:{key}@{where}")


@command.command(name="serve")
@click.argument("key")
@click.option("--tracker", required=True, metavar="HOST:PORT", help="Where the tracker listens.")
@_host_option
@click.option("--port", type=click.IntRange(1, 65535), default=9200, show_default=True, help="First port to try.")
@click.option("--address", help="How others reach this machine, if the tracker cannot see that.")
def serve(key: str, tracker: str, host: str, port: int, address: str | None) -> None:
    """Offer this machine as a device called KEY, until interrupted."""
    from optimizer.runtime import device_server

    _require_word(key)
    device_server.serve(key, host=host, port=port, tracker=_address(tracker), address=address)


@command.command(name="status")
@click.option("--tracker", metavar="HOST:PORT", help="By default the one that was started here.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(tracker: str | None, as_json: bool) -> None:
    """List the devices that a tracker knows; exit code 1 where a process that was started here has ended."""
    import dataclasses

    from optimizer.cli.console import print_table
    from optimizer.cli.plain_text import print_json
    from optimizer.tuning import fleet
    from optimizer.tuning.tracker import tracker_state

    mine = fleet.current()
    if tracker is None and mine is None:
        raise OptionError("no fleet was started on this machine; give --tracker HOST:PORT, or 'optimizer fleet up'")
    host, port = _address(tracker) if tracker is not None or mine is None else (mine.host, mine.port)
    state = tracker_state(host, port)
    ended = [] if tracker is not None or mine is None else [m.what for m in mine.members if m not in mine.running]
    if as_json:
        print_json({**dataclasses.asdict(state), "ended": ended})
    else:
        counts = {each.key: sum(other.key == each.key for other in state.devices) for each in state.devices}
        rows = [
            (each.key, f"{each.host}:{each.port}", f"{state.free.get(each.key, 0)} of {counts[each.key]} free")
            for each in state.devices
        ]
        print_table(f"tracker at {host}:{port}", ("key", "device", "of this key"), rows)
        for what in ended:
            click.echo(f"ended: {what}")
    if ended:
        sys.exit(1)


@command.command(name="down")
def down() -> None:
    """End the tracker and the devices that `fleet up` started on this machine."""
    from optimizer.tuning import fleet

    click.echo(f"{fleet.down()} processes ended")


def _address(text: str | None) -> tuple[str, int]:
    from optimizer.runtime.device_server import parse_address

    assert text is not None
    try:
        return parse_address(text)
    except ValueError as error:
        raise OptionError(f"--tracker: {error}") from error


def _require_word(key: str) -> None:
    if len(key.split()) != 1 or "@" in key or ":" in key:
        raise OptionError(f"'{key}' cannot be a key: one word without '@' and ':'")
