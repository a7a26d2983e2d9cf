"""Running a compiled module in this process, without a package around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from optimizer.frontend.importer import ImportedModel
from optimizer.package.entry_points import EntryPoint
from optimizer.runtime import kv_cache
from optimizer.runtime.signature import bind_symbols
from optimizer.runtime.tensors import to_numpy

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def function(
    executable: relax.VMExecutable,
    model: ImportedModel,
    device: tvm.runtime.Device,
    weights: Sequence[tvm.runtime.Tensor] | None = None,
    entry: EntryPoint | None = None,
) -> Runner:
    """Return a function from named inputs to named outputs. `weights`, if given, are passed as one tuple at the end.

    `entry` is the signature of code that appends to caches in place; the inputs and outputs remain the model's.
    """
    main = relax.VirtualMachine(executable, device)["main"]
    trailing = [] if weights is None else [tvm.runtime.convert(list(weights))]

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = call(main, model, inputs, device, entry, trailing)
        return {
            name: to_numpy(value, str(value.dtype)) for name, value in zip(model.output_names, results, strict=True)
        }

    return run


def call(
    main: Callable[..., tvm.runtime.Tensor | Sequence[tvm.runtime.Tensor]],
    model: ImportedModel,
    inputs: Mapping[str, np.ndarray],
    device: tvm.runtime.Device,
    entry: EntryPoint | None,
    trailing: Sequence[object],
) -> list[tvm.runtime.Tensor]:
    """Return the model's outputs, and what `main` returns after them. `trailing` are arguments after the inputs."""
    given = {name: tvm.runtime.tensor(np.asarray(inputs[name], order="C"), device) for name in model.input_names}
    if entry is None or not entry.caches:
        return _listed(main(*given.values(), *trailing))
    values = bind_symbols(entry, {name: tensor.shape for name, tensor in given.items()})
    steps = kv_cache.steps_of_past(entry, values)
    buffers = kv_cache.buffers_of_past(entry, given, values, steps, device)
    caches = kv_cache.tensors_of(entry, buffers)
    returned = _listed(main(*kv_cache.arguments(entry, given, caches, values, steps), *trailing))
    own = len(entry.outputs) - len(entry.caches)
    return [*kv_cache.outputs_with_present(entry, returned[:own], buffers, values, steps, device), *returned[own:]]


def _listed(result: tvm.runtime.Tensor | Sequence[tvm.runtime.Tensor]) -> list[tvm.runtime.Tensor]:
    return [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
