"""Running a compiled module in this process, without a package around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from optimizer.frontend.importer import ImportedModel

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def function(
    executable: relax.VMExecutable,
    model: ImportedModel,
    device: tvm.runtime.Device,
    weights: Sequence[tvm.runtime.Tensor] | None = None,
) -> Runner:
    """Return a function from named inputs to named outputs. `weights`, if given, are passed as one tuple at the end."""
    entry = relax.VirtualMachine(executable, device)["main"]
    trailing = [] if weights is None else [tvm.runtime.convert(list(weights))]

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arguments = [tvm.runtime.tensor(np.asarray(inputs[name], order="C"), device) for name in model.input_names]
        result = entry(*arguments, *trailing)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return {name: value.numpy() for name, value in zip(model.output_names, results, strict=True)}

    return run
