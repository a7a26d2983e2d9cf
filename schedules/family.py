"""The contract between operator families and what drives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.division import Division
from schedules.loops import Extent, index, parallel, product
from schedules.stages import Stage
from targets.base import Target

Parameters = Mapping[str, int]
Analysis = TypeVar("Analysis")
_Analysis_contra = TypeVar("_Analysis_contra", contravariant=True)

# Below this many element operations waking the other threads (about 1 us) costs more than they save.
PARALLEL_THRESHOLD = 32 * 1024


@dataclass(frozen=True, eq=False)
class Kernel:
    """Stages that run as one parallel region, in program order: the unit that a family schedules.

    `private` are the intermediate buffers that no other kernel touches; `division` is how cores are to divide an image.
    """

    stages: tuple[Stage, ...]
    private: tuple[Var, ...] = ()
    division: Division = Division.CHANNELS


@dataclass(frozen=True)
class Choice:
    """A named parameter of a schedule, its default, and the values that tuning may try."""

    name: str
    default: int
    candidates: tuple[int, ...]


Space = tuple[Choice, ...]


class Family(Protocol, Generic[Analysis]):
    """A kind of kernel that is scheduled in one way.

    `version` counts the changes of what its parameters mean: decisions that were tuned for another one do not apply.
    """

    name: str
    version: int

    def takes(self, kernel: Kernel, target: Target) -> Analysis | None:
        """Return what the schedule needs to know of `kernel`, or None where it is of another family."""
        ...

    def space(self, target: Target, analysis: Analysis) -> Space:
        """Return the parameters with their defaults for `target`."""
        ...

    def apply(self, analysis: Analysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the kernel's code under the given parameters."""
        ...


@runtime_checkable
class Overwriting(Protocol, Generic[_Analysis_contra]):
    """A family whose kernels may store their result over a term that they add."""

    def overwritable(self, analysis: _Analysis_contra) -> tuple[Var, ...]:
        """Return what is read only where a result of the same type is written next, which may have its memory."""
        ...


def defaults(space: Space) -> dict[str, int]:
    """Return every parameter's default."""
    return {choice.name: choice.default for choice in space}


def is_large(work: Extent) -> bool:
    """Return whether `work` element operations are worth more than one thread; symbolic work is."""
    return not isinstance(work, int) or work >= PARALLEL_THRESHOLD


def parallel_if_large(extent: Extent, work: Extent, body: Callable[[Expr], Stmt]) -> Stmt:
    """Return a loop on all threads where its `work` is large; where that is symbolic, the code chooses as it runs.

    `body` may be asked for twice, and returns buffers of its own each time.
    """
    if isinstance(work, int):
        return parallel(extent, body, is_large(work))
    alone = parallel(extent, body, enabled=False)
    return tirx.IfThenElse(index(work) >= index(PARALLEL_THRESHOLD), parallel(extent, body), alone)


def work_of(stage: Stage) -> Extent:
    """Return the number of points in the stage's domain."""
    return product([axis.extent for axis in stage.axes])


def vector_width(target: Target, stage: Stage) -> int:
    """Return the lanes of one register for the widest type of up to 32 bits that the stage touches."""
    widths = [stage.output.dtype.bits, *(load.source.dtype.bits for load in stage.loads())]
    return target.vector_lanes(max(8, min(32, max(widths))))
