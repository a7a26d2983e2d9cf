"""Hardware targets: what each machine offers, and how code for it is linked and executed.

Every target is a file of this package and one entry of `_TARGETS`.
"""

from __future__ import annotations

from collections.abc import Iterable

from targets.arm64 import ARM64
from targets.arm64_i8mm import ARM64_I8MM
from targets.arm64_sve2 import ARM64_SVE2
from targets.base import CacheSizes, DataLayouts, Target
from targets.cuda import CUDA, with_architectures
from targets.errors import ToolchainError, UnknownTargetError
from targets.host import cpu_features, missing_features
from targets.x86_avx2 import X86_AVX2, X86_AVX2_VNNI
from targets.x86_avx512 import X86_AVX512, X86_AVX512_AMX, X86_AVX512_BF16

__all__ = [
    "HOST",
    "CacheSizes",
    "DataLayouts",
    "Target",
    "ToolchainError",
    "UnknownTargetError",
    "cpu_features",
    "get",
    "missing_features",
    "names",
    "resolve_host",
    "siblings",
]

HOST = "host"

# Of one architecture the more capable stands first: `host` takes the first that this machine can execute.
_TARGETS = {
    target.name: target
    for target in (
        X86_AVX512_AMX,
        X86_AVX512_BF16,
        X86_AVX512,
        X86_AVX2_VNNI,
        X86_AVX2,
        ARM64_SVE2,
        ARM64_I8MM,
        ARM64,
        CUDA,
    )
}


def names() -> tuple[str, ...]:
    """Return the names of all targets, without the alias "host"."""
    return tuple(_TARGETS)


def get(name: str, gpu_architectures: Iterable[str] | None = None) -> Target:
    """Return the target of that name, "host" being the best one for this machine.

    `gpu_architectures` replaces the CUDA target's own. Raises UnknownTargetError for an unknown name or
    architecture, and for architectures asked of a target without a GPU.
    """
    target = resolve_host() if name == HOST else _TARGETS.get(name)
    if target is None:
        raise UnknownTargetError(f"unknown target '{name}'; choose from {', '.join((HOST, *names()))}")
    if gpu_architectures is None:
        return target
    if target.device != "cuda":
        raise UnknownTargetError(f"target '{name}' has no GPU; GPU architectures go with the target 'cuda'")
    return with_architectures(tuple(gpu_architectures))


def siblings(target: Target) -> tuple[Target, ...]:
    """Return the other targets whose schedules mean the same: of equal registers, caches, layouts and cores."""
    return tuple(other for other in _TARGETS.values() if other.name != target.name and _shape(other) == _shape(target))


def _shape(target: Target) -> tuple[object, ...]:
    return target.architecture, target.device, target.vector_bits, target.caches, target.layouts, target.cores


def resolve_host() -> Target:
    """Return the most capable CPU target that this machine can execute; raises UnknownTargetError when none fits."""
    candidates = [target for target in _TARGETS.values() if target.device == "cpu"]
    for target in candidates:
        if not missing_features(target):
            return target
    closest = min(candidates, key=lambda target: len(missing_features(target)))
    raise UnknownTargetError(
        f"no target fits this machine: the closest, '{closest.name}', needs {', '.join(missing_features(closest))}; "
        "compile for another machine with one of the names that 'optimizer targets' lists"
    )
