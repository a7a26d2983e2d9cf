"""CUDA libraries built without a GPU hold code that a GPU can run, and TVM's CUDA runtime can read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.ir import IRModule

import targets
from targets import cuda_compiler, device_code, linking
from targets.cache import cache_directory
from targets.elf import ElfFile
from targets.gpu import gpus

ARCHITECTURES = ("sm_80", "sm_90")
_EXECUTE = Path(__file__).parent / "execute_library.py"
_CUDA_ELF_MACHINE = "machine 190"


@pytest.fixture(scope="session")
def toolkit(linker: None) -> Path:  # noqa: ARG001
    try:
        cuda_compiler.compiler_version()
        return cuda_compiler.toolkit_directory()
    except targets.ToolchainError as error:
        pytest.skip(str(error))


def build(module: IRModule, library: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> None:
    target = targets.get("cuda", architectures)
    with device_code.generating_source(), target.tvm_target():
        executable = tvm.compile(module, target=target.tvm_target())
    linking.export_library(executable, target, library)


@pytest.fixture(scope="session")
def library(toolkit: Path, relax_module: IRModule, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    path = tmp_path_factory.mktemp("cuda") / "lib.so"
    build(relax_module, path)
    return path


def test_library_holds_a_cubin_for_each_architecture_and_ptx_for_newer_ones(library: Path):
    codes = device_code.inspect(library)
    assert {(code.form, code.architecture) for code in codes} == {
        ("cubin", "sm_80"),
        ("cubin", "sm_90"),
        ("ptx", "compute_80"),
    }
    declared = targets.get("cuda", ARCHITECTURES).device_code_architectures
    assert {code.architecture for code in codes} == set(declared)


def test_library_holds_no_source(library: Path):
    assert b"__global__" not in library.read_bytes()


def test_same_module_gives_same_bytes(library: Path, relax_module: IRModule, tmp_path: Path):
    build(relax_module, tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == library.read_bytes()


def test_source_is_recognized_as_source(relax_module: IRModule, tmp_path: Path, linker: None):  # noqa: ARG001
    target = targets.get("cuda")
    with device_code.generating_source(), target.tvm_target():
        executable = tvm.compile(relax_module, target=target.tvm_target())
    executable.export_library(
        str(tmp_path / "lib.so"), fcompile=lambda output, objects, **_: linking.link(objects, target, Path(output))
    )
    assert [code.form for code in device_code.inspect(tmp_path / "lib.so")] == ["source"]


def test_library_for_a_cpu_holds_no_device_code(relax_module: IRModule, tmp_path: Path, linker: None):  # noqa: ARG001
    target = targets.get("x86-avx2")
    linking.export_library(tvm.compile(relax_module, target=target.tvm_target()), target, tmp_path / "lib.so")
    assert device_code.inspect(tmp_path / "lib.so") == ()


def test_fast_math_is_off(toolkit: Path):  # noqa: ARG001
    source = 'extern "C" __global__ void divide(float* x) { x[0] = x[0] / x[1]; }'
    binary = cuda_compiler.compile_fat_binary(source, ["sm_80"])
    assert b"div.rn.f32" in binary  # rounded to nearest; fast math writes div.approx.ftz


def test_fat_binary_entries_are_cuda_executables(toolkit: Path):  # noqa: ARG001
    binary = cuda_compiler.compile_fat_binary('extern "C" __global__ void nothing() {}', ["sm_90"])
    start = binary.index(b"\x7fELF")
    assert ElfFile(binary[start:]).architecture == _CUDA_ELF_MACHINE
    assert [(code.form, code.architecture) for code in device_code.fat_binary_entries(binary)] == [
        ("cubin", "sm_90"),
        ("ptx", "compute_90"),
    ]


def test_standard_headers_say_what_those_of_cxx_say(toolkit: Path):  # noqa: ARG001
    source = """
        #include <cuda/std/cstdint>
        #include <cuda/std/type_traits>
        using namespace cuda::std;
        static_assert(sizeof(int8_t) == 1 && sizeof(int16_t) == 2 && sizeof(int32_t) == 4 && sizeof(int64_t) == 8);
        static_assert(sizeof(uint8_t) == 1 && sizeof(uint16_t) == 2 && sizeof(uint32_t) == 4 && sizeof(uint64_t) == 8);
        static_assert(is_signed<int64_t>::value && !is_signed<uint64_t>::value && is_signed<float>::value);
        static_assert(is_unsigned<uint8_t>::value && is_unsigned<bool>::value && !is_unsigned<int8_t>::value);
        static_assert(!is_unsigned<float>::value && is_floating_point<double>::value && !is_floating_point<int>::value);
        static_assert(is_integral<char>::value && !is_integral<float>::value);
        static_assert(is_same<int, int>::value && !is_same_v<int, long>);
        static_assert(is_same_v<conditional<true, int, long>::type, int>);
        static_assert(is_same_v<conditional<false, int, long>::type, long>);
        static_assert(is_same_v<enable_if<true, int>::type, int>);
        extern "C" __global__ void nothing() {}
    """
    assert cuda_compiler.compile_fat_binary(source, ["sm_80"])


def test_tensor_core_and_fp8_headers_are_complete(toolkit: Path):  # noqa: ARG001
    source = "\n".join(f"#include <{name}>" for name in ("mma.h", "cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h"))
    assert cuda_compiler.compile_fat_binary(source + '\nextern "C" __global__ void nothing() {}', ["sm_90"])


def test_refused_source_is_one_line(toolkit: Path):  # noqa: ARG001
    with pytest.raises(targets.ToolchainError, match="undefined_name") as caught:
        cuda_compiler.compile_fat_binary("__global__ void broken() { undefined_name(); }", ["sm_80"])
    assert "\n" not in str(caught.value)


def test_file_that_is_no_library_is_refused(tmp_path: Path):
    (tmp_path / "lib.so").write_text("no library", encoding="utf-8")
    with pytest.raises(ValueError, match="ELF"):
        device_code.inspect(tmp_path / "lib.so")


_LOAD = """
import ctypes, sys
import tvm_ffi
sys.path.insert(0, sys.argv[2])
from execute_library import load_runtime
load_runtime("libtvm_runtime.so", "libtvm_runtime_cuda.so")
modules = [tvm_ffi.load_module(sys.argv[1])]
while modules:
    module = modules.pop()
    modules.extend(module.imports)
    if module.kind == "cuda":
        print(module.implements_function(sys.argv[3]))
