"""A loaded package that can be called."""

from __future__ import annotations

import importlib
import math
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np

from optimizer.errors import InsufficientMemoryError, OptimizerError, OptionError, PackageError
from optimizer.package.dtypes import ITEM_BYTES, device_dtype, numpy_dtype
from optimizer.package.entry_points import EntryPoint, IndexRange, TensorSpec
from optimizer.package.manifest import Manifest
from optimizer.package.reader import Package
from optimizer.runtime import kv_cache, tensors
from optimizer.runtime.devices import open_device
from optimizer.runtime.ffi import tvm_ffi
from optimizer.runtime.kv_cache import KeyValueCache
from optimizer.runtime.machine import resolve_thread_count
from optimizer.runtime.signature import bind_symbols, check_names, check_range, mismatch, wrong_dtype
from optimizer.runtime.tensors import SupportsDLPack, Tensor
from optimizer.runtime.threads import use_threads
from optimizer.runtime.weights import weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
    Input = Array | np.generic | float | SupportsDLPack
    Function = Callable[..., Tensor | Sequence[Tensor]]
    Machine = Mapping[str, Callable[..., Any]]
    Shapes = Mapping[str, tuple[int, ...]]

# What TVM's virtual machine says of sizes that are not as the code has them (tvm/src/runtime/vm/builtin.cc).
_SIZES_DIFFER = "match_cast error"
# tvm/runtime/memory/memory_manager.h
_POOLED_ALLOCATOR = 2
_NUMPY = (np.ndarray, np.generic)


