"""What all tests share: TVM runs on all physical cores, and property tests draw the same examples each time."""

from __future__ import annotations

from hypothesis import settings

from optimizer.runtime import machine

machine.count_physical_cores_by_default()

# No deadline: how long an example takes says more about the machine than about the code.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
