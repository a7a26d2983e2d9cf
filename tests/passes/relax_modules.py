"""Running small Relax modules, to compare a pass's result with what it was given."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax


def run(module: tvm.IRModule, *arrays: np.ndarray) -> np.ndarray:
    executable = relax.build(module, tvm.target.Target({"kind": "llvm", "opt-level": 1}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](*(tvm.runtime.tensor(array) for array in arrays)).numpy()


def operators(module: tvm.IRModule) -> list[str]:
    found: list[str] = []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, tvm.ir.Call):
                found.append(binding.value.op.name)  # noqa: PERF401 -- two loops and a condition
    return found


def constants(module: tvm.IRModule) -> list[np.ndarray]:
    found: list[np.ndarray] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            found.append(expr.value.numpy())

    relax.analysis.post_order_visit(module["main"], visit)
    return found
