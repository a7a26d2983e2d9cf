"""What this machine is, as far as choosing a target for it goes."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

from targets.base import Target

_CPU_INFO = Path("/proc/cpuinfo")
# arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA (Linux, Documentation/arch/x86/xstate.rst).
_ASK_FOR_TILES = 158, 0x1023, 18


@cache
def cpu_features() -> frozenset[str]:
    """Return the CPU features of this machine as Linux names them; none where Linux does not say.

    Those of AMX, whose registers a process has to ask for, are among them only where Linux lets this one use them.
    """
    if not _CPU_INFO.exists():
        return frozenset()
    for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return _permitted(frozenset(value.split()))
    return frozenset()


def _permitted(features: frozenset[str]) -> frozenset[str]:
    if "amx_tile" not in features or ctypes.CDLL(None).syscall(*map(ctypes.c_long, _ASK_FOR_TILES)) == 0:
        return features
    return frozenset(name for name in features if not name.startswith("amx_"))


def missing_features(target: Target) -> tuple[str, ...]:
    """Return what this machine's CPU lacks to execute the target's (host) code: nothing when it can.

    A machine of another architecture lacks the architecture, which stands in front.
    """
    if platform.machine() != target.architecture:
        return (target.architecture, *target.features)
    return tuple(feature for feature in target.features if feature not in cpu_features())
