"""x86-64 machines with AVX2 and FMA: the x86-64-v3 level of the System V ABI.

Those of Intel's cores since Alder Lake that have no AVX-512, in laptops and in Sierra Forest, have AVX-VNNI.
"""

from __future__ import annotations

from dataclasses import replace

from targets.base import CacheSizes, DataLayouts, Target

X86_AVX2 = Target(
    name="x86-avx2",
    description="x86-64 with AVX2 and FMA (Haswell, Zen and newer)",
    architecture="x86_64",
    # System V ABI, AMD64 supplement, table "Micro-Architecture Levels", levels 2 and 3.
    features=(
        *("cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"),
        *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
    ),
    llvm_triple="x86_64-unknown-linux-gnu",
    llvm_cpu="x86-64-v3",
    llvm_attributes=(),
    vector_bits=256,
    # Haswell: 32 KiB and 256 KiB, and 2 MiB of the shared cache per core (Intel 64 and IA-32 Architectures
    # Optimization Reference Manual, chapter 2); Zen has no less.
    caches=CacheSizes(level1=32 * 1024, level2=256 * 1024, level3=2 * 1024 * 1024),
    layouts=DataLayouts(channel_block=8, column_block=16, reduction_group=4),
    cores=8,
)

X86_AVX2_VNNI = replace(
    X86_AVX2,
    name="x86-avx2-vnni",
    description="x86-64 with AVX2 and AVX-VNNI (Alder Lake, Sierra Forest and newer)",
    features=(*X86_AVX2.features, "avx_vnni"),
    llvm_attributes=("+avxvnni",),
    # A Gracemont has 32 KiB, and a quarter of 2 MiB; a Golden Cove 48 KiB and 1.25 MiB (manual above).
    caches=CacheSizes(level1=32 * 1024, level2=512 * 1024, level3=2 * 1024 * 1024),
)
