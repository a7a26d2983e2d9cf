"""What the schedules of a reduction need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.access import AxisGroup
from schedules.epilogue import Epilogue
from schedules.reducer import Reducer
from schedules.stages import Stage


@dataclass(frozen=True, eq=False)
class ReductionAnalysis:
    """The axes of a reduction and which of them runs in lanes: one of the output's, one reduced (`along`), or none."""

    stage: Stage
    epilogue: Epilogue
    groups: tuple[AxisGroup, ...]
    reduction: tuple[AxisGroup, ...]
    reducer: Reducer | None
    columns: AxisGroup | None
    along: AxisGroup | None
