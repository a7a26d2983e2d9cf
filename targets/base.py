"""What a hardware target declares; one file beside this one per target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tvm.target import Target as TVMTarget

DeviceKind = Literal["cpu", "cuda"]
Architecture = Literal["x86_64", "aarch64"]

# The oldest C library that a package may meet, which is also what the TVM runtime's wheels ask for (manylinux_2_28).
GLIBC_FLOOR = "2.28"


# The schedules say what is a vector. LLVM 22's own loop vectorizer miscompiles loops of 512-bit width whose loads are
# guarded and indexed modulo a power of two, as in rotary embeddings (ONNX's test_rotary_embedding_3d_input).
_LLVM_OPTIONS = ("-vectorize-loops=false",)

# Linux's names of x86's instructions that add four products of bytes to a sum of 32 bits, of 512 and of 256 bits.
VNNI = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True)
class CacheSizes:
    """Data cache capacities in bytes that one core may count on; tile sizes derive from them."""

    level1: int
    level2: int
    level3: int


@dataclass(frozen=True)
class DataLayouts:
    """Block sizes, in elements, of packed activations, weights and caches.

    `channel_block`: images are [N, C/block, H, W, block]. `rounded_block`: the same where convolutions read bfloat16,
    `byte_block` where all of a model read bytes that fill such blocks, 0 if that makes no difference. `column_block`:
    matrix multiplication weights are [N/block, K, block]. `reduction_group`: how many neighbouring int8 elements of K
    one lane of the dot-product instruction consumes. `quantized_columns`: outputs that lie side by side in quantized
    weights, each with `reduction_group` neighbours of K (`schedules/weight_layout.py`); `signed_codes`: these lie as
    signed numbers.
    `kv_cache`: the order of dimensions of keys and values.
    """

    channel_block: int
    column_block: int
    reduction_group: int
    quantized_columns: int = 16
    signed_codes: bool = False
    kv_cache: Literal["BHSD"] = "BHSD"
    # Not in what identifies a target's tuning records, which are older.
    rounded_block: int = field(default=0, repr=False)
    byte_block: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Target:
    """A hardware target: what its code may use and what the compiler may assume about it.

    `features` are the CPU features that a machine must have before the package's code is loaded, named as Linux
    names them in /proc/cpuinfo: exactly those that the code generator may use given `llvm_cpu` and
    `llvm_attributes`. `vector_bits` is the width of a vector register (on a GPU: of a thread's widest load).
    `multiply_adds` is how many multiply-adds of whole vectors a core begins in a cycle, 1 if that is not known.
    `cores` is how many cores default schedules find work for; the runtime uses as many as the machine has.
    `gpu_architectures` are the CUDA architectures (such as "sm_90") whose device code goes into the package.
    `emulated_cpu` is the QEMU_CPU under which the target's code can be executed elsewhere.
    `streamed_to` is the cache, 1 or 2, into which code asks for what it reads once, ahead of its use;
    `read_streams` is from how many places by turns it reads that.
    """

    name: str
    description: str
    architecture: Architecture
    features: tuple[str, ...]
    llvm_triple: str
    llvm_cpu: str
    llvm_attributes: tuple[str, ...]
    vector_bits: int
    caches: CacheSizes
    layouts: DataLayouts
    cores: int
    device: DeviceKind = "cpu"
    gpu_architectures: tuple[str, ...] = ()
    emulated_cpu: str | None = None
    # Not in what identifies a target's tuning records, which are older.
    streamed_to: int = field(default=1, repr=False)
    read_streams: int = field(default=1, repr=False)
    multiply_adds: int = field(default=1, repr=False)

    def vector_lanes(self, bits: int) -> int:
        """Return how many elements of `bits` bits one vector register holds (at least 1)."""
        return max(1, self.vector_bits // bits)

    @property
    def vector_registers(self) -> int:
        """Return how many vector registers there are: x86 has 16 of 256 bits, and 32 of 512; Arm has 32."""
        return 16 if self.architecture == "x86_64" and self.vector_bits < 512 else 32

    @property
    def has_few_registers(self) -> bool:
        """Return whether there are fewer than 32 vector registers, as on x86 with AVX2 alone."""
        return self.vector_registers < 32

    @property
    def has_vnni(self) -> bool:
        """Return whether an instruction adds four products of bytes to a sum of 32 bits, as on x86 with VNNI."""
        return not VNNI.isdisjoint(self.features)

    @property
    def linker_triple(self) -> str:
        """The triple, with the C library's version, that the linker is asked for."""
        return f"{self.architecture}-linux-gnu.{GLIBC_FLOOR}"

    @property
    def device_code_architectures(self) -> tuple[str, ...]:
        """What the package's device code is for: a cubin for each GPU architecture, and PTX for the lowest."""
        if not self.gpu_architectures:
            return ()
        lowest = min(map(architecture_number, self.gpu_architectures))
        return (*self.gpu_architectures, f"compute_{lowest}")

    def tvm_target(self) -> TVMTarget:
        """Return TVM's description of this target; that of a GPU carries its host's.

        GPU code is generated once, for the lowest of `gpu_architectures`, so that every one of them can run it.
        """
        from tvm.target import Target as TVMTarget  # noqa: PLC0415 - listing targets must not load TVM

        host: dict[str, object] = {
            "kind": "llvm",
            "mtriple": self.llvm_triple,
            "mcpu": self.llvm_cpu,
            "cl-opt": list(_LLVM_OPTIONS),
        }
        if self.llvm_attributes:
            host["mattr"] = list(self.llvm_attributes)
        if self.device == "cpu":
            return TVMTarget({**host, "num-cores": self.cores})
        return TVMTarget(
            {
                "kind": "cuda",
                "arch": min(self.gpu_architectures, key=architecture_number),
                # What every block may have on every supported architecture without opting in
                # (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
                "max_num_threads": 1024,
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": 48 * 1024,
                "thread_warp_size": 32,
                "registers_per_block": 65536,
                "host": host,
            }
        )


def architecture_number(gpu_architecture: str) -> int:
    """Return the number in a CUDA architecture's name: 90 for "sm_90"."""
    return int(gpu_architecture.removeprefix("sm_"))
