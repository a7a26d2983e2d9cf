"""What this machine offers: CPU features, physical cores that the process may use, the C library."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

from optimizer.errors import OptionError

_ROOT = Path("/")
_AT_HWCAP, _AT_HWCAP2 = 16, 26
# The call of the system by which a process asks to use AMX's tile registers: arch_prctl, ARCH_REQ_XCOMP_PERM,
# XFEATURE_XTILEDATA (Linux, Documentation/arch/x86/xstate.rst).
_ASK_FOR_TILES = 158, 0x1023, 18

# Bit positions of arch/arm64/include/uapi/asm/hwcap.h in Linux; the names are those of /proc/cpuinfo.
_AARCH64_HWCAP = """
    fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4
    asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg
"""
_AARCH64_HWCAP2 = """
    dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh
    rng bti mte ecv afp rpres mte3 sme
"""


def architecture() -> str:
    """Return the architecture that this process runs as: "x86_64", "aarch64", or what the kernel calls it."""
    name = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(name, name)


def cpu_features(root: Path = _ROOT) -> frozenset[str]:
    """Return the instruction-set features that Linux lets programs use, in the spelling of /proc/cpuinfo.

    On AArch64 they come from the auxiliary vector, which an emulator sets for its guest (its /proc is the host's). A
    process may use the tile registers of AMX only after it has asked, as this does; where Linux refuses, those features
    are not among the ones returned.
    """
    if architecture() == "aarch64":
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return aarch64_features(getauxval(_AT_HWCAP), getauxval(_AT_HWCAP2))
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return _permitted(frozenset(value.split()))
    return frozenset()


def _permitted(features: frozenset[str]) -> frozenset[str]:
    """Return the features of an x86 CPU without those of AMX if Linux does not let this process use them."""
    if "amx_tile" not in features or ctypes.CDLL(None).syscall(*map(ctypes.c_long, _ASK_FOR_TILES)) == 0:
        return features
    return frozenset(name for name in features if not name.startswith("amx_"))


def aarch64_features(hwcap: int, hwcap2: int) -> frozenset[str]:
    """Return the feature names for the two capability words of the AArch64 auxiliary vector."""
    words = ((hwcap, _AARCH64_HWCAP), (hwcap2, _AARCH64_HWCAP2))
    return frozenset(name for word, names in words for bit, name in enumerate(names.split()) if word >> bit & 1)


@functools.cache
def cpu_model() -> str:
    """Return the CPU's model name as Linux gives it, "unknown" where it gives none."""
    found = re.search(r"^(?:model name|Hardware|CPU part)\s*:\s*(.+)$", _text(_ROOT / "proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def glibc_version() -> str:
    """Return the version of the GNU C library such as "2.36", or "" on a system with another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):
        return ""
    return version if name == "glibc" else ""


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "0.27.0.post1" -> (0, 27, 0)."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def cpus_by_core(root: Path = _ROOT) -> tuple[tuple[int, ...], ...]:
    """Return the logical CPUs that this thread may run on, grouped by physical core; cores and CPUs ascend."""
    return _group_by_core(frozenset(os.sched_getaffinity(0)), root)


@functools.lru_cache(maxsize=16)
def _group_by_core(allowed: frozenset[int], root: Path) -> tuple[tuple[int, ...], ...]:
    cores: set[tuple[int, ...]] = set()
    for cpu in allowed:
        siblings = _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(tuple(sorted(allowed & (_cpu_list(siblings) | {cpu}))))
    return tuple(sorted(cores))


def _cpu_list(text: str) -> frozenset[int]:
    """Return the CPUs of a kernel list such as "0-3,8"."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Return how many CPUs' worth of time the control groups of this process grant, or None for no limit."""
    quotas: list[float] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            quotas += _quotas_upwards(root / "sys/fs/cgroup", path, _quota_v2)
        elif "cpu" in controllers.split(","):
            quotas += _quotas_upwards(root / "sys/fs/cgroup/cpu", path, _quota_v1)
    return min(quotas, default=None)


def _quotas_upwards(mount: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    """Read the quota of a control group and of all above it; within a container the path may be the host's."""
    group = Path(path.lstrip("/"))
    levels = [mount / part for part in (group, *group.parents)]
    return [quota for level in levels if (quota := read(level)) is not None]


def _quota_v2(group: Path) -> float | None:
    limit, _, period = _text(group / "cpu.max").strip().partition(" ")
    return int(limit) / int(period) if limit.isdecimal() and period.isdecimal() and int(period) else None


def _quota_v1(group: Path) -> float | None:
    limit, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(limit) / int(period) if limit.isdecimal() and period.isdecimal() and int(period) else None


def default_thread_count(root: Path = _ROOT) -> int:
    """Return how many threads kernels should use: one per physical core of this process, within its CPU quota."""
    quota = cpu_quota(root)
    cores = len(cpus_by_core(root))
    return cores if quota is None else max(1, min(cores, int(quota)))


def resolve_thread_count(threads: int | None) -> int:
    """Return `threads`, or the default of this machine for None; raises OptionError unless 1 to the number of CPUs."""
    if threads is None:
        return default_thread_count()
    cpus = sum(map(len, cpus_by_core()))
    if not 1 <= threads <= cpus:
        raise OptionError(f"threads={threads} is not possible; this process may use 1 to {cpus} CPUs")
    return threads


def count_physical_cores_by_default() -> None:
    """Make TVM's thread pools of this process and its children as large as ours, unless TVM_NUM_THREADS is set.

    For programs that run TVM before they load a package, such as the compiler when it folds constants: the pool of a
    thread cannot grow later.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(default_thread_count()))


def _text(path: Path) -> str:
    """Return the file's text, or "" where this kernel does not offer the file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
