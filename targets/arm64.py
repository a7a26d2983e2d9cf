"""64-bit Arm with the Armv8.2 dot product and half precision: phones and boards since 2018, Graviton2."""

from __future__ import annotations

from targets.base import CacheSizes, DataLayouts, Target

ARM64 = Target(
    name="arm64",
    description="64-bit Arm with dot product (Cortex-A55, Cortex-A76, Neoverse N1 and newer)",
    architecture="aarch64",
    features=("fp", "asimd", "fphp", "asimdhp", "asimddp"),
    llvm_triple="aarch64-unknown-linux-gnu",
    # No core's name here: each would bring crypto and other extensions that its licensees may leave out.
    llvm_cpu="generic",
    llvm_attributes=("+neon", "+fullfp16", "+dotprod"),
    vector_bits=128,
    # The least of Cortex-A76 (64 KiB, 256 KiB) and Neoverse N1 (64 KiB, 512 KiB) as their technical reference
    # manuals allow, and half a MiB of the shared cache per core, as in a phone's 4 MiB for eight cores.
    caches=CacheSizes(level1=64 * 1024, level2=256 * 1024, level3=512 * 1024),
    layouts=DataLayouts(channel_block=4, column_block=8, reduction_group=4, signed_codes=True),
    cores=4,
    emulated_cpu="cortex-a76",
)