"""


def test_cuda_runtime_reads_the_library(library: Path, toolkit: Path, tmp_path: Path):
    """The driver is replaced by one that does nothing: this shows that the format is right, not that kernels run."""
    functions = (
        *("cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx"),
        *("cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled"),
    )
    source = tmp_path / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in functions), encoding="utf-8")
    subprocess.run(
        [
            *(str(linking.linker_executable()), "cc", "-target", "x86_64-linux-gnu.2.28", "-O2", "-shared", "-fPIC"),
            *("-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1"), str(source)),
        ],
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache_directory("zig")), "ZIG_LOCAL_CACHE_DIR": str(tmp_path)},
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(library), str(_EXECUTE.parent), "fused_matmul_tir_exp_cast_cast1_kernel"],
        env={**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{toolkit / 'lib'}", "TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not gpus(), reason="no NVIDIA GPU on this machine")
def test_relax_module_on_a_gpu_equals_x86(
    execute, library: Path, toolkit: Path, relax_module: IRModule, tmp_path: Path
):
    x = np.linspace(-1, 1, 32, dtype="float32").reshape(4, 8)
    np.savez(tmp_path / "inputs.npz", x)
    done = subprocess.run(
        [
            *(sys.executable, str(_EXECUTE), "cuda", str(library)),
            *(str(tmp_path / "inputs.npz"), str(tmp_path / "output.npy")),
        ],
        env={**os.environ, "LD_LIBRARY_PATH": str(toolkit / "lib"), "TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    on_x86 = execute(relax_module, targets.get("x86-avx2"), [x], kind="virtual-machine")
    # Where the last bits of exp differ, rounding to bfloat16 (8 bits) may fall to the neighbour.
    np.testing.assert_allclose(np.load(tmp_path / "output.npy"), on_x86, rtol=2**-7, atol=0)
