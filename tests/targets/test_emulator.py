"""The emulator says what it lacks, and keeps this machine's Python apart from the emulated one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import targets
from targets import emulator as emulator_module
from targets.emulator import Emulator
from targets.execution import how_executed

ARM64 = targets.get("arm64")


@pytest.fixture
def installed(tmp_path: Path) -> Emulator:
    """What looks like a complete installation to everything but `run`."""
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "installed.json").write_text(json.dumps(emulator_module._wanted()), encoding="utf-8")
    return Emulator(tmp_path)


def test_missing_installation_names_the_fix(tmp_path: Path):
    assert "targets.emulator install" in (Emulator(tmp_path).available() or "")
    with pytest.raises(targets.ToolchainError, match=r"targets\.emulator install"):
        Emulator(tmp_path).run(["-c", "pass"], ARM64)


def test_installation_for_other_versions_is_not_used(installed: Emulator, monkeypatch: pytest.MonkeyPatch):
    assert installed.available() is None
    monkeypatch.setattr(emulator_module.importlib.metadata, "version", lambda _: "0.0")
    assert "other versions" in (installed.available() or "")


def test_installation_that_fits_is_left_alone(installed: Emulator):
    steps: list[str] = []
    installed.install(steps.append)
    assert steps == []


def test_target_that_is_not_emulated_is_refused(installed: Emulator):
    with pytest.raises(targets.ToolchainError, match="x86-avx2"):
        installed.run(["-c", "pass"], targets.get("x86-avx2"))


def test_system_without_apt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emulator_module.shutil, "which", lambda _: None)
    with pytest.raises(targets.ToolchainError, match="'apt-get' is missing"):
        Emulator(tmp_path).install()


def test_failed_download_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object) -> None:
        raise targets.ToolchainError("no network")

    monkeypatch.setattr(emulator_module, "_require_host_tools", lambda: None)
    monkeypatch.setattr(emulator_module, "_call", unreachable)
    with pytest.raises(targets.ToolchainError, match="no network"):
        Emulator(tmp_path).install()
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(("present", "way"), [(True, "emulator"), (False, "no")])
def test_arm64_is_executed_by_the_emulator_where_there_is_one(monkeypatch: pytest.MonkeyPatch, present: bool, way: str):
    monkeypatch.setattr("targets.execution.missing_features", lambda target: target.features)
    monkeypatch.setattr(Emulator, "available", lambda _: None if present else "not installed")
    assert how_executed(ARM64) == way
    assert how_executed(targets.get("x86-avx512")) == "no"


@pytest.mark.emulator
def test_emulated_python_sees_its_own_machine_and_the_given_path(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    (tmp_path / "brought.py").write_text(
        "import platform, sys\nprint(platform.machine(), sys.path)\n", encoding="utf-8"
    )
    done = emulator.run(["-c", "import brought"], ARM64, python_path=[tmp_path])
    assert done.stdout.startswith("aarch64"), done.stderr
    assert str(tmp_path) in done.stdout
    assert "/elsewhere" not in done.stdout


@pytest.mark.emulator
def test_program_that_takes_too_long_is_stopped(emulator: Emulator):
    with pytest.raises(targets.ToolchainError, match="over 1 s"):
        emulator.run(["-c", "while True: pass"], ARM64, timeout=1)
