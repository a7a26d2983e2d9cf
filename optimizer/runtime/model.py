"""A loaded package that can be called."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, overload

import numpy as np
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

from optimizer.errors import OptionError, PackageError
from optimizer.package.dtypes import ITEM_BYTES, device_dtype, numpy_dtype
from optimizer.package.manifest import EntryPoint, Manifest, TensorSpec
from optimizer.package.reader import Package
from optimizer.runtime import tensors
from optimizer.runtime.devices import open_device
from optimizer.runtime.signature import bind_symbols, check_names, mismatch, wrong_dtype
from optimizer.runtime.tensors import SupportsDLPack, Tensor
from optimizer.runtime.threads import resolve_thread_count, use_threads
from optimizer.runtime.weights import map_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
    Input = Array | np.generic | float | SupportsDLPack
    Function = Callable[..., Tensor | Sequence[Tensor]]


class CompiledModel:
    """The functions of a package with its weights, on one device.

    Made by `optimizer.runtime.load`. Calls from several threads are safe and run one after another; for calls at the
    same time load the package once per thread (the weights' memory is shared on the CPU, being the same mapped file).
    """

    def __init__(self, package: Package, *, device: str | None = None, threads: int | None = None) -> None:
        self.manifest: Manifest = package.manifest
        self._package = package
        self.threads: int = resolve_thread_count(threads)
        self.device: tensors.Device = open_device(package.manifest.requirements, device)
        self.lock: threading.Lock = threading.Lock()
        weights, region = map_weights(package)
        self.weight_region: tuple[int, int] = region
        if package.manifest.requirements.device != "cpu":
            weights = [weight.copyto(self.device) for weight in weights]
            self.device.sync()
        self.weights: object = tvm_ffi.Array(weights)
        use_threads(self.threads)
        create = cast("Callable[[object, object], VirtualMachine]", VirtualMachine)
        machine = create(_load_library(package), self.device)
        self._entries = {
            entry.name: Entry(self, entry, *_resolve(machine, entry, package.path))
            for entry in self.manifest.entry_points
        }

    def entry(self, name: str) -> Entry:
        """Return the entry point called `name`; raises OptionError listing those there are."""
        if name not in self._entries:
            raise OptionError(f"there is no entry point '{name}'; the package has {', '.join(self._entries)}")
        return self._entries[name]

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a file that the package carries beside code and weights, or None if it has none."""
        location = self._package.locations.get(name)
        return None if location is None else location.read()

    @overload
    def __call__(
        self, inputs: Mapping[str, Input] | None = None, /, *, outputs: Literal["numpy"] = "numpy", **named: Input
    ) -> dict[str, Array]: ...
    @overload
    def __call__(
        self, inputs: Mapping[str, Input] | None = None, /, *, outputs: Literal["dlpack"], **named: Input
    ) -> dict[str, Tensor]: ...
    def __call__(
        self,
        inputs: Mapping[str, Input] | None = None,
        /,
        *,
        outputs: Literal["numpy", "dlpack"] = "numpy",
        **named: Input,
    ) -> dict[str, Array] | dict[str, Tensor]:
        """Run the entry point "main"; see `Entry.__call__`."""
        return self.entry("main").run({**(inputs or {}), **named}, outputs)


class Entry:
    """One function of a loaded package."""

    def __init__(self, model: CompiledModel, signature: EntryPoint, function: Function, takes_weights: bool) -> None:
        self.signature: EntryPoint = signature
        self._model = model
        self._function = function
        self._takes_weights = takes_weights

    @overload
    def __call__(
        self, inputs: Mapping[str, Input] | None = None, /, *, outputs: Literal["numpy"] = "numpy", **named: Input
    ) -> dict[str, Array]: ...
    @overload
    def __call__(
        self, inputs: Mapping[str, Input] | None = None, /, *, outputs: Literal["dlpack"], **named: Input
    ) -> dict[str, Tensor]: ...
    def __call__(
        self,
        inputs: Mapping[str, Input] | None = None,
        /,
        *,
        outputs: Literal["numpy", "dlpack"] = "numpy",
        **named: Input,
    ) -> dict[str, Array] | dict[str, Tensor]:
        """Run the function and return its outputs by name.

        Inputs come by keyword or, for names that are no Python identifiers, in a mapping; each is an array (NumPy, or
        anything with DLPack, such as an output of an earlier call) of exactly the declared dtype. One that is
        contiguous and aligned to 64 bytes is not copied. `outputs="numpy"` returns arrays that own their memory;
        `outputs="dlpack"` returns tensors on the model's device without copying, which stay valid for as long as they
        are kept and never share memory with inputs or weights. int4 and uint4 travel as ml_dtypes arrays, and as int8
        and uint8 in DLPack.
        Raises InputMismatchError with the expected signature when names, dtypes or shapes do not fit.
        """
        return self.run({**(inputs or {}), **named}, outputs)

    def run(
        self, inputs: Mapping[str, Input], outputs: Literal["numpy", "dlpack"]
    ) -> dict[str, Array] | dict[str, Tensor]:
        """Do what `__call__` says, with all inputs in one mapping (one of them may be called "outputs")."""
        if outputs not in ("numpy", "dlpack"):
            raise OptionError(f"outputs={outputs!r} is not possible; choose 'numpy' or 'dlpack'")
        check_names(self.signature, inputs)
        arguments = [self._tensor(spec, inputs[spec.name]) for spec in self.signature.inputs]
        bind_symbols(
            self.signature,
            {spec.name: argument.shape for spec, argument in zip(self.signature.inputs, arguments, strict=True)},
        )
        with self._model.lock:
            use_threads(self._model.threads)
            returned = self._function(*arguments, *([self._model.weights] if self._takes_weights else []))
        results = [returned] if isinstance(returned, tensors.TVM_TENSOR) else list(cast("Sequence[Tensor]", returned))
        results = cast("list[Tensor]", results)
        specs = self.signature.outputs
        if len(results) != len(specs) or not all(isinstance(result, tensors.TVM_TENSOR) for result in results):
            raise PackageError(f"'{self.signature.name}' did not return {len(specs)} tensors; build the package again")
        if outputs == "numpy":
            return {
                spec.name: tensors.to_numpy(result, spec.dtype) for spec, result in zip(specs, results, strict=True)
            }
        return dict(zip([spec.name for spec in specs], self._separate(results, arguments), strict=True))

    def _tensor(self, spec: TensorSpec, value: Input) -> Tensor:
        """Return the input as a tensor on the model's device, having checked its dtype."""
        if not isinstance(value, np.ndarray | np.generic) and hasattr(value, "__dlpack__"):
            return self._dlpack_tensor(spec, cast("SupportsDLPack", value))
        array = np.asarray(value)
        if array.dtype != numpy_dtype(spec.dtype):
            raise wrong_dtype(self.signature, spec, array.dtype.name if array.dtype.isnative else array.dtype.str)
        return self._on_device(tensors.from_numpy(array, spec.dtype))

    def _dlpack_tensor(self, spec: TensorSpec, value: SupportsDLPack) -> Tensor:
        tensor = cast("Tensor", cast("object", value))
        if not isinstance(value, tensors.TVM_TENSOR) or not tensors.is_acceptable(tensor):
            try:
                tensor = tensors.from_dlpack(value)
            except ValueError as error:
                raise mismatch(self.signature, f"input '{spec.name}' cannot be used: {error}; copy it first") from error
        dtype = str(tensor.dtype)
        if dtype != device_dtype(spec.dtype):
            raise wrong_dtype(self.signature, spec, dtype)
        return self._on_device(tensor)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self._model.device else tensor.copyto(self._model.device)

    def _separate(self, results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the results, with those copied that lie in the memory of an input or of the weights."""
        regions = [self._model.weight_region]
        for spec, argument in zip(self.signature.inputs, arguments, strict=True):
            size = math.prod(argument.shape) * ITEM_BYTES[spec.dtype]
            regions.append((argument.data_ptr(), argument.data_ptr() + size))
        device = self._model.device
        return [result.copyto(device) if tensors.shares_memory(result, regions) else result for result in results]


def _resolve(machine: VirtualMachine, entry: EntryPoint, path: Path) -> tuple[Function, bool]:
    """Return the entry point's function, and whether it takes the tuple of weights after its inputs."""
    try:
        arity = int(machine.module["get_function_arity"](entry.name))
    except (AttributeError, ValueError, RuntimeError) as error:
        raise PackageError(f"{path}: the library has no function '{entry.name}'; build the package again") from error
    if arity not in (len(entry.inputs), len(entry.inputs) + 1):
        raise PackageError(f"{path}: '{entry.name}' takes {arity} arguments, which its manifest contradicts")
    return cast("Function", machine[entry.name]), arity > len(entry.inputs)


def _load_library(package: Package) -> object:
    """Return the package's library as a TVM module.

    It is opened by a name that was never used before: the dynamic loader answers a name that it knows with what it
    loaded then, although a newer package may stand there now.
    """
    location = package.locations[package.manifest.library]
    try:
        with tempfile.TemporaryDirectory(prefix="optimizer-") as folder:
            path = Path(folder) / package.manifest.library
            if package.path.is_dir():
                path.symlink_to(location.path.absolute())
            else:
                path.write_bytes(location.read())
            return cast("object", tvm_ffi.load_module(str(path)))
    except (OSError, RuntimeError) as error:
        raise PackageError(f"{package.path}: {package.manifest.library} cannot be loaded: {error}") from error
