from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm

import targets
from optimizer.tuning.machines import ThisMachine, measured_peaks
from optimizer.tuning.peak import Peaks, integer_multiply_add, read
from targets.host import missing_features
from tests.tuning.examples import TARGET

AMX = targets.get("x86-avx512-amx")
_PEAKS = Peaks(
    operations=1e11, bf16_operations=2e11, integer_operations=4e11, memory=4e10, cache=2e11, cache_bytes=1 << 20
)


def test_a_kernel_takes_as_long_as_its_sums_or_its_bytes() -> None:
    assert _PEAKS.least_seconds(10**9, 1000, "float32") == pytest.approx(1e-2)
    assert _PEAKS.least_seconds(10**9, 1000, "integer") == pytest.approx(2.5e-3)
    assert _PEAKS.least_seconds(10**9, 1000, "bfloat16") == pytest.approx(5e-3)
    assert _PEAKS.least_seconds(10**3, 4 * 10**8, "float32") == pytest.approx(1e-2)


def test_bytes_that_fit_the_caches_move_faster() -> None:
    assert _PEAKS.least_seconds(0, 1 << 20, "float32") == pytest.approx((1 << 20) / 2e11)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_read_adds_up_each_element_once(streams: int) -> None:
    target = replace(TARGET, read_streams=streams)
    function, arrays = read(target, 1 << 20, 2)
    assert arrays[0].nbytes <= 1 << 20
    elements = np.arange(arrays[0].size).reshape(arrays[0].shape) % 7
    source, *others = (tvm.runtime.tensor(array) for array in (elements.astype(np.float32), *arrays[1:]))
    tvm.compile(function, target=target.tvm_target())["main"](source, *others)
    np.testing.assert_array_equal(others[-1].numpy().sum((1, 2)), elements.sum((1, 2)))


def test_the_peak_of_integers_on_avx2_is_of_as_many_products_as_sums() -> None:
    """Products of equal operands were computed once, and the peak was that of additions."""
    target = targets.get("x86-avx2")
    function, _ = integer_multiply_add(target, 10**9, 1)
    assembly = tvm.compile(function, target=target.tvm_target()).mod.inspect_source("asm")
    assert assembly.count("vpmaddubsw") == assembly.count("vpaddw") > 0


def test_every_peak_of_this_machine_is_measured() -> None:
    peaks = measured_peaks(ThisMachine(TARGET, 1), TARGET, 1)
    assert min(peaks.operations, peaks.integer_operations, peaks.memory, peaks.cache) > 0


@pytest.mark.skipif(bool(missing_features(AMX)), reason="the machine has no AMX")
def test_tile_registers_multiply_more_than_vectors() -> None:
    peaks = measured_peaks(ThisMachine(AMX, 1), AMX, 1)
    assert peaks.operations < peaks.bf16_operations < peaks.integer_operations
