"""The cases of the backend suite that are refused, with the reason: see exclusions.toml."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("exclusions.toml")


@dataclass(frozen=True)
class Exclusion:
    """A reason, and patterns that match the whole name of each case it holds for."""

    reason: str
    patterns: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """Return whether a case is excluded for this reason."""
        return any(re.fullmatch(pattern, name) for pattern in self.patterns)


@cache
def exclusions() -> tuple[Exclusion, ...]:
    """Return all exclusions."""
    entries = tomllib.loads(_FILE.read_text())["exclusion"]
    return tuple(Exclusion(entry["reason"], tuple(entry["cases"])) for entry in entries)


def exclusion_of(name: str) -> Exclusion | None:
    """Return the exclusion that covers a case, or None."""
    return next((exclusion for exclusion in exclusions() if exclusion.covers(name)), None)
