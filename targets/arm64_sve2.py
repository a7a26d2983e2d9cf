"""64-bit Arm with scalable vectors (Armv9): Graviton4, Grace and other Neoverse V2 and N2 servers."""

from __future__ import annotations

from dataclasses import replace

from targets.arm64_i8mm import ARM64_I8MM
from targets.base import CacheSizes

ARM64_SVE2 = replace(
    ARM64_I8MM,
    name="arm64-sve2",
    description="64-bit Arm with SVE2 (Neoverse N2, Neoverse V2 and newer)",
    features=(*ARM64_I8MM.features, "sve", "sve2", "svei8mm", "svebf16"),
    llvm_attributes=(*ARM64_I8MM.llvm_attributes, "+sve", "+sve2"),
    # Neoverse N2 technical reference manual: 64 KiB and at least 512 KiB.
    caches=CacheSizes(level1=64 * 1024, level2=512 * 1024, level3=512 * 1024),
    # 128 bits is what all of these have; code of scalable length runs on longer registers too.
    emulated_cpu="max,sve-max-vq=1,sme=off,pauth-impdef=on",
)
