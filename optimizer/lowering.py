"""From Relax operators to scheduled TIR, and from there to an executable for one target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tvm
from tvm import relax

from optimizer import code_generation
from optimizer.bound_shapes import cut_blocks_at_bound_shapes
from optimizer.empty_constants import make_empty_constants
from optimizer.gathers import let_gathers_fuse
from optimizer.grouped_activations import activate_groups
from optimizer.ir_dump import ignore
from optimizer.kernel_merging import merge_kernels
from optimizer.kernel_nodes import carry_into_groups, fused_groups, name_kernels, with_calls
from optimizer.kernel_sharing import share_kernels
from optimizer.large_pages import ask_for_large_pages
from optimizer.legalization import LEGALIZATIONS
from optimizer.overwriting import write_over_terms
from optimizer.shape_heap import lower_shapes
from optimizer.shared_bindings import leave_out_tuples, share_sizes, share_views
from optimizer.step_launches import launch_layers_once
from optimizer.symbolic_arguments import keep_symbolic_functions_apart
from optimizer.weight_checks import trust_weights
from optimizer.widening import widen_at_readers
from optimizer.work_division import divide_work
from passes.base import Site
from passes.fold_constants import FoldConstants
from passes.provenance import carry
from schedules import Decide, KernelReport, by_default, schedule_module
from schedules.prepack import prepack
from schedules.row_padding import pad_rows
from targets.base import Target
from targets.device_code import generating_source


def _fold_constants(module: tvm.IRModule) -> tvm.IRModule:
    """Compute what legalization made of constants, but for what would only repeat them."""
    return FoldConstants().run(module).module


_Transforms = Mapping[str, Callable[[], Callable[[tvm.IRModule], tvm.IRModule]]]

# TVM's own passes that turn operators into TIR functions, and those of a group into one.
_LEGALIZE: _Transforms = {
    "make-empty-constants": lambda: make_empty_constants,
    "dispatch-sampling": relax.backend.DispatchSampling,
    "dispatch-sort-scan": relax.backend.DispatchSortScan,
    "activate-groups": lambda: activate_groups,
    "widen-at-readers": lambda: widen_at_readers,
    "legalize": lambda: relax.transform.LegalizeOps(LEGALIZATIONS),
    "annotate-patterns": relax.transform.AnnotateTIROpPattern,
    "let-gathers-fuse": lambda: let_gathers_fuse,
    "keep-symbolic-functions-apart": lambda: keep_symbolic_functions_apart,
    "fold-constants-of-kernels": lambda: _fold_constants,
    "cut-blocks-at-bound-shapes": lambda: cut_blocks_at_bound_shapes,
}
_FUSE_TIR: _Transforms = {
    "fuse-tir": relax.transform.FuseTIR,
    "eliminate-dead-kernels": relax.transform.DeadCodeElimination,
    # It knows a reshape by its loop nest, so it has to see it before the schedule.
    "rewrite-reshapes": relax.transform.RewriteDataflowReshape,
    "share-kernels": lambda: share_kernels,
}

# What remains between scheduled TIR and the bytecode of Relax's virtual machine.
_FINISH = (
    relax.transform.ToNonDataflow,
    relax.transform.RemovePurityChecking,
    relax.transform.CallTIRRewrite,
    lambda: write_over_terms,
    relax.transform.StaticPlanBlockMemory,
    relax.transform.LowerAllocTensor,
    relax.transform.CanonicalizeBindings,  # names of one tensor, tuples taken apart
    lambda: leave_out_tuples,
    lambda: share_views,
)
_FINISH_CALLS = (
    relax.transform.LowerRuntimeBuiltin,
    relax.transform.ComputePrimValue,
    lambda: lower_shapes,
    lambda: share_sizes,
    lambda: trust_weights,
    relax.transform.AttachGlobalSymbol,
)


# The sites of each step that makes one kernel of several operators, in order.
Fusion = Mapping[str, tuple[Site, ...]]


@dataclass(frozen=True)
class FusedModule:
    """A module whose operators are TIR functions without a schedule, and the account of their fusion."""

    module: tvm.IRModule
    fusion: Fusion


@dataclass(frozen=True)
class LoweredModule:
    """A module whose operators are TIR functions with a schedule, and what schedule each one got.

    `unscheduled` is the module before that, `fusion` the account of what was fused and what was left apart.
    """

    module: tvm.IRModule
    kernels: tuple[KernelReport, ...]
    unscheduled: tvm.IRModule
    fusion: Fusion


def lower(
    module: tvm.IRModule,
    target: Target,
    after: Callable[[str, tvm.IRModule], None] = ignore,
    decide: Decide = by_default,
) -> LoweredModule:
    """Turn Relax operators into fused TIR functions and schedule each of them for `target`.

    `after` is called with the name of each step and the module after it; `decide` may replace a schedule's defaults.
    """
    fused = fuse(module, target, after)
    scheduled, kernels = schedule_module(fused.module, target, decide)
    after("schedule", scheduled)
    return LoweredModule(scheduled, with_calls(kernels, scheduled), fused.module, fused.fusion)


def fuse(module: tvm.IRModule, target: Target, after: Callable[[str, tvm.IRModule], None] = ignore) -> FusedModule:
    """Turn Relax operators into fused TIR functions that read weights as `target` wants them, without schedules."""
    with target.tvm_target():
        module = _run(module, _LEGALIZE, after)
        grouped = carry_into_groups(module, relax.transform.FuseOps()(module))
        after("fuse-operators", grouped)
        module = _run(grouped, _FUSE_TIR, after)
    merging = merge_kernels(name_kernels(grouped, module), target)
    after("merge-kernels", merging.module)
    packed, _ = prepack(merging.module, target)
    module = carry(merging.module, relax.transform.DeadCodeElimination()(packed))
    after("prepack", module)
    division = divide_work(module, target)
    after("divide-work", division.module)
    sites = {"fuse-operators": fused_groups(grouped), "merge-kernels": merging.sites, "divide-work": division.sites}
    padded = pad_rows(division.module, target)
    if padded is not division.module:
        padded = carry(division.module, relax.transform.DeadCodeElimination()(padded))
    after("pad-rows", padded)
    return FusedModule(padded, sites)


def _run(module: tvm.IRModule, transforms: _Transforms, after: Callable[[str, tvm.IRModule], None]) -> tvm.IRModule:
    for name, transform in transforms.items():
        module = carry(module, transform()(module))
        after(name, module)
    return module


def build(module: tvm.IRModule, target: Target, *, once_a_layer: bool = True) -> relax.VMExecutable:
    """Generate code for a module whose TIR functions are scheduled."""
    with target.tvm_target() as tvm_target, generating_source(), code_generation.options(target):
        for transform in _FINISH:
            module = transform()(module)
        module = relax.transform.KillAfterLastUse()(ask_for_large_pages(module, target))
        if once_a_layer:
            module = launch_layers_once(module, target)
        for transform in _FINISH_CALLS:
            module = transform()(module)
        return relax.build(module, tvm_target, relax_pipeline=None, tir_pipeline=code_generation.pipeline(target))
