"""From Relax operators to scheduled TIR, and from there to an executable for one target."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from optimizer.bound_shapes import cut_blocks_at_bound_shapes
from optimizer.legalization import LEGALIZATIONS
from optimizer.shape_heap import lower_shapes
from optimizer.symbolic_arguments import keep_symbolic_functions_apart
from schedules import KernelReport, schedule_module
from schedules.prepack import prepack
from targets.base import Target
from targets.device_code import generating_source

# TVM's own passes that turn operators into TIR functions and fuse them.
_LEGALIZE = (
    relax.backend.DispatchSampling,
    relax.backend.DispatchSortScan,
    lambda: relax.transform.LegalizeOps(LEGALIZATIONS),
    relax.transform.AnnotateTIROpPattern,
    lambda: keep_symbolic_functions_apart,
    relax.transform.FoldConstant,
    lambda: cut_blocks_at_bound_shapes,
    relax.transform.FuseOps,
    relax.transform.FuseTIR,
    relax.transform.DeadCodeElimination,
    # It knows a reshape by its loop nest, so it has to see it before the schedule.
    relax.transform.RewriteDataflowReshape,
)

# What remains between scheduled TIR and the bytecode of Relax's virtual machine.
_FINISH = (
    relax.transform.ToNonDataflow,
    relax.transform.RemovePurityChecking,
    relax.transform.CallTIRRewrite,
    relax.transform.StaticPlanBlockMemory,
    relax.transform.LowerAllocTensor,
    relax.transform.KillAfterLastUse,
    relax.transform.LowerRuntimeBuiltin,
    relax.transform.ComputePrimValue,
    lambda: lower_shapes,
    relax.transform.AttachGlobalSymbol,
)

# TVM's elimination of common subexpressions fails on vectors of booleans; LLVM and nvcc do the same later.
_CODE_GENERATION = {"tirx.disable_cse_tir": True}


@dataclass(frozen=True)
class LoweredModule:
    """A module whose operators are TIR functions with a schedule, and what schedule each one got."""

    module: tvm.IRModule
    kernels: tuple[KernelReport, ...]


def lower(module: tvm.IRModule, target: Target) -> LoweredModule:
    """Turn Relax operators into fused TIR functions and schedule each of them for `target`."""
    tvm_target = target.tvm_target()
    with tvm_target:
        for transform in _LEGALIZE:
            module = transform()(module)
    module, _ = prepack(module, target)
    module = relax.transform.DeadCodeElimination()(module)
    scheduled, kernels = schedule_module(module, target)
    return LoweredModule(scheduled, kernels)


def build(module: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """Generate code for a module whose TIR functions are scheduled."""
    tvm_target = target.tvm_target()
    with tvm_target, generating_source(), tvm.transform.PassContext(config=_CODE_GENERATION):
        for transform in _FINISH:
            module = transform()(module)
        return relax.build(module, tvm_target, relax_pipeline=None)
