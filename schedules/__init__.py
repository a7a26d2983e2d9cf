"""Default schedules: every TIR function of a compiled model becomes parallel, vectorized and tiled for its target."""

from __future__ import annotations

from schedules.prepack import PrepackReport, prepack
from schedules.report import Decide, KernelReport
from schedules.schedule import by_default, schedule_function, schedule_module

__all__ = ["Decide", "KernelReport", "PrepackReport", "by_default", "prepack", "schedule_function", "schedule_module"]