class CompiledModel:
    """The functions of a package with its weights, on one device.

    Made by `optimizer.runtime.load`. Calls from several threads are safe and run one after another; for calls at the
    same time load the package once per thread (`mapped` weights share memory on the CPU, being the same file).
    """

    def __init__(
        self, package: Package, *, device: str | None = None, threads: int | None = None, mapped: bool = True
    ) -> None:
        self.manifest: Manifest = package.manifest
        self._package = package
        self.threads: int = resolve_thread_count(threads)
        self.device: tensors.Device = open_device(package.manifest.requirements, device)
        self.lock: threading.Lock = threading.Lock()
        weights, region = weights_of(package, mapped=mapped)
        self.weight_region: tuple[int, int] = region
        if package.manifest.requirements.device != "cpu":
            weights = [tensors.on_device(weight, self.device) for weight in weights]
        self.weights: object = tvm_ffi.Array(weights)
        use_threads(self.threads)
        machine = _started_machine(package, self.device)
        self._machine = machine
        self._entries = {
            entry.name: Entry(self, entry, *_resolve(machine, entry, package.path))
            for entry in self.manifest.entry_points
        }

    def entry(self, name: str) -> Entry:
        """Return the entry point called `name`; raises OptionError listing those there are."""
        if name not in self._entries:
            raise OptionError(f"there is no entry point '{name}'; the package has {', '.join(self._entries)}")
        return self._entries[name]

    def observe(self, observer: Callable[[str, bool], None]) -> None:
        """Have `observer` called with the name of each function that the code calls, before (True) and after it runs.

        It stays for as long as the model does, and costs about a microsecond a call.
        """

        def instrument(_function: object, name: object, before: object, *_rest: object) -> int:
            observer(str(name), bool(before))
            return 0  # go on as if nobody had looked

        self._machine["set_instrument"](tvm_ffi.convert(instrument))

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
        self._without_past = kv_cache.without_past(signature)
        self._bound: tuple[Shapes, Mapping[str, int]] | None = None
        self.index_ranges: Mapping[str, IndexRange] = {each.input: each for each in signature.index_ranges}
        present = {record.present for record in signature.caches}
        self.returned_names: list[str] = [spec.name for spec in signature.outputs if spec.name not in present]

    @property
    def device(self) -> tensors.Device:
        """Return where inputs and outputs lie."""
        return self._model.device

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
        contiguous and aligned to 16 bytes is not copied. `outputs="numpy"` returns arrays that own their memory;
        `outputs="dlpack"` returns tensors on the model's device without copying, which stay valid for as long as they
        are kept and never share memory with inputs or weights. int4 and uint4 travel as ml_dtypes arrays, and as int8
        and uint8 in DLPack.
        Raises InputMismatchError with the expected signature when names, dtypes or shapes do not fit, and for integers
        that choose elements of an axis beyond its end (`EntryPoint.index_ranges`), unless they lie on a GPU.
        """
        return self.run({**(inputs or {}), **named}, outputs)

    def run(
        self, inputs: Mapping[str, Input], outputs: Literal["numpy", "dlpack"]
    ) -> dict[str, Array] | dict[str, Tensor]:
        """Do what `__call__` says, with all inputs in one mapping (one of them may be called "outputs")."""
        if outputs not in ("numpy", "dlpack"):
            raise OptionError(f"outputs={outputs!r} is not possible; choose 'numpy' or 'dlpack'")
        given = self._tensors(self.signature, inputs)
        values = self._values({name: tensor.shape for name, tensor in given.items()})
        if self.signature.caches:
            results = self._run_with_past(given, values)
        else:
            results = self.invoke(self._with_weights(list(given.values())))
        specs = self.signature.outputs
        if outputs == "numpy":
            return {
                spec.name: tensors.to_numpy(result, spec.dtype) for spec, result in zip(specs, results, strict=True)
            }
        return dict(zip([spec.name for spec in specs], self._separate(results, list(given.values())), strict=True))

    def _run_with_past(self, given: Mapping[str, Tensor], values: Mapping[str, int]) -> list[Tensor]:
        """Run the function on copies of the caches that are `given`, and return all outputs, grown caches too."""
        device = self._model.device
        steps = kv_cache.steps_of_past(self.signature, values)
        buffers = kv_cache.buffers_of_past(self.signature, given, values, steps, device)
        caches = kv_cache.tensors_of(self.signature, buffers)
        arguments = kv_cache.arguments(self.signature, given, caches, values, steps)
        results = self.invoke(self._with_weights(arguments))
        return kv_cache.outputs_with_present(self.signature, results, buffers, values, steps, device)

    def _values(self, shapes: Shapes) -> Mapping[str, int]:
        """Return the value of each symbol; the shapes of the last call are not checked again."""
        bound = self._bound
        if bound is None or bound[0] != shapes:
            bound = self._bound = shapes, bind_symbols(self.signature, shapes)
        return bound[1]

    def _with_weights(self, arguments: list[object]) -> list[object]:
        return [*arguments, self._model.weights] if self._takes_weights else arguments

    def new_cache(self, *, capacity: int | None = None, sizes: Mapping[str, int] | None = None) -> KeyValueCache:
        """Return an empty cache for `append`, with room for `capacity` tokens, or for as many as there will be."""
        return KeyValueCache(self.signature, self._model.device, capacity=capacity, sizes=sizes)

    def append(self, inputs: Mapping[str, Input], cache: KeyValueCache, skipped: int = 0) -> dict[str, Tensor]:
        """Run the function on new tokens, append what it remembers of them to `cache`, and return the other outputs.

        `inputs` are those that are no caches. The first `skipped` rows of outputs that can be shortened are not
        computed: those before the tokens whose logits are asked for. Raises InputMismatchError as a call does, and
        OptionError where the cache is full; the cache stays as it was.
        """
        given = self._tensors(self._without_past, inputs)
        values = self.values_of({name: tensor.shape for name, tensor in given.items()}, cache.length)
        total = kv_cache.total_tokens(self.signature, values)
        counts = cache.reserve(total)
        results = self.invoke(self.arguments(given, cache, values, counts, skipped))
        cache.commit(total, counts)
        return dict(zip(self.returned_names, results, strict=True))

    def values_of(self, shapes: Mapping[str, tuple[int, ...]], length: int) -> dict[str, int]:
        """Return the value of each symbol where inputs that are no caches have these shapes, and caches this length.

        Raises InputMismatchError where they do not fit.
        """
        return bind_symbols(self._without_past, shapes, dict.fromkeys(self.signature.past_symbols, length))

    def arguments(
        self,
        given: Mapping[str, Tensor],
        cache: KeyValueCache,
        values: Mapping[str, int],
        counts: kv_cache.Steps,
        skipped: int,
    ) -> list[object]:
        """Return all that the code takes to append to `cache`."""
        steps = dict.fromkeys(self.signature.past_symbols, counts)
        return self._with_weights(kv_cache.arguments(self.signature, given, cache.tensors, values, steps, skipped))

    def _tensors(self, signature: EntryPoint, inputs: Mapping[str, Input]) -> dict[str, Tensor]:
        """Return the inputs of `signature` in order as tensors on the model's device; checks names and dtypes."""
        check_names(signature, inputs)
        return {spec.name: self._tensor(spec, inputs[spec.name]) for spec in signature.inputs}

    def invoke(self, arguments: Sequence[object]) -> list[Tensor]:
        """Call the code with its arguments and return what it returns."""
        returned = self._returned(arguments)
        results = [returned] if isinstance(returned, tensors.TVM_TENSOR) else tensors.elements(returned)
        count = len(self.returned_names)
        if len(results) != count or not all(isinstance(result, tensors.TVM_TENSOR) for result in results):
            raise PackageError(f"'{self.signature.name}' did not return {count} tensors; build the package again")
        return cast("list[Tensor]", results)

    def invoke_for(self, arguments: Sequence[object], place: int) -> Tensor:
        """Call code that `invoke` has called before, and return the one of its results at `place` alone."""
        returned = self._returned(arguments)
        return cast(
            "Tensor", returned if isinstance(returned, tensors.TVM_TENSOR) else tensors.element(returned, place)
        )

    def _returned(self, arguments: Sequence[object]) -> object:
        with self._model.lock:
            use_threads(self._model.threads)
            try:
                return self._function(*arguments)
            except RuntimeError as error:
                explained = self._explained(error)
                if explained is None:
                    raise
                raise explained from error

    def _explained(self, error: RuntimeError) -> OptimizerError | None:
        """Return what an error of the code means to who called it, None where that is not known."""
        if _SIZES_DIFFER in str(error):
            problem = "sizes of the inputs, or what their values ask for, do not fit each other"
            return mismatch(self.signature, problem)
        if tensors.lacks_memory(error):
            return InsufficientMemoryError(
                f"there is too little memory for a step of '{self.signature.name}'; give it smaller inputs, "
                "or free memory"
            )
        return None

    def _tensor(self, spec: TensorSpec, value: Input) -> Tensor:
        """Return the input as a tensor on the model's device, having checked its dtype."""
        if not isinstance(value, _NUMPY) and hasattr(value, "__dlpack__"):
            return self._dlpack_tensor(spec, cast("SupportsDLPack", value))
        array = np.asarray(value)
        if array.dtype != numpy_dtype(spec.dtype):
            raise wrong_dtype(self.signature, spec, array.dtype.name if array.dtype.isnative else array.dtype.str)
        if spec.name in self.index_ranges:
            check_range(self.signature, self.index_ranges[spec.name], array)
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
        if spec.name in self.index_ranges and tensors.is_on_cpu(tensor):
            check_range(self.signature, self.index_ranges[spec.name], tensors.host_view(tensor, spec.dtype))
        return self._on_device(tensor)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self._model.device else tensors.on_device(tensor, self._model.device)

    def _separate(self, results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the results, with those copied that lie in the memory of an input or of the weights."""
        begin, end = self._model.weight_region
        separate: list[Tensor] = []
        for result in results:
            address = result.data_ptr()
            shared = begin <= address < end
            for spec, argument in zip(self.signature.inputs, arguments, strict=True):
                offset = address - argument.data_ptr()
                shared = shared or (offset >= 0 and offset < math.prod(argument.shape) * ITEM_BYTES[spec.dtype])
            separate.append(tensors.on_device(result, self._model.device) if shared else result)
        return separate


def _started_machine(package: Package, device: tensors.Device) -> Machine:
    """Return TVM's virtual machine with the package's code, set up for a device and the CPU."""
    machine = _load_library(package)["vm_load_executable"]()
    devices = [device] if device == tensors.CPU else [device, tensors.CPU]
    setting = [number for each in devices for number in (each.dlpack_device_type(), each.index, _POOLED_ALLOCATOR)]
    try:
        machine["vm_initialization"](*setting)
    except (RuntimeError, ValueError):
        # Some operators (Unique, NonZero) are Python functions that TVM's compiler registers.
        importlib.import_module("tvm.relax")
        machine["vm_initialization"](*setting)
    return machine


def _resolve(machine: Machine, entry: EntryPoint, path: Path) -> tuple[Function, bool]:
    """Return the entry point's function, and whether it takes the tuple of weights after its inputs."""
    try:
        arity = int(machine["get_function_arity"](entry.name))
    except (AttributeError, ValueError, RuntimeError) as error:
        raise PackageError(f"{path}: the library has no function '{entry.name}'; build the package again") from error
    count = kv_cache.argument_count(entry)
    if arity not in (count, count + 1):
        raise PackageError(f"{path}: '{entry.name}' takes {arity} arguments, which its manifest contradicts")
    return cast("Function", machine[entry.name]), arity > count


def _load_library(package: Package) -> Machine:
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
            return cast("Machine", tvm_ffi.load_module(str(path)))
    except (OSError, RuntimeError) as error:
        raise PackageError(f"{package.path}: {package.manifest.library} cannot be loaded: {error}") from error
