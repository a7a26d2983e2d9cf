"""The cases of the backend suite that are refused or compared more loosely, with the reason: see exclusions.toml."""

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


@dataclass(frozen=True)
class Tolerance(Exclusion):
    """Tolerances that take the place of the suite's own."""

    rtol: float
    atol: float


@cache
def exclusions() -> tuple[Exclusion, ...]:
    """Return all exclusions."""
    entries = tomllib.loads(_FILE.read_text())["exclusion"]
    return tuple(Exclusion(entry["reason"], tuple(entry["cases"])) for entry in entries)


def exclusion_of(name: str) -> Exclusion | None:
    """Return the exclusion that covers a case, or None."""
    return next((exclusion for exclusion in exclusions() if exclusion.covers(name)), None)


@cache
def tolerances() -> tuple[Tolerance, ...]:
    """Return all tolerances of our own."""
    entries = tomllib.loads(_FILE.read_text())["tolerance"]
    return tuple(Tolerance(e["reason"], tuple(e["cases"]), e["rtol"], e["atol"]) for e in entries)


def tolerance_of(name: str) -> Tolerance | None:
    """Return the tolerance that a case has in place of the suite's, or None."""
    return next((tolerance for tolerance in tolerances() if tolerance.covers(name)), None)
