"""Device code in compiled libraries: putting it in, and telling what a library holds."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from targets.base import Target
from targets.cuda_compiler import compile_fat_binary
from targets.elf import ElfFile
from targets.module_blob import ImportedModule, ModuleBlob, read_string, write_string

if TYPE_CHECKING:
    from tvm.runtime import Module

_CUDA_KIND = "cuda"
_SOURCE_FORMAT = b"cuda"
_FAT_BINARY_FORMAT = b"fatbin"

# The container that nvFatbin writes and cuModuleLoadData reads: a header, then for each code a header and the code.
_FAT_BINARY_MAGIC = 0xBA55ED50
_FAT_BINARY_HEADER = struct.Struct("<IHHQ")  # magic, version, header size, size of what follows
_FAT_BINARY_ENTRY = struct.Struct("<HHIQ")  # kind, version, header size, payload size
_ENTRY_ARCHITECTURE_OFFSET = 28
_ENTRY_KINDS: dict[int, tuple[Literal["ptx", "cubin"], str]] = {1: ("ptx", "compute_"), 2: ("cubin", "sm_")}

_LIBRARY_SYMBOL = "__tvm_ffi__library_bin"


@dataclass(frozen=True)
class DeviceCode:
    """One piece of code for a GPU: its form, its size in bytes and, unless it is source, its architecture.

    A cubin is for "sm_90" (and later ones of its generation), PTX for "compute_90" and all that came after it.
    """

    form: Literal["cubin", "ptx", "source"]
    architecture: str | None
    size: int


@contextmanager
def generating_source() -> Iterator[None]:
    """While this holds, tvm.compile leaves CUDA code as source, on machines with a GPU as on those without.

    Otherwise TVM compiles for the GPU at hand, with fast math, where it finds one. `linking.export_library` then
    compiles the source for the architectures of the target.
    """
    name = "TVM_COMPILE_FORCE_FALLBACK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def pack_with_device_code(target: Target, module: Module, system_lib: bool, prefix: str, workspace: str) -> str:
    """Write the module tree as an object file, CUDA source replaced by device code, and return its path.

    This is a `fpack_imports` of tvm.runtime.Module.export_library, once the target is bound.
    Raises ToolchainError when the source cannot be compiled, ValueError for code compiled in another way.
    """
    import tvm  # noqa: PLC0415 - looking into a library must not load TVM

    data = tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
    blob = ModuleBlob.parse(data)
    sources = [
        imported.inspect_source(_CUDA_KIND).encode()
        for imported in module._collect_from_import_tree(lambda imported: imported.kind == _CUDA_KIND)
    ]
    modules = tuple(
        _with_device_code(imported, sources, target) if imported.kind == _CUDA_KIND else imported
        for imported in blob.modules
    )
    host = str(target.tvm_target().host)
    write_blob = tvm.get_global_func("codegen.codegen_blob")
    packed = write_blob(ModuleBlob(blob.tree, modules).serialize(), system_lib, host, prefix)
    path = Path(workspace) / f"{prefix}devc.o"
    packed.write_to_file(str(path))
    return str(path)


def _with_device_code(module: ImportedModule, sources: list[bytes], target: Target) -> ImportedModule:
    """Return a CUDA module that was saved with one of `sources` with compiled code in the source's place."""
    form, functions_offset = read_string(module.contents, 0)
    source = next((source for source in sources if module.contents.endswith(write_string(source))), None)
    if form != _SOURCE_FORMAT or source is None:
        raise ValueError("CUDA code was compiled by TVM itself: call tvm.compile within generating_source()")
    functions = module.contents[functions_offset : len(module.contents) - len(write_string(source))]
    code = compile_fat_binary(source.decode(), target.gpu_architectures)
    return ImportedModule(_CUDA_KIND, write_string(_FAT_BINARY_FORMAT) + functions + write_string(code))


def inspect(library: Path) -> tuple[DeviceCode, ...]:
    """Return what code for GPUs a compiled library holds; nothing for a library that runs on a CPU.

    Raises ValueError when the file is not a library that TVM compiled.
    """
    elf = ElfFile(library.read_bytes())
    blob_data = elf.data_of_symbol(_LIBRARY_SYMBOL)
    if blob_data is None:
        return ()
    found: list[DeviceCode] = []
    for module in ModuleBlob.parse(blob_data).modules:
        if module.kind == _CUDA_KIND:
            form, _ = read_string(module.contents, 0)
            found += _describe(form, module.contents)
    return tuple(found)


def _describe(form: bytes, contents: bytes) -> list[DeviceCode]:
    if form != _FAT_BINARY_FORMAT:
        return [DeviceCode("source", None, len(contents))]
    start = contents.find(struct.pack("<I", _FAT_BINARY_MAGIC))
    if start < 0:
        raise ValueError("a CUDA module is marked as a fat binary but holds none")
    return list(fat_binary_entries(contents[start:]))


def fat_binary_entries(data: bytes) -> Iterator[DeviceCode]:
    """Yield the pieces of code in a fat binary; raises ValueError when it is malformed."""
    try:
        magic, _, header_size, body_size = _FAT_BINARY_HEADER.unpack_from(data)
        if magic != _FAT_BINARY_MAGIC:
            raise ValueError("not a fat binary")
        offset = header_size
        while offset < header_size + body_size:
            kind, _, entry_header_size, payload_size = _FAT_BINARY_ENTRY.unpack_from(data, offset)
            (number,) = struct.unpack_from("<I", data, offset + _ENTRY_ARCHITECTURE_OFFSET)
            if kind not in _ENTRY_KINDS:
                raise ValueError(f"unknown kind of code {kind} in a fat binary")
            form, prefix = _ENTRY_KINDS[kind]
            yield DeviceCode(form, f"{prefix}{number}", payload_size)
            offset += entry_header_size + payload_size
    except struct.error as error:
        raise ValueError(f"a fat binary is cut short: {error}") from error
