"""What scheduling reports of each function, and the mark that it leaves on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The attribute by which TVM's own passes, too, know a function that needs no schedule.
SCHEDULED = "tirx.is_scheduled"


@dataclass(frozen=True)
class KernelReport:
    """How a function was scheduled: its family, the parameters, and the reason where it is left as it was."""

    function: str
    family: str
    parameters: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
