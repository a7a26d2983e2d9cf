"""What commands print without rich, whose import takes as long as reading a short prompt: JSON, and quantities."""

from __future__ import annotations

import json

import click

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(document: object) -> None:
    """Print a document as JSON on standard output."""
    click.echo(json.dumps(document, indent=1))


def bytes_text(count: int) -> str:
    """Return a byte count with the unit that suits it."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def seconds_text(seconds: float) -> str:
    """Return a duration with the unit that suits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.1f} s"
