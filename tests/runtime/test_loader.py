"""Loading: what does not fit is refused before the package's code is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm.base

from optimizer.errors import IncompatibleMachineError, OptionError, PackageError
from optimizer.package.manifest import Library
from optimizer.package.reader import open_package
from optimizer.runtime import load, loader, machine
from optimizer.runtime.devices import runs_on
from optimizer.runtime.tensors import wrap_bytes
from tests.runtime.programs import run_python

WritePackage = Callable[..., Path]
FORMS = pytest.mark.parametrize("name", ["linear", "linear.opt"])


@pytest.fixture
def not_code(tmp_path: Path) -> Path:
    """A library that cannot be loaded, so that a test fails if anybody tries."""
    path = tmp_path / "not_code.so"
    path.write_bytes(b"not a library")
    return path


def test_all_missing_cpu_features_are_listed_before_loading(write_linear: WritePackage, not_code: Path) -> None:
    path = write_linear(library=not_code, cpu_features=("zebra9", "avx9999"))
    with pytest.raises(IncompatibleMachineError, match="lacks the CPU features avx9999, zebra9, which target host"):
        load(path)


def test_features_of_this_machine_suffice(write_linear: WritePackage) -> None:
    load(write_linear(cpu_features=tuple(sorted(machine.cpu_features())[:5])))


def test_other_architecture_is_refused_before_loading(write_linear: WritePackage, not_code: Path) -> None:
    other = "aarch64" if machine.architecture() == "x86_64" else "x86_64"
    with pytest.raises(IncompatibleMachineError, match=f"the package is for {other}, this machine is"):
        load(write_linear(library=not_code, architecture=other))


def test_newer_glibc_is_refused_before_loading(write_linear: WritePackage, not_code: Path) -> None:
    with pytest.raises(IncompatibleMachineError, match=r"lacks glibc 99\.0"):
        load(write_linear(library=not_code, glibc="99.0"))


def test_other_tvm_series_is_refused_before_loading(write_linear: WritePackage, not_code: Path) -> None:
    with pytest.raises(IncompatibleMachineError, match=r"needs tvm_runtime 0\.99\.0, installed is"):
        load(write_linear(library=not_code, libraries=(Library("tvm_runtime", "0.99.0"),)))


@FORMS
def test_altered_weights_are_refused_unless_verification_is_off(write_linear: WritePackage, name: str) -> None:
    path = write_linear(name)
    victim = path / "weights.bin" if path.is_dir() else path
    with victim.open("r+b") as stream:
        stream.seek(-1 if path.is_dir() else -400, os.SEEK_END)
        position = stream.tell()
        byte = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(PackageError, match=r"weights\.bin was altered|not a package archive"):
        load(path)
    if path.is_dir():
        load(path, verify=False)


def test_library_that_is_no_library_is_a_package_error(write_linear: WritePackage, not_code: Path) -> None:
    with pytest.raises(PackageError, match=r"model\.so cannot be loaded"):
        load(write_linear(library=not_code))


def test_library_without_the_entry_point_is_a_package_error(write_linear: WritePackage, echo_library: Path) -> None:
    with pytest.raises(PackageError, match="'main' takes 9 arguments, which its manifest contradicts"):
        load(write_linear(library=echo_library))


@pytest.mark.parametrize("device", ["cuda", "tpu", "cpu:x"])
def test_device_must_fit_the_package(write_linear: WritePackage, device: str) -> None:
    with pytest.raises(OptionError, match=f"device '{device}' does not fit"):
        load(write_linear(), device=device)


@pytest.mark.skipif("tvm_runtime_cuda" in tvm.base._LOADED_LIBS, reason="this machine has a CUDA driver")
def test_cuda_package_without_a_gpu_says_so(write_linear: WritePackage) -> None:
    with pytest.raises(IncompatibleMachineError, match="driver"):
        load(write_linear(device="cuda", gpu_architectures=("sm_80",)))


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_impossible_thread_counts_are_refused(write_linear: WritePackage, threads: int) -> None:
    with pytest.raises(OptionError, match=f"threads={threads} is not possible"):
        load(write_linear(), threads=threads)


@pytest.mark.parametrize(
    ("code", "gpu", "runs"),
    [
        (("sm_80",), "sm_80", True),
        (("sm_80",), "sm_89", True),
        (("sm_89",), "sm_80", False),
        (("sm_80",), "sm_90", False),
        (("sm_80", "sm_90"), "sm_90", True),
        (("compute_80",), "sm_120", True),
        (("compute_90",), "sm_89", False),
        (("sm_90a",), "sm_90", True),
        (("sm_90a",), "sm_100", False),
        ((), "sm_90", False),
    ],
)
def test_gpu_code_runs_where_cuda_says_so(code: tuple[str, ...], gpu: str, runs: bool) -> None:
    assert runs_on(code, gpu) is runs


def test_misaligned_weights_raise_instead_of_crashing() -> None:
    storage = np.zeros(256, np.uint8)
    start = -storage.ctypes.data % 64 + 16
    with pytest.raises(ValueError, match="not aligned to 64 bytes"):
        wrap_bytes(storage[start : start + 64], "float32", (16,))


@FORMS
def test_weights_are_digested_where_they_are_mapped(
    write_linear: WritePackage, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_linear(name)
    inputs = {"x.0/data": np.ones((2, 4), np.float32), "scale": np.float32(2)}
    expected = load(path)(inputs)["y"]
    monkeypatch.setattr(loader, "_MANY_PAGES", 0)
    model = load(path)
    np.testing.assert_array_equal(model(inputs)["y"], expected)
    location = open_package(path).locations["weights.bin"]
    with location.path.open("r+b") as stream:
        stream.seek(location.offset)
        stream.write(b"\xff")
    with pytest.raises(PackageError, match="was altered"):
        load(path)


BLAS_THREADS = """
import os, sys
from optimizer.runtime import load
load(sys.argv[1])
print(os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
"""


@pytest.mark.parametrize("given", [{}, {"OPENBLAS_THREAD_TIMEOUT": "20"}])
def test_how_numpys_threads_wait_is_not_left_to_other_processes(
    write_linear: WritePackage, given: dict[str, str]
) -> None:
    expected = given.get("OPENBLAS_THREAD_TIMEOUT", "None")
    assert run_python(BLAS_THREADS, write_linear(), **given).strip() == expected


RUNTIME_ONLY = """
import sys
import numpy as np
from optimizer.runtime import load
assert "tvm" not in sys.modules and "onnx" not in sys.modules
model = load(sys.argv[1])
import tvm
assert tvm.base._RUNTIME_ONLY and "tvm_compiler" not in tvm.base._LOADED_LIBS
forbidden = {"tvm.relax", "onnx", "passes", "schedules", "targets", "optimizer.frontend", "optimizer.compile"}
assert not forbidden & set(sys.modules), forbidden & set(sys.modules)
assert "tvm_compiler" not in open("/proc/self/maps").read()
x = np.ones((2, 4), np.float32)
np.testing.assert_array_equal(model({"x.0/data": x, "scale": np.float32(0)})["flat"], np.ones(8))
print("ok")
"""


WITHOUT_TVM = """
import sys
import numpy as np
from optimizer.runtime import load
model = load(sys.argv[1])
x = np.ones((2, 4), np.float32)
np.testing.assert_array_equal(model({"x.0/data": x, "scale": np.float32(0)})["flat"], np.ones(8))
assert "tvm" not in sys.modules
assert "tvm_compiler" not in open("/proc/self/maps").read()
import tvm
tensor = tvm.runtime.tensor(x)
np.testing.assert_array_equal(model({"x.0/data": tensor, "scale": np.float32(0)})["flat"], np.ones(8))
print("ok")
"""


def test_runs_without_the_python_modules_of_tvm(write_linear: WritePackage) -> None:
    assert run_python(WITHOUT_TVM, write_linear()) == "ok\n"


@FORMS
def test_runs_without_the_compiler(write_linear: WritePackage, name: str) -> None:
    assert run_python(RUNTIME_ONLY, write_linear(name), TVM_USE_RUNTIME_LIB="1") == "ok\n"


THREADS = """
import os, sys, threading, warnings
import tvm_ffi
import tvm
from optimizer.runtime import machine
from optimizer.runtime.threads import use_threads
if sys.argv[1] == "late":
    tvm_ffi.get_global_func("runtime.NumThreads")()
before = os.sched_getaffinity(0)
count = len(machine.cpus_by_core())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    numbers = []
    def measure(threads):
        use_threads(threads)
        numbers.append(tvm_ffi.get_global_func("runtime.NumThreads")())
    for threads in (1, count, 1, count):
        measure(threads)
    other = threading.Thread(target=measure, args=(count,))
    other.start()
    other.join()
    assert os.sched_getaffinity(0) == before, (before, os.sched_getaffinity(0))
print(numbers == [1, count, 1, count, count], len(caught))
"""


def test_thread_count_takes_effect_in_every_thread_and_leaves_affinity_alone() -> None:
    assert run_python(THREADS, "early", TVM_USE_RUNTIME_LIB="1") == "True 0\n"


@pytest.mark.skipif(len(machine.cpus_by_core()) < 2, reason="this machine offers one core")
def test_pool_that_cannot_grow_is_reported() -> None:
    printed = run_python(THREADS, "late", TVM_USE_RUNTIME_LIB="1", TVM_NUM_THREADS="1", TVM_BIND_THREADS="0")
    assert printed.startswith("False ")
    assert int(printed.split()[1]) > 0


@FORMS
def test_weights_are_mapped_read_only_from_the_package(write_linear: WritePackage, name: str) -> None:
    path = write_linear(name)
    model = load(path)
    address = model.weight_region[0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_, file = line.split(maxsplit=5)
        first, end = (int(bound, 16) for bound in span.split("-"))
        if first <= address < end:
            assert permissions.startswith("r--")
            assert file == str(path / "weights.bin" if path.is_dir() else path)
            return
    pytest.fail("the weights are nowhere in memory")
