"""GPU targets: TVM's dlight rules, function by function, with what of them can be chosen as a space to tune."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import tvm
import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx.stmt import Stmt

from schedules.family import Choice, Parameters, Space, defaults
from schedules.report import SCHEDULED, Decide, KernelReport
from schedules.stages import sequence
from schedules.workload import identity
from targets.base import Target

VERSION = 1
"""Counts the changes of what the parameters mean."""

RULES = {
    "matmul": dlight.gpu.Matmul,
    "gemv": dlight.gpu.GEMV,
    "reduction": dlight.gpu.Reduction,
    "general-reduction": dlight.gpu.GeneralReduction,
    "fallback": dlight.gpu.Fallback,
}
HOST_CALLS = frozenset({"tirx.tvm_call_packed", "tirx.tvm_call_cpacked", "tirx.call_extern"})

_WITHOUT_TENSOR_CORES = "dlight.do_not_tensorize"

# Of a product by threads: a block of threads_x by threads_y threads computes tile_x by tile_y results each, and brings
# tile_k columns of the operands to shared memory at a time, `vector` elements to a load. Defaults are dlight's.
_TILES: Space = (
    Choice("threads_x", 8, (4, 8, 16, 32)),
    Choice("threads_y", 16, (4, 8, 16, 32)),
    Choice("tile_x", 4, (2, 4, 8)),
    Choice("tile_y", 4, (2, 4, 8)),
    Choice("tile_k", 16, (8, 16, 32)),
    Choice("vector", 2, (1, 2, 4)),
)
# Where operands have 16 or 8 bits and no side is short, warps multiply matrices, by dlight's tiles.
_TENSOR_CORES = Choice("tensor_cores", 1, (0, 1))
_THREADS = Choice("threads", 1024, (64, 128, 256, 512, 1024))


class _TiledMatmul(dlight.gpu.Matmul):
    """dlight's product with tiles of our choice, dlight's own where there is none."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = {**defaults(_TILES), **parameters}

    def get_configs(self, target: tvm.target.Target) -> dlight.gpu.Matmul.Config:
        """Return the sizes of the tiles."""
        del target
        chosen = self._parameters
        return dlight.gpu.Matmul.Config(
            block_size_x=chosen["threads_x"],
            block_size_y=chosen["threads_y"],
            micro_size_x=chosen["tile_x"],
            micro_size_y=chosen["tile_y"],
            micro_size_k=chosen["tile_k"],
            vector_size=chosen["vector"],
            storage_align=True,
        )


def schedule_function(
    function: tirx.PrimFunc,
    target: Target,
    name: str,
    parameters: Parameters | None,
    decide: Decide,
) -> tuple[tirx.PrimFunc, KernelReport]:
    """Return `function` with its loops bound to GPU threads, and its report.

    The first rule that binds them gives the family; `parameters`, or else what `decide` returns, replace its defaults.
    `parameters` that bind nothing are a ScheduleError; a decision that does not leaves the defaults, and a reason. What
    no rule binds runs on a single thread, in order; a function that calls the host comes back as it is. Both are
    reported as opaque.
    """
    reasons: list[str] = []
    for family in RULES if _has_blocks(function) else ():
        scheduled = _bound(function, target, family, {}, reasons)
        if scheduled is None:
            continue
        space = _space(family, scheduled)
        report = KernelReport(
            name,
            family,
            defaults(space),
            reason="; ".join(reasons),
            workload=identity(function),
            space=space,
            version=VERSION,
        )
        chosen = decide(report) if parameters is None else parameters
        if chosen is None or chosen == report.parameters:
            return scheduled.with_attr(SCHEDULED, True), report
        tuned = _bound(function, target, family, chosen, reasons)
        if tuned is not None:
            return tuned.with_attr(SCHEDULED, True), replace(report, parameters=chosen, tuned=True)
        refusal = f"{family} with {dict(chosen)} binds nothing"
        if parameters is not None:
            raise ScheduleError(refusal)
        return scheduled.with_attr(SCHEDULED, True), replace(report, reason="; ".join((*reasons, refusal)))
    reasons.append("no rule binds its loops to threads")
    scheduled = function if _calls_host(function) else _on_one_thread(function)
    return scheduled.with_attr(SCHEDULED, True), KernelReport(name, "opaque", reason="; ".join(reasons))


