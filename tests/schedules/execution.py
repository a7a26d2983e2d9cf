"""Builds single functions the way the compiler does, schedules them, and runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tvm
from tvm import relax, tirx

import targets
from optimizer import code_generation
from schedules import KernelReport, schedule_module
from targets.base import Target

TARGET = targets.resolve_host()
Dimension = int | str


def build(
    function: Callable[..., relax.Expr], shapes: Sequence[Sequence[Dimension]], dtypes: Sequence[str]
) -> tvm.IRModule:
    """Return the legalized and fused module of `function` of inputs; a dimension given as a string is symbolic."""
    return lower(module_of(function, shapes, dtypes))


def module_of(
    function: Callable[..., relax.Expr], shapes: Sequence[Sequence[Dimension]], dtypes: Sequence[str]
) -> tvm.IRModule:
    """Return the module of `function` of inputs."""
    builder = relax.BlockBuilder()
    symbols: dict[str, tirx.Var] = {}
    inputs = []
    for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        extents = [symbols.setdefault(d, tirx.Var(d, "int64")) if isinstance(d, str) else d for d in shape]
        inputs.append(relax.Var(f"input{number}", relax.TensorType(extents, dtype)))
    with builder.function("main"):
        result = function(*inputs)
        with builder.dataflow():
            output = builder.emit_output(builder.emit(result))
        builder.emit_func_output(output, inputs)
    return builder.get()


def lower(module: tvm.IRModule) -> tvm.IRModule:
    """Return the legalized and fused module."""
    with TARGET.tvm_target():
        for rewrite in (
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ):
            module = rewrite(module)
    return module


def scheduled(
    module: tvm.IRModule, chosen: Target = TARGET
) -> tuple[Callable[..., np.ndarray], tuple[KernelReport, ...]]:
    """Return the compiled module's main function, scheduled for a target that this machine can execute, and reports."""
    module, reports = schedule_module(module, chosen)
    return compiled(module, chosen), reports


def compiled(module: tvm.IRModule, chosen: Target = TARGET) -> Callable[..., np.ndarray]:
    """Return the main function of a module, compiled as it is."""
    with chosen.tvm_target() as target, code_generation.options(chosen):
        executable = tvm.compile(module, target, tir_pipeline=code_generation.pipeline(chosen))
        machine = relax.VirtualMachine(executable, tvm.cpu())

    def call(*arrays: np.ndarray) -> np.ndarray:
        return machine["main"](*[tvm.runtime.tensor(array) for array in arrays]).numpy()

    return call


def run(
    function: Callable[..., relax.Expr],
    arrays: Sequence[np.ndarray],
    shapes: Sequence[Sequence[Dimension]] | None = None,
) -> tuple[np.ndarray, set[str]]:
    """Return the result of `function` on `arrays`, scheduled, and the families its kernels are of."""
    module = build(function, shapes or [array.shape for array in arrays], [str(array.dtype) for array in arrays])
    call, reports = scheduled(module)
    return call(*arrays), {report.family for report in reports}


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Return standard normal values."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def integers(*shape: int, dtype: str = "int8", seed: int = 0) -> np.ndarray:
    """Return small integers of both signs (none negative where the type has no sign)."""
    low = 0 if dtype.startswith("u") else -100
    return np.random.default_rng([seed, *shape]).integers(low, 100, shape).astype(dtype)


def sum_tolerance(terms: int, magnitude: float, dtype: str = "float32") -> float:
    """Return the bound on the error of a sum of `terms` products of about `magnitude` each.

    Rounding errors of a sum grow as a random walk; six deviations leave no room for luck.
    """
    return 6 * float(np.finfo(dtype).eps) * magnitude * max(1.0, terms) ** 0.5 * max(1.0, np.log2(terms + 1))


def assembly_of(executable: tvm.runtime.Executable) -> str:
    """Return the assembly of the code for the CPU that was generated."""
    return "".join(each.inspect_source("asm") for each in executable.mod.imports if each.kind == "llvm")
