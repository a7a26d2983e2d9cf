"""x86-64 servers and desktops with AVX-512.

INT8 and INT4 kernels stand on VNNI, so the base asks for it: Cascade Lake, Ice Lake, Zen 4 and newer, but not
Skylake-SP, which `x86-avx2` serves. BF16 dot products are a variant: Cooper Lake, Sapphire Rapids, Zen 4 and newer.
"""

from __future__ import annotations

from dataclasses import replace

from targets.base import CacheSizes, DataLayouts, Target
from targets.x86_avx2 import X86_AVX2

X86_AVX512 = Target(
    name="x86-avx512",
    description="x86-64 with AVX-512 and VNNI (Cascade Lake, Ice Lake, Zen 4 and newer)",
    architecture="x86_64",
    features=(*X86_AVX2.features, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"),
    llvm_triple="x86_64-unknown-linux-gnu",
    llvm_cpu="x86-64-v4",
    # x86-64-v4 is tuned for Skylake-SP, which lowers its clock under 512-bit code; those that have VNNI need not.
    llvm_attributes=("+avx512vnni", "-prefer-256-bit"),
    vector_bits=512,
    # The least of Cascade Lake (32 KiB, 1 MiB, 1.375 MiB), Sapphire Rapids (48 KiB, 2 MiB, 1.875 MiB) and Zen 4
    # (32 KiB, 1 MiB, 4 MiB), per core: Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 2;
    # Software Optimization Guide for the AMD Zen4 Microarchitecture, section 2.
    caches=CacheSizes(level1=32 * 1024, level2=1024 * 1024, level3=1408 * 1024),
    layouts=DataLayouts(channel_block=16, column_block=32, reduction_group=4),
    cores=8,
)

X86_AVX512_BF16 = replace(
    X86_AVX512,
    name="x86-avx512-bf16",
    description="x86-64 with AVX-512, VNNI and BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and newer)",
    features=(*X86_AVX512.features, "avx512_bf16"),
    llvm_attributes=(*X86_AVX512.llvm_attributes, "+avx512bf16"),
)

X86_AVX512_AMX = replace(
    X86_AVX512_BF16,
    name="x86-avx512-amx",
    description="x86-64 with AVX-512 and matrix products in tiles, AMX (Sapphire Rapids, Granite Rapids and newer)",
    features=(*X86_AVX512_BF16.features, "amx_tile", "amx_bf16", "amx_int8"),
    llvm_attributes=(*X86_AVX512_BF16.llvm_attributes, "+amx-tile", "+amx-bf16", "+amx-int8"),
    # Sapphire Rapids: 48 KiB and 2 MiB of its own, 1.875 MiB of the last cache (manual above).
    caches=CacheSizes(level1=48 * 1024, level2=2048 * 1024, level3=1920 * 1024),
    # The 64 bytes that a row of a tile holds.
    layouts=replace(X86_AVX512_BF16.layouts, rounded_block=32, byte_block=64),
    # All products of a step of llama3.2_1b took 42 and 44 ms with requests to the first-level cache, 35 to 37 and 37 to
    # 40 with those to the second, reading alone 35 and 36 (Granite Rapids, two threads, two runs in C). A Golden Cove
    # has 16 fill buffers at the first one, 48 places for requests at the second (Intel Architecture Day 2021): that may
    # be why.
    streamed_to=2,
    # By turns from four places with requests two threads read 33 GB/s, from one 29 to 31 (Granite Rapids).
    read_streams=4,
    # Two units of 512 bits (manual above); Zen 4 begins one such multiply-add a cycle.
    multiply_adds=2,
)
