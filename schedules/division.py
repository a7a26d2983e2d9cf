"""How cores divide a tensor of blocked channels between them: by parts of the image, or by channels.

Threads share the tasks of a kernel out in order: of two, the first one gets the first half. What a kernel reads was
written by another one, and lies in the cache of the core that did that: kernels one behind the other should divide
alike. A kernel does not know its neighbours, so its function is told, by an attribute: `optimizer.work_division` writes
it, the schedules of convolutions, poolings, changes of layout and elementwise kernels read it. Values do not depend on
it, and it is no part of a workload's identity: of the parameters of schedules only the sizes of tasks depend on it, and
only as defaults.
"""

from __future__ import annotations

from enum import StrEnum

from tvm import tirx

# Tasks per core that leave no core idle for long while another finishes its last one.
TASKS_PER_CORE = 8
_ATTRIBUTE = "division"


class Division(StrEnum):
    """What each core computes: all channels of a part of the image, or some channels of all of it."""

    IMAGE = "image"
    CHANNELS = "channels"


def division_of(function: tirx.PrimFunc) -> Division:
    """Return how a function's kernel is to be divided: by channels unless it says otherwise."""
    said = function.attrs.get(_ATTRIBUTE) if function.attrs is not None else None
    return Division.CHANNELS if said is None else Division(str(said))


def with_division(function: tirx.PrimFunc, division: Division) -> tirx.PrimFunc:
    """Return a function whose kernel is to be divided so."""
    return function.with_attr(_ATTRIBUTE, division.value)


def even_parts(total: int, most: int) -> int:
    """Return the largest number of parts of one size, at most `most`, of `total` positions."""
    return next(parts for parts in range(min(total, most), 0, -1) if total % parts == 0)
