"""What scheduling reports of each function, and the mark that it leaves on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import tvm.ir
from tvm import tirx

from schedules.family import Parameters, Space

# The attribute by which TVM's own passes, too, know a function that needs no schedule.
SCHEDULED = "tirx.is_scheduled"
# The attribute with the places of the arguments that a function reads only where it writes its result next.
OVERWRITABLE = "optimizer.overwritable"


def is_scheduled(function: tirx.PrimFunc) -> bool:
    """Return whether `function` is marked as scheduled."""
    return function.attrs is not None and SCHEDULED in function.attrs and bool(function.attrs[SCHEDULED])


def overwritable_of(function: tvm.ir.BaseFunc) -> tuple[int, ...]:
    """Return the places of the arguments that may have the same memory as a function's result, its last argument."""
    if not isinstance(function, tirx.PrimFunc) or function.attrs is None or OVERWRITABLE not in function.attrs:
        return ()
    return tuple(int(place) for place in function.attrs[OVERWRITABLE])


@dataclass(frozen=True)
class KernelReport:
    """How a function was scheduled: its family, the parameters, and the reason where it is left as it was.

    `regions` is how many loop nests the function runs one after the other, each reading what those before it stored.
    `operators` are those that it computes, in order; `nodes` the names of the ONNX nodes behind each call of it.
    `workload` identifies what the function computes (see `schedules.workload`), `space` holds the parameters that its
    main kernel may be tuned by, of the family's schedule `version`; `tuned` says that a decision replaced defaults.
    """

    function: str
    family: str
    parameters: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    regions: int = 1
    operators: tuple[str, ...] = ()
    nodes: tuple[tuple[str, ...], ...] = ()
    workload: str = ""
    space: Space = ()
    version: int = 0
    tuned: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        """Return what records of this kernel are looked up by."""
        return self.workload, self.family, self.version


# Returns the parameters to replace defaults by, or None, from a report whose family, version and space are known.
Decide = Callable[[KernelReport], Parameters | None]