def _space(family: str, scheduled: tirx.PrimFunc) -> Space:
    """Return what can be chosen of a rule: tiles of a product, threads of a block, or a later rule in its place."""
    if family == "matmul":
        return (_TENSOR_CORES,) if _uses_tensor_cores(scheduled) else _TILES
    if family == "fallback":
        return (_THREADS,)
    place = list(RULES).index(family)
    return (Choice("rule", place, tuple(range(place, len(RULES)))),)


def _uses_tensor_cores(function: tirx.PrimFunc) -> bool:
    return any(buffer.scope().startswith("wmma") for block in _blocks(function) for buffer in block.alloc_buffers)


def _bound(
    function: tirx.PrimFunc, target: Target, family: str, parameters: Parameters, reasons: list[str]
) -> tirx.PrimFunc | None:
    """Return a function as a rule schedules it, None where it leaves loops unbound; a refusal goes to `reasons`."""
    gpu = target.tvm_target()
    if "threads" in parameters:
        gpu = tvm.target.Target({**gpu.export(), "max_threads_per_block": parameters["threads"]})
    if parameters.get("tensor_cores") == 0:
        function = function.with_attr(_WITHOUT_TENSOR_CORES, True)
    try:
        with gpu, _short_stacks():
            schedule = _rule(family, parameters).apply(function, gpu, False)
    except ScheduleError as error:
        reasons.append(f"{family}: {str(error).strip().splitlines()[0]}")
        return None
    if schedule is None or isinstance(schedule, list) or not _is_bound(schedule.mod["main"]):
        return None
    return schedule.mod["main"].without_attr(_WITHOUT_TENSOR_CORES)


@contextmanager
def _short_stacks() -> Iterator[None]:
    """Have `inspect.stack` read no source files meanwhile.

    dlight imports TVM's intrinsics of tensor cores where it first needs them. Their decorator asks for the stack at
    each of some hundred functions, and makes do with frames: reading the sources of all callers took 15 of 18 s.
    """
    original = inspect.stack
    inspect.stack = _frames
    try:
        yield
    finally:
        inspect.stack = original


def _frames(context: int = 1) -> list[inspect.FrameInfo]:
    """Return the stack without lines of source, however many are asked for with `context`."""
    del context
    frame: FrameType | None = sys._getframe(1)
    found: list[inspect.FrameInfo] = []
    while frame is not None:
        code = frame.f_code
        found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return found


def _rule(family: str, parameters: Parameters) -> GPUScheduleRule:
    if family == "matmul":
        return _TiledMatmul(parameters)
    return list(RULES.values())[parameters["rule"]]() if "rule" in parameters else RULES[family]()


def _has_blocks(function: tirx.PrimFunc) -> bool:
    """Return whether there are blocks below the root, without which no rule has anything to go by."""
    return len(_blocks(function)) > 1


def _blocks(function: tirx.PrimFunc) -> list[s_tir.SBlock]:
    found: list[s_tir.SBlock] = []
    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, found.append))
    return found


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


def _in_order(loop: tirx.For, mutator: tvm_ffi.StructuralMutator) -> Stmt:
    """Return a loop as one of single elements: vectors of CPUs are wider than a thread of a GPU can load."""
    inside = mutator.default_mutate(loop)
    return tirx.For(inside.loop_var, inside.min, inside.extent, tirx.ForKind.SERIAL, inside.body)


def _unasked(statement: tirx.Evaluate, _mutator: tvm_ffi.StructuralMutator) -> Stmt:
    """Return a statement without requests for lines of a cache: code generators of GPUs know none."""
    call = statement.value
    is_request = isinstance(call, ir.Call) and isinstance(call.op, ir.Op) and call.op.name == "tirx.prefetch"
    return tirx.Evaluate(0) if is_request else statement


def _on_one_thread(function: tirx.PrimFunc) -> tirx.PrimFunc:
    statement = sequence(_top_level(function))
    statement = tvm_ffi.structural_mutate(statement, [(tirx.For, _in_order), (tirx.Evaluate, _unasked)])
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
