"""Reading the machine: cores, quotas and features from files as kernels write them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from optimizer.runtime import machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def topology(*siblings: str) -> dict[str, str]:
    """Return the files for CPUs 0, 1, ... with these sibling lists."""
    names = (f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in range(len(siblings)))
    return dict(zip(names, (text + "\n" for text in siblings), strict=True))


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The CPUs that this process may run on; tests change the set."""
    allowed: set[int] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    return allowed


def test_hyper_threads_count_as_one_core(tmp_path: Path, affinity: set[int]) -> None:
    affinity.update(range(4))
    root = write(tmp_path, topology("0,2", "1,3", "0,2", "1,3"))
    assert machine.cpus_by_core(root) == ((0, 2), (1, 3))
    assert machine.default_thread_count(root) == 2


def test_only_cores_of_the_affinity_mask_count(tmp_path: Path, affinity: set[int]) -> None:
    affinity.update({1, 4, 5})
    root = write(tmp_path, topology(*["0-1"] * 2, *["2-3"] * 2, *["4-5"] * 2))
    assert machine.cpus_by_core(root) == ((1,), (4, 5))


def test_without_topology_files_each_cpu_is_a_core(tmp_path: Path, affinity: set[int]) -> None:
    affinity.update({0, 1, 2})
    assert machine.cpus_by_core(tmp_path) == ((0,), (1,), (2,))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2", "v2 unlimited", "v2 of a parent", "v1", "v1 unlimited", "no control groups"],
)
def test_cpu_quota_of_control_groups(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert machine.cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "threads"), [("50000", 1), ("250000", 2), ("900000", 4)])
def test_threads_stay_within_the_quota(tmp_path: Path, affinity: set[int], quota: str, threads: int) -> None:
    affinity.update(range(4))
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert machine.default_thread_count(root) == threads


def test_x86_features_come_from_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "architecture", lambda: "x86_64")
    root = write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t\t: none\n"})
    assert machine.cpu_features(root) == {"fpu", "avx2", "avx512f"}


@pytest.mark.parametrize(("refused", "found"), [(0, {"avx2", "amx_tile", "amx_bf16"}), (-1, {"avx2"})])
def test_tile_registers_count_where_linux_lets_the_process_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int, found: set[str]
) -> None:
    monkeypatch.setattr(machine, "architecture", lambda: "x86_64")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *_: refused))
    root = write(tmp_path, {"proc/cpuinfo": "flags\t\t: avx2 amx_tile amx_bf16\n"})
    assert machine.cpu_features(root) == found


def test_aarch64_capability_bits_have_their_names() -> None:
    assert machine.aarch64_features(1 << 20 | 1 << 22, 1 << 13 | 1 << 1) == {"asimddp", "sve", "i8mm", "sve2"}


def test_environment_asks_for_all_physical_cores_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in (("", str(machine.default_thread_count())), ("1", "1")):
        monkeypatch.setitem(os.environ, "TVM_NUM_THREADS", before)
        if not before:
            del os.environ["TVM_NUM_THREADS"]
        machine.count_physical_cores_by_default()
        assert os.environ["TVM_NUM_THREADS"] == after


@pytest.mark.parametrize(("text", "numbers"), [("0.27.0.post1", (0, 27, 0)), ("2.36", (2, 36)), ("", ())])
def test_release_numbers_of_a_version(text: str, numbers: tuple[int, ...]) -> None:
    assert machine.release(text) == numbers
