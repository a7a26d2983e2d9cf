"""Scheduling of modules and functions: which family takes a kernel, and with which parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm
from tvm import tirx
from tvm.ir import Var
from tvm.tirx.stmt import Stmt

from schedules import (
    attention_structure,
    channel_chain,
    cuda,
    fallback,
    gated_product,
    product_chain,
    row_parts,
    winograd_structure,
)
from schedules.channel_chain import ChannelChain
from schedules.division import division_of
from schedules.family import Kernel, Overwriting, Parameters, defaults, work_of
from schedules.gated_product import GatedProduct
from schedules.inline import inline
from schedules.intrin import elementary_calls
from schedules.intrin.bf16_conversion import bf16_buffers
from schedules.intrin.bf16_rounding import round_in_vectors
from schedules.intrin.byte_rounding import round_to_bytes
from schedules.intrin.byte_stores import store_bytes_in_vectors
from schedules.kernels import cut
from schedules.product_chain import ProductChain
from schedules.quotients import truncate_quotients
from schedules.registry import FAMILIES
from schedules.report import OVERWRITABLE, SCHEDULED, Decide, KernelReport, is_scheduled
from schedules.stage_parsing import parse
from schedules.stages import OpaqueStage, StagedFunction, contains, sequence
from schedules.streaming import streamed
from schedules.workload import identity
from targets.base import Target


def by_default(_: KernelReport) -> None:
    """Decide nothing: every kernel gets its target's default schedule."""


def schedule_module(
    module: tvm.IRModule, target: Target, decide: Decide = by_default
) -> tuple[tvm.IRModule, tuple[KernelReport, ...]]:
    """Return `module` with every TIR function that is not yet scheduled scheduled for `target`, and what was done.

    `decide` may replace the default parameters of a function's main kernel. Relax functions are left as they are.
    """
    reports = []
    scheduled = dict(module.functions_items())
    for variable, function in scheduled.items():
        if isinstance(function, tirx.PrimFunc) and not is_scheduled(function):
            scheduled[variable], report = schedule_function(function, target, name=variable.name_hint, decide=decide)
            reports.append(report)
    result = tvm.IRModule(scheduled, attrs=module.attrs, global_infos=module.global_infos)
    return result, tuple(reports)


def schedule_function(
    function: tirx.PrimFunc,
    target: Target,
    parameters: Parameters | None = None,
    name: str = "main",
    decide: Decide = by_default,
) -> tuple[tirx.PrimFunc, KernelReport]:
    """Return `function` scheduled for `target`, and its report.

    `parameters`, or else what `decide` returns, replace the defaults of its main kernel, the one with the most work;
    names that the kernel's family does not have are an error (KeyError).
    """
    if target.device == "cuda":
        return cuda.schedule_function(function, target, name, parameters, decide)
    staged = parse(function)
    if staged is None:
        return function.with_attr(SCHEDULED, True), KernelReport(name, "opaque", reason="no loop nests at the top")
    division = division_of(function)
    kernels = [
        kernel if isinstance(kernel, OpaqueStage) or kernel.division is division else replace(kernel, division=division)
        for kernel in kernels_of(staged, target)
    ]
    candidates = [kernel for kernel in kernels if isinstance(kernel, Kernel)]
    main = max(candidates, key=_weight, default=None)
    workload = identity(function)

    def choose(known: KernelReport) -> Parameters | None:
        return decide(replace(known, function=name, workload=workload)) if parameters is None else parameters

    statements: list[Stmt] = []
    overwritable: tuple[Var, ...] = ()
    report = KernelReport(name, "opaque", reason="; ".join(k.reason for k in kernels if isinstance(k, OpaqueStage)))
    for kernel in kernels:
        if isinstance(kernel, OpaqueStage):
            statements.append(kernel.statement)
            continue
        scheduled = _schedule_kernel(kernel, target, choose if kernel is main else by_default)
        statements.append(scheduled.statement)
        if kernel is main:
            overwritable = scheduled.overwritable
            reason = "; ".join(filter(None, (report.reason, scheduled.report.reason)))
            report = replace(scheduled.report, function=name, workload=workload, reason=reason)
    statements = streamed(statements, staged, target)
    buffers = bf16_buffers(function, staged.intermediate, statements)
    inner = tuple(buffers.integers.get(buffer, buffer) for buffer in staged.intermediate)
    packed = [store_bytes_in_vectors(statement, target, function.params) for statement in statements]
    in_bytes = [round_to_bytes(statement) for statement in packed]
    in_vectors = [round_in_vectors(statement, target, function.params, buffers.integers) for statement in in_bytes]
    expanded = [elementary_calls.expand(statement, buffers, target) for statement in in_vectors]
    rebuilt = replace(staged, intermediate=inner).rebuild(expanded)
    lost = _undefined(rebuilt) - _undefined(function)
    if lost:
        # Not foreseen by any family: the function as it came is slow, but right.
        report = KernelReport(name, "opaque", reason=f"the schedule would use {', '.join(sorted(lost))} undefined")
        rebuilt = function
    elif len(kernels) == 1:
        rebuilt = _with_overwritable(rebuilt, overwritable)
    return truncate_quotients(rebuilt).with_attr(SCHEDULED, True), replace(report, regions=len(kernels))


