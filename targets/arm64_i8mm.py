"""64-bit Arm with the int8 and bf16 matrix instructions (Armv8.6): phones since 2021, Graviton3."""

from __future__ import annotations

from dataclasses import replace

from targets.arm64 import ARM64

ARM64_I8MM = replace(
    ARM64,
    name="arm64-i8mm",
    description="64-bit Arm with int8 and bf16 matrix instructions (Cortex-A510, Cortex-A710, Neoverse V1 and newer)",
    features=(*ARM64.features, "i8mm", "bf16"),
    llvm_attributes=(*ARM64.llvm_attributes, "+i8mm", "+bf16"),
    # QEMU has no core between Cortex-A76 and all that it knows; pauth-impdef is its quick pointer authentication.
    emulated_cpu="max,sve=off,sme=off,pauth-impdef=on",
)
