"""CUDA C++ to device code without a GPU, a driver or nvcc: NVRTC and nvFatbin from NVIDIA's wheels.

They come with the extra `cuda`. The toolkit's version is pinned there, so the same source gives the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from targets.base import architecture_number
from targets.cuda_headers import HEADERS
from targets.errors import ToolchainError

_INSTALL = "run \"python -m pip install 'optimizer[cuda]'\""

# No fast math: results are compared with a reference within what the dtype allows.
_OPTIONS = (
    "--std=c++17",
    "-default-device",
    "--device-int128",
    # NVRTC includes no host <math.h>, which defines it otherwise.
    "-DINFINITY=__int_as_float(0x7f800000)",
)


def compile_fat_binary(source: str, gpu_architectures: Sequence[str]) -> bytes:
    """Compile CUDA C++ into a fat binary with a cubin for each architecture, and PTX for the lowest.

    The cubins start without any work by the driver; the PTX lets the driver compile for newer GPUs than were asked
    for. Raises ToolchainError when the compiler is missing or refuses the source.
    """
    ordered = sorted(set(gpu_architectures), key=architecture_number)
    with _fat_binary() as (library, handle):
        for architecture in ordered:
            number = str(architecture_number(architecture)).encode()
            cubin, ptx = _compile(source, architecture)
            _check_fatbin(library.nvFatbinAddCubin(handle, cubin, len(cubin), number, b"kernels"), library)
            if architecture == ordered[0]:
                _check_fatbin(library.nvFatbinAddPTX(handle, ptx, len(ptx), number, b"kernels", b""), library)
        size = ctypes.c_size_t()
        _check_fatbin(library.nvFatbinSize(handle, ctypes.byref(size)), library)
        binary = ctypes.create_string_buffer(size.value)
        _check_fatbin(library.nvFatbinGet(handle, binary), library)
        return binary.raw


def compiler_version() -> str:
    """Return NVRTC's version, such as "13.0"; raises ToolchainError when it is missing."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _load("nvrtc").nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def toolkit_directory() -> Path:
    """Return the folder of NVIDIA's wheels, with `include` and `lib`; raises ToolchainError when there is none."""
    package = importlib.util.find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        folder = Path(location) / "cu13"
        if (folder / "include" / "cuda_fp16.h").exists() and (folder / "include" / "crt" / "mma.h").exists():
            return folder
    raise ToolchainError(f"the CUDA compiler's headers are missing: {_INSTALL}")


def _compile(source: str, architecture: str) -> tuple[bytes, bytes]:
    """Return the cubin for an architecture, and the zero-terminated PTX that it was assembled from."""
    nvrtc = _load("nvrtc")
    options = (f"--gpu-architecture={architecture}", *_OPTIONS, f"-I{toolkit_directory() / 'include'}")
    program = ctypes.c_void_p()
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            b"kernels.cu",
            len(HEADERS),
            _string_array(HEADERS.values()),
            _string_array(HEADERS),
        ),
        nvrtc,
    )
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), _string_array(options))
        if status != 0:
            log = _read(nvrtc, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode(errors="replace")
            first = next((line for line in log.splitlines() if "error" in line), log.strip()[:200])
            raise ToolchainError(f"NVRTC refused the generated code for {architecture}: {first}")
        cubin = _read(nvrtc, program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        return cubin, _read(nvrtc, program, "nvrtcGetPTXSize", "nvrtcGetPTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _string_array(strings: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [string.encode() for string in strings]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, size_function: str, data_function: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(getattr(nvrtc, size_function)(program, ctypes.byref(size)), nvrtc)
    data = ctypes.create_string_buffer(size.value)
    _check_nvrtc(getattr(nvrtc, data_function)(program, data), nvrtc)
    return data.raw


@contextmanager
def _fat_binary() -> Iterator[tuple[ctypes.CDLL, ctypes.c_void_p]]:
    library = _load("nvfatbin")
    handle = ctypes.c_void_p()
    # Uncompressed: device code is small beside weights, and loads without being unpacked.
    options = ("-64", "-host=linux", "-compress=false")
    _check_fatbin(library.nvFatbinCreate(ctypes.byref(handle), _string_array(options), len(options)), library)
    try:
        yield library, handle
    finally:
        library.nvFatbinDestroy(ctypes.byref(handle))


@cache
def _load(name: str) -> ctypes.CDLL:
    folder = toolkit_directory() / "lib"
    try:
        # NVRTC looks for its built-in functions by name alone; loaded beforehand, they are found.
        for builtins in sorted(folder.glob(f"lib{name}-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        library = ctypes.CDLL(str(folder / f"lib{name}.so.13"))
    except OSError as error:
        raise ToolchainError(f"cannot load the CUDA compiler ({error}): {_INSTALL}") from error
    for function in ("nvrtcGetErrorString", "nvFatbinGetErrorString"):
        if hasattr(library, function):
            getattr(library, function).restype = ctypes.c_char_p
    return library


def _check_nvrtc(status: int, library: ctypes.CDLL) -> None:
    if status != 0:
        raise ToolchainError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}")


def _check_fatbin(status: int, library: ctypes.CDLL) -> None:
    if status != 0:
        raise ToolchainError(f"nvFatbin failed: {library.nvFatbinGetErrorString(status).decode()}")
