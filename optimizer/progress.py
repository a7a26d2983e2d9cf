"""How long-running work tells whoever watches how far it is; nothing here knows about terminals."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Watcher(Protocol):
    """Whoever is told about the stages of a piece of work."""

    def started(self, stage: str) -> None:
        """Hear that a stage begins."""
        ...

    def finished(self, stage: str, seconds: float) -> None:
        """Hear that a stage ended after so many seconds."""
        ...


class Silent:
    """A watcher that ignores everything."""

    def started(self, stage: str) -> None:
        """Ignore."""

    def finished(self, stage: str, seconds: float) -> None:
        """Ignore."""


@dataclass
class Timeline:
    """The stages that have run, in order, with their times in seconds."""

    watcher: Watcher = field(default_factory=Silent)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside as one stage."""
        self.watcher.started(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.watcher.finished(name, self.seconds[name])
