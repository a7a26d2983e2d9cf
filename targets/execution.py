"""How this machine can execute what was compiled for a target."""

from __future__ import annotations

from typing import Literal

from targets.base import Target
from targets.emulator import Emulator
from targets.gpu import gpus
from targets.host import missing_features

Execution = Literal["native", "emulator", "no"]


def how_executed(target: Target) -> Execution:
    """Return "native" when this machine's CPU (and GPU) can run the target's code, "emulator" when QEMU can."""
    if not missing_features(target):
        return "native" if target.device == "cpu" or gpus() else "no"
    if target.emulated_cpu is not None and Emulator().available() is None:
        return "emulator"
    return "no"
