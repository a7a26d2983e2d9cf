"""The imported module run as it is: no passes of ours, no fusion, no schedule. Slow, and independent of all that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tvm
from tvm import relax

from optimizer.frontend.importer import ImportedModel


def unoptimized(model: ImportedModel) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return a function from named inputs to named outputs that runs the imported module on this machine's CPU."""
    executable = relax.build(model.module, tvm.target.Target({"kind": "llvm"}), relax_pipeline="default_build")
    machine = relax.VirtualMachine(executable, tvm.cpu())

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(inputs[name])) for name in model.input_names]
        result = machine["main"](*arguments)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return {name: value.numpy() for name, value in zip(model.output_names, results, strict=True)}

    return run
