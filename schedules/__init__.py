"""Default schedules: every TIR function of a compiled model becomes parallel, vectorized and tiled for its target."""

from __future__ import annotations

from schedules.prepack import PrepackReport, prepack
from schedules.report import KernelReport
from schedules.schedule import schedule_function, schedule_module

__all__ = ["KernelReport", "PrepackReport", "prepack", "schedule_function", "schedule_module"]
