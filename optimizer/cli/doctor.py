"""`optimizer doctor`."""

from __future__ import annotations

import click


@click.command(name="doctor")
@click.option("--target", "-t", "names", multiple=True, help="Check what this target needs; by default all targets.")
@click.option("--rpc", metavar="KEY@HOST:PORT", help="Check that this device answers a TVM RPC tracker.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(names: tuple[str, ...], rpc: str | None, as_json: bool) -> None:
    """Check tool chains, CPU features, threads, memory bandwidth, GPU and RPC device.

    Each failed check names its fix. Exit code 1 if one fails.
    """
    import dataclasses
    import sys

    from optimizer.cli.console import print_table
    from optimizer.cli.plain_text import print_json
    from optimizer.doctor import run_checks

    checks = run_checks(names or None, rpc)
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        rows = [(check.status, check.name, check.found, check.fix) for check in checks]
        print_table("doctor", ("", "check", "found", "fix"), rows)
    sys.exit(1 if any(check.status == "fail" for check in checks) else 0)