def _with_overwritable(function: tirx.PrimFunc, buffers: Sequence[Var]) -> tirx.PrimFunc:
    """Return the function with the places among its arguments of `buffers` that its result may overwrite, if any."""
    places = [place for place, each in enumerate(function.params) if contains(buffers, each)]
    return function.with_attr(OVERWRITABLE, places) if places else function


def kernels_of(staged: StagedFunction, target: Target) -> Sequence[Kernel | OpaqueStage]:
    """Return the kernels of a function; one that is whole in its family's eyes is not taken apart."""
    whole = attention_structure.whole(staged) or winograd_structure.whole(staged) or row_parts.whole(staged)
    gate = gated_product.whole(staged) if whole is None else None
    if gate is not None and GatedProduct().takes(gate, target) is not None:
        whole = gate
    chain = channel_chain.whole(staged) if whole is None else None
    if chain is not None and ChannelChain().takes(chain, target) is not None:
        whole = chain
    products = product_chain.whole(staged) if whole is None else None
    if products is not None and ProductChain().takes(products, target) is not None:
        whole = products
    return cut(inline(staged)) if whole is None else [whole]


def _undefined(function: tirx.PrimFunc) -> set[str]:
    """Return the names of the variables that a function uses without defining them: at best, symbols of its shapes."""
    return {str(variable.name) for variable in tirx.analysis.undefined_vars(function.body, list(function.params))}


def _weight(kernel: Kernel) -> float:
    work = [work_of(stage) for stage in kernel.stages]
    return sum(amount if isinstance(amount, int) else 1e12 for amount in work)


@dataclass(frozen=True)
class _ScheduledKernel:
    """A kernel's code, and what there is to report of it."""

    statement: Stmt
    report: KernelReport
    overwritable: tuple[Var, ...] = ()


def _schedule_kernel(kernel: Kernel, target: Target, decide: Decide = by_default) -> _ScheduledKernel:
    reason = "; ".join(filter(None, map(fallback.needs_scalars, kernel.stages)))
    if reason:
        return _ScheduledKernel(fallback.emit(kernel, target), KernelReport("", fallback.NAME, reason=reason))
    for family in FAMILIES:
        analysis = family.takes(kernel, target)
        if analysis is None:
            continue
        space = family.space(target, analysis)
        used = defaults(space)
        report = KernelReport("", family.name, used, space=space, version=family.version)
        chosen = decide(report)
        for key, value in (chosen or {}).items():
            if key not in used:
                raise KeyError(f"{family.name} has no parameter {key!r}; it has {', '.join(used)}")
            used[key] = value
        overwritable = family.overwritable(analysis) if isinstance(family, Overwriting) else ()
        report = replace(report, tuned=chosen is not None)
        return _ScheduledKernel(family.apply(analysis, used, target), report, overwritable)
    # A stage alone is elementwise or a reduction, which take whatever they are given.
    assert len(kernel.stages) > 1
    parts = [_schedule_kernel(Kernel((stage,)), target).statement for stage in kernel.stages]
    return _ScheduledKernel(
        sequence(parts), KernelReport("", fallback.NAME, reason="no family takes its stages together")
    )
