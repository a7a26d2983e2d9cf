"""What all tests share: TVM runs on all physical cores, whatever runs it first."""

from __future__ import annotations

from optimizer.runtime import machine

machine.count_physical_cores_by_default()
