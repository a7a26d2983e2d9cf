"""The table of targets keeps its own promises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tvm.target import codegen

import targets
from targets import host

# LLVM's name of each instruction-set extension that the targets may use, and Linux's; what is missing here
# are tuning choices, and what every machine of the architecture has.
_LINUX_NAMES = {
    "x86_64": {
        **{name: name for name in ("avx", "avx2", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", "cx16")},
        **{name: name for name in ("bmi2", "f16c", "fma", "movbe", "popcnt", "ssse3", "xsave")},
        "amx-bf16": "amx_bf16",
        "amx-int8": "amx_int8",
        "amx-tile": "amx_tile",
        "avx512bf16": "avx512_bf16",
        "avx512vnni": "avx512_vnni",
        "avxvnni": "avx_vnni",
        "bmi": "bmi1",
        "crc32": "sse4_2",  # the instruction is part of SSE4.2
        "lzcnt": "abm",
        "sahf": "lahf_lm",
        "sse3": "pni",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
    },
    "aarch64": {
        **{name: name for name in ("i8mm", "bf16", "sve", "sve2")},
        "dotprod": "asimddp",
        "fp-armv8": "fp",
        "fullfp16": "asimdhp",
        "neon": "asimd",
    },
}
_BASELINE_OR_TUNING = {
    "x86_64": {
        *("64bit", "64bit-mode", "cmov", "cx8", "fxsr", "mmx", "nopl", "sse", "sse2", "x87"),
        *("allow-light-256-bit", "false-deps-lzcnt-tzcnt", "false-deps-popcnt", "fast-15bytenop", "fast-gather"),
        *("fast-scalar-fsqrt", "fast-vector-fsqrt", "fast-shld-rotate", "fast-variable-crosslane-shuffle"),
        *("fast-variable-perlane-shuffle", "idivq-to-divl", "macrofusion", "slow-3ops-lea", "vzeroupper"),
    },
    "aarch64": {
        *("enable-select-opt", "fuse-adrp-add", "fuse-aes", "use-postra-scheduler"),
        *("ete", "trbe"),  # tracing, which only the kernel uses
    },
}

CPU_TARGETS = [name for name in targets.names() if targets.get(name).device == "cpu"]


@pytest.mark.parametrize("name", CPU_TARGETS)
def test_code_generator_uses_no_feature_that_is_not_required(name: str):
    target = targets.get(name)
    generated = set(codegen.llvm_get_cpu_features(target.tvm_target()))
    extensions = generated - _BASELINE_OR_TUNING[target.architecture]
    required = {_LINUX_NAMES[target.architecture][extension] for extension in extensions}
    assert required <= set(target.features)


@pytest.mark.parametrize("name", targets.names())
def test_entry_is_consistent(name: str):
    target = targets.get(name)
    assert target.name == name
    assert len(set(target.features)) == len(target.features)
    assert target.vector_lanes(32) * 32 == target.vector_bits
    assert target.layouts.channel_block % target.vector_lanes(32) == 0
    assert target.layouts.column_block % target.vector_lanes(32) == 0
    assert bool(target.gpu_architectures) == (target.device == "cuda")


def test_wider_vectors_are_declared_to_tvm():
    assert codegen.llvm_get_vector_width(targets.get("x86-avx512").tvm_target()) == 512


def test_cuda_code_is_generated_for_the_lowest_architecture():
    target = targets.get("cuda", ["sm_90", "sm_120", "sm_80", "sm_90"])
    assert target.gpu_architectures == ("sm_80", "sm_90", "sm_120")
    assert target.tvm_target().attrs["arch"] == "sm_80"


def test_unknown_target_is_refused_with_the_choice():
    with pytest.raises(targets.UnknownTargetError, match="x86-avx512"):
        targets.get("x86")


@pytest.mark.parametrize("architectures", [["sm_99"], ["90"], []])
def test_unknown_gpu_architecture_is_refused(architectures: list[str]):
    with pytest.raises(targets.UnknownTargetError, match="sm_80"):
        targets.get("cuda", architectures)


def test_gpu_architectures_need_a_gpu_target():
    with pytest.raises(targets.UnknownTargetError, match="cuda"):
        targets.get("arm64", ["sm_80"])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def pretend(architecture: str, features: tuple[str, ...]) -> None:
        monkeypatch.setattr(host.platform, "machine", lambda: architecture)
        monkeypatch.setattr(host, "cpu_features", lambda: frozenset(features))

    return pretend


@pytest.mark.parametrize("name", CPU_TARGETS)
def test_host_is_the_target_whose_features_the_machine_has(machine, name: str):
    target = targets.get(name)
    machine(target.architecture, target.features)
    assert targets.get("host").name == name


def test_machine_without_a_target_is_told_what_is_missing(machine):
    machine("x86_64", tuple(feature for feature in targets.get("x86-avx2").features if feature != "avx2"))
    with pytest.raises(targets.UnknownTargetError, match="'x86-avx2', needs avx2"):
        targets.get("host")


def test_features_of_another_architecture_are_missing(machine):
    machine("aarch64", targets.get("arm64").features)
    assert targets.missing_features(targets.get("x86-avx2"))[0] == "x86_64"


def test_siblings_differ_in_instructions_alone() -> None:
    names = {target.name for target in targets.siblings(targets.get("x86-avx512"))}
    assert names == {"x86-avx512-bf16"}
    assert not targets.siblings(targets.get("cuda"))


@pytest.mark.parametrize(("refused", "found"), [(0, {"avx2", "amx_tile", "amx_int8"}), (-1, {"avx2"})])
def test_tile_registers_count_where_linux_lets_the_process_use_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: int, found: set[str]
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t: avx2 amx_tile amx_int8\n")
    monkeypatch.setattr(host, "_CPU_INFO", info)
    monkeypatch.setattr(host.ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *_: refused))
    assert host.cpu_features.__wrapped__() == found
