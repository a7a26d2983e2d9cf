"""NVIDIA GPUs from Ampere on, beside an x86-64 host."""

from __future__ import annotations

from dataclasses import replace

from targets.base import CacheSizes, DataLayouts, Target, architecture_number
from targets.errors import UnknownTargetError
from targets.x86_avx2 import X86_AVX2

# What CUDA 13 compiles for; older ones lack bf16 and asynchronous copies.
KNOWN_ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")

CUDA = replace(
    X86_AVX2,
    name="cuda",
    description="NVIDIA GPU (Ampere and newer) with an x86-64 host that has AVX2",
    # Here a core is a multiprocessor, and level 1 the shared memory that a block has without opting in:
    # A100 has 108 of them and 40 MiB of level 2 (NVIDIA A100 Tensor Core GPU Architecture, table 4).
    vector_bits=128,
    caches=CacheSizes(level1=48 * 1024, level2=40 * 1024 * 1024 // 108, level3=0),
    layouts=DataLayouts(channel_block=8, column_block=16, reduction_group=4),
    cores=108,
    device="cuda",
    gpu_architectures=("sm_80", "sm_90"),
)


def with_architectures(gpu_architectures: tuple[str, ...]) -> Target:
    """Return the CUDA target whose packages hold device code for exactly these architectures, lowest first.

    Raises UnknownTargetError for a name that is not one of KNOWN_ARCHITECTURES, or when there is none.
    """
    unknown = [name for name in gpu_architectures if name not in KNOWN_ARCHITECTURES]
    if unknown or not gpu_architectures:
        asked = ", ".join(unknown) or "none given"
        raise UnknownTargetError(f"unknown GPU architecture ({asked}); choose from {', '.join(KNOWN_ARCHITECTURES)}")
    return replace(CUDA, gpu_architectures=tuple(sorted(set(gpu_architectures), key=architecture_number)))
