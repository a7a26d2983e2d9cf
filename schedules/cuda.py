"""GPU targets: TVM's dlight rules, function by function."""

from __future__ import annotations

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx.stmt import Stmt

from schedules.report import SCHEDULED, KernelReport
from schedules.stages import sequence
from targets.base import Target

RULES = {
    "matmul": dlight.gpu.Matmul,
    "gemv": dlight.gpu.GEMV,
    "reduction": dlight.gpu.Reduction,
    "general-reduction": dlight.gpu.GeneralReduction,
    "fallback": dlight.gpu.Fallback,
}
HOST_CALLS = frozenset({"tirx.tvm_call_packed", "tirx.tvm_call_cpacked", "tirx.call_extern"})


def schedule_function(function: tirx.PrimFunc, target: Target, name: str) -> tuple[tirx.PrimFunc, KernelReport]:
    """Return `function` with its loops bound to GPU threads, and its report.

    What no rule binds runs on a single thread, in order; a function that calls the host comes back as it is. Both are
    reported as opaque.
    """
    reasons = []
    gpu = target.tvm_target()
    with gpu:
        for family, rule in RULES.items() if _has_blocks(function) else ():
            try:
                schedule = rule().apply(function, gpu, False)
            except ScheduleError as error:
                reasons.append(f"{family}: {str(error).strip().splitlines()[0]}")
                continue
            if isinstance(schedule, s_tir.Schedule) and _is_bound(schedule.mod["main"]):
                scheduled = schedule.mod["main"].with_attr(SCHEDULED, True)
                return scheduled, KernelReport(name, family, reason="; ".join(reasons))
    reasons.append("no rule binds its loops to threads")
    scheduled = function if _calls_host(function) else _on_one_thread(function)
    return scheduled.with_attr(SCHEDULED, True), KernelReport(name, "opaque", reason="; ".join(reasons))


def _has_blocks(function: tirx.PrimFunc) -> bool:
    """Return whether there are blocks below the root, without which no rule has anything to go by."""
    found: list[s_tir.SBlock] = []
    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, found.append))
    return len(found) > 1


def _top_level(function: tirx.PrimFunc) -> list[Stmt]:
    body = function.body
    while isinstance(body, s_tir.SBlockRealize) and not body.block.iter_vars:
        body = body.block.body
    return list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]


def _is_bound(function: tirx.PrimFunc) -> bool:
    """Return whether every statement of the function runs on GPU threads."""
    return all(_binds_thread(statement) for statement in _top_level(function))


def _binds_thread(statement: Stmt) -> bool:
    found: list[tirx.For] = []
    tvm_ffi.structural_walk(statement, (tirx.For, found.append))
    return any(loop.kind == tirx.ForKind.THREAD_BINDING for loop in found)


def _calls_host(function: tirx.PrimFunc) -> bool:
    found: list[ir.Call] = []
    tvm_ffi.structural_walk(function.body, (ir.Call, found.append))
    return any(isinstance(call.op, ir.Op) and call.op.name in HOST_CALLS for call in found)


def _on_one_thread(function: tirx.PrimFunc) -> tirx.PrimFunc:
    statement = sequence(_top_level(function))
    for tag in ("threadIdx.x", "blockIdx.x"):
        variable = ir.Var(tag.replace(".", "_"), ir.PrimType("int32"))
        axis = tirx.IterVar(ir.Range(0, 1), variable, tirx.IterVar.ThreadIndex, tag)
        loop_variable = ir.Var(tag.replace(".", "_"), ir.PrimType("int32"))
        statement = tirx.For(loop_variable, 0, 1, tirx.ForKind.THREAD_BINDING, statement, thread_binding=axis)
    if not isinstance(function.body, s_tir.SBlockRealize):
        return function.with_body(statement)
    root = function.body.block
    block = s_tir.SBlock([], [], [], root.name_hint, statement, alloc_buffers=list(root.alloc_buffers))
    return function.with_body(s_tir.SBlockRealize([], True, block))
