"""A tracker with real servers of this machine, some of which fail."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from optimizer.errors import TuningError
from optimizer.tuning import devices, fleet, machines, pool, tracker
from optimizer.tuning.machines import Address, Health
from optimizer.tuning.pool import BenchPool
from optimizer.tuning.process import BenchProcess
from schedules.family import Parameters, defaults
from targets.arm64 import ARM64
from targets.emulator import Emulator
from tests.tuning.examples import TARGET, matmul_task

pytest.importorskip("tornado")
_TASK = matmul_task()
_REASON = Emulator().available()
_KEY = "host"

StartFleet = Callable[[int], Address]


@pytest.fixture
def start_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartFleet]:
    """Start a tracker with so many servers, and return its address."""
    monkeypatch.setattr(fleet, "state_file", lambda: tmp_path / "fleet.json")
    # Devices that share a busy machine are not equally fast.
    monkeypatch.setattr(pool, "SLOW", 100.0)

    def start(servers: int) -> Address:
        started = fleet.up("127.0.0.1", 9300, _KEY, servers, None, lambda _: None)
        return Address(started.host, started.port, _KEY, tracked=True)

    yield start
    if fleet.current() is not None:
        fleet.down()


def _candidates(count: int) -> list[Parameters]:
    default = defaults(_TASK.space)
    return [{**default, "rows": rows, "vectors": vectors} for vectors in (1, 2) for rows in (4, 6, 8, 12)][:count]


def _servers() -> list[int]:
    running = fleet.current()
    assert running is not None
    return [member.pid for member in running.members[1:]]


def test_all_candidates_are_measured_by_several_devices(start_fleet: StartFleet) -> None:
    address = start_fleet(2)
    assert devices.count_devices(address) == 2
    with BenchPool(TARGET, 1, 2, address) as bench:
        described = bench.open()
        measured = bench.measure(_TASK, _candidates(4), 2)
        assert bench.size == 2
    assert described.architecture == "x86_64"
    assert len(measured) == 5
    assert all(each.seconds > 0 and not each.failure for each in measured)


def test_the_work_of_a_device_that_dies_goes_to_the_others(start_fleet: StartFleet) -> None:
    address = start_fleet(2)
    with BenchPool(TARGET, 1, 2, address) as bench:
        bench.open()
        bench.measure(_TASK, [], 1)
        os.killpg(_servers()[0], signal.SIGKILL)
        measured = bench.measure(_TASK, _candidates(6), 2)
    assert [each.failure for each in measured] == [""] * 7


def test_a_kernel_that_crashes_takes_no_device_away(start_fleet: StartFleet) -> None:
    address = start_fleet(1)
    with BenchPool(TARGET, 1, 1, address) as bench:
        bench.open()
        bench.measure(_TASK, [], 1)
        *_, session = psutil.Process(_servers()[0]).children(recursive=True)
        session.send_signal(signal.SIGSEGV)
        measured = bench.measure(_TASK, _candidates(2), 1)
    assert [each.failure for each in measured] == [""] * 3


def test_it_is_an_error_when_no_device_is_left(start_fleet: StartFleet) -> None:
    address = start_fleet(1)
    with BenchPool(TARGET, 1, 1, address) as bench:
        bench.open()
        os.killpg(_servers()[0], signal.SIGKILL)
        with pytest.raises(TuningError, match="no device is left"):
            bench.measure(_TASK, _candidates(2), 1)


def _pool_of(monkeypatch: pytest.MonkeyPatch, *healths: Health) -> BenchPool:
    """Return a pool of devices with the given health; nothing is started."""
    pool = BenchPool(TARGET, 1, len(healths), Address("127.0.0.1", 1, _KEY, tracked=True))
    left = iter(healths)

    def check_health(process: BenchProcess) -> Health:
        process._health = next(left)
        return process._health

    description = machines.Description("x86_64", TARGET.features, "a CPU", 1, False, "0.27.0")
    monkeypatch.setattr(BenchProcess, "lease", lambda _: description)
    monkeypatch.setattr(BenchProcess, "check_health", check_health)
    return pool


def test_a_device_that_computes_wrong_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _pool_of(monkeypatch, Health(1e-3, right=True), Health(1e-3, right=False))
    bench.open()
    assert bench.size == 1
    assert "result is wrong" in bench.refused[0]


def test_a_device_that_is_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _pool_of(monkeypatch, Health(4e-3, right=True), Health(1e-3, right=True), Health(1.2e-3, right=True))
    bench.open()
    assert bench.size == 2
    assert "4.00 ms, over the limit of 1.50 ms" in bench.refused[0]


def test_devices_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _pool_of(monkeypatch, Health(1e-3, right=True), Health(1e-3, right=True))
    kinds = iter([machines.Description("x86_64", TARGET.features, cpu, 1, False, "0.27.0") for cpu in "ab"])
    guard = threading.Lock()

    def lease(_: BenchProcess) -> machines.Description:
        with guard:
            return next(kinds)

    monkeypatch.setattr(BenchProcess, "lease", lease)
    with pytest.raises(TuningError, match=r"a \(1 cores\), b \(1 cores\)"):
        bench.open()


def test_a_device_without_the_targets_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _pool_of(monkeypatch, Health(1e-3, right=True))
    bench._target = replace(TARGET, features=(*TARGET.features, "amx_tile"))
    with pytest.raises(TuningError, match="lacks amx_tile"):
        bench.open()


def test_a_second_fleet_is_refused_and_down_ends_the_first(start_fleet: StartFleet) -> None:
    start_fleet(0)
    with pytest.raises(TuningError, match="runs already"):
        start_fleet(0)
    assert fleet.down() == 1
    with pytest.raises(TuningError, match="no fleet"):
        fleet.down()


def test_a_key_that_no_device_has_names_those_there_are(start_fleet: StartFleet) -> None:
    address = start_fleet(1)
    with pytest.raises(TuningError, match="no device of 'phone', only host"):
        devices.count_devices(replace(address, key="phone"))


def test_no_tracker_is_a_mistake_that_names_its_address() -> None:
    with pytest.raises(TuningError, match=r"no tracker answers at 127\.0\.0\.1:1"):
        tracker.tracker_state("127.0.0.1", 1)


@pytest.mark.emulator
@pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
def test_an_emulated_device_checks_candidates() -> None:
    with devices.opened("emulator", ARM64) as chosen, BenchPool(ARM64, None, 1, chosen.address) as bench:
        described = bench.open()
        task = matmul_task(target=ARM64)
        measured = bench.measure(task, [{**defaults(task.space), "rows": 4}], 1)
    assert described.emulated
    assert described.architecture == "aarch64"
    assert [each.failure for each in measured] == ["", ""]
