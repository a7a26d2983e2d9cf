"""The doctor finds what is there, and names a fix for what is not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tvm.rpc

import targets
from optimizer import doctor
from optimizer.doctor import Check
from optimizer.errors import OptionError, TargetError


@pytest.fixture(scope="module")
def checks() -> dict[str, Check]:
    return {check.name: check for check in doctor.run_checks(["x86-avx2", "arm64", "cuda"])}


def test_every_check_is_named_once(checks):
    assert set(checks) >= {"Python", "TVM compiler", "CPU features", "threads", "memory bandwidth", "GPU"}
    assert {"linker for x86_64", "linker for aarch64", "CUDA compiler", "arm64 emulator"} <= set(checks)


def test_what_is_not_ok_names_its_fix_and_what_is_ok_none(checks):
    assert all(bool(check.fix) == (check.status != "ok") for check in checks.values())


def test_texts_are_single_lines(checks):
    assert not [check for check in checks.values() if "\n" in check.found + check.fix]


def test_memory_bandwidth_is_a_rate(checks):
    rate, unit, *_ = checks["memory bandwidth"].found.split()
    assert float(rate) > 0
    assert unit == "GB/s"


def test_unwanted_targets_are_not_checked():
    names = {check.name for check in doctor.run_checks(["x86-avx2"])}
    assert not names & {"linker for aarch64", "CUDA compiler", "GPU", "arm64 emulator"}


def test_other_version_than_the_pinned_one_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["apache-tvm-ffi==0.1", "numpy>=2", "ruff==1; extra"])
    (check,) = doctor._packages()
    assert (check.name, check.status) == ("apache-tvm-ffi", "fail")
    assert check.fix == "python -m pip install 'apache-tvm-ffi==0.1'"


@pytest.mark.parametrize(("names", "status"), [(None, "warn"), (["cuda"], "fail")])
def test_missing_tool_fails_only_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, names, status):
    def missing() -> str:
        raise targets.ToolchainError("the CUDA compiler is missing")

    monkeypatch.setattr(doctor.cuda_compiler, "compiler_version", missing)
    (check,) = [check for check in doctor.run_checks(names) if check.name == "CUDA compiler"]
    assert check.status == status


def test_linker_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.linking.importlib.util, "find_spec", lambda _: None)
    (check,) = doctor._linkers([targets.get("arm64")])
    assert check.status == "fail"
    assert "pip install ziglang" in check.found


def test_driver_that_is_too_old_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.gpu, "driver_version", lambda: 12040)
    monkeypatch.setattr(doctor.gpu, "gpus", lambda: (doctor.gpu.Gpu("H200", "sm_90"),))
    check = doctor._gpu()
    assert check.status == "fail"
    assert check.found == "H200 (sm_90), driver for CUDA 12.4"
    assert "580" in check.fix


def test_unknown_target_is_refused():
    with pytest.raises(TargetError, match="x86-avx512"):
        doctor.run_checks(["riscv"])


@pytest.mark.parametrize("rpc", ["pi", "pi@host", "pi@host:port", "@host:9190", "pi@:9190"])
def test_malformed_rpc_device_is_refused(rpc: str):
    with pytest.raises(OptionError, match="KEY@HOST:PORT"):
        doctor.run_checks(["x86-avx2"], rpc)


def test_tracker_that_does_not_answer_fails():
    check = doctor._rpc_device("pi", "127.0.0.1", 1)  # no tracker has that port
    assert check.status == "fail"
    assert "rpc_tracker" in check.fix


@pytest.mark.parametrize(
    ("key", "status", "found"),
    [
        ("pi", "ok", "1 registered, 1 free"),
        ("phone", "warn", "1 registered, none free"),
        ("tv", "fail", "no such device"),
    ],
)
def test_devices_of_a_tracker_are_counted(monkeypatch: pytest.MonkeyPatch, key: str, status: str, found: str):
    class Tracker:
        def summary(self) -> dict[str, object]:
            servers = [{"key": "server:pi", "addr": ["", 0]}, {"key": "server:phone", "addr": ["", 0]}]
            return {"server_info": servers, "queue_info": {"pi": {"free": 1}, "phone": {"free": 0}}}

    class Connection:
        def close(self) -> None:
            pass

    monkeypatch.setattr("socket.create_connection", lambda *_: Connection())
    monkeypatch.setattr(tvm.rpc, "connect_tracker", lambda *_: Tracker())
    check = doctor._rpc_device(key, "host", 9190)
    assert check.status == status
    assert found in check.found


def test_importing_the_doctor_does_not_load_tvm():
    code = "import sys, optimizer.doctor; print('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
