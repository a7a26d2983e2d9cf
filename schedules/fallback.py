"""What no vector code is generated for: one element at a time, in parallel."""

from __future__ import annotations

from dataclasses import replace

import tvm_ffi
from tvm import tirx
from tvm.tirx.stmt import Stmt

from schedules.elementwise import Elementwise
from schedules.family import Kernel, defaults
from schedules.reduction import Reduction
from schedules.stages import Stage, calls_of, sequence
from targets.base import Target

NAME = "fallback"
NARROWEST_INTEGER = 8
# LLVM's lowering rules in TVM take these of one element only.
SCALAR_CALLS = ("tirx.cosh", "tirx.sinh")


def needs_scalars(stage: Stage) -> str:
    """Return why `stage` cannot be vectorized, or nothing: what TVM takes element by element."""
    types = {str(stage.output.dtype), *(str(load.source.dtype) for load in stage.loads())}
    casts: list[tirx.Cast] = []
    tvm_ffi.structural_walk(stage.value, (tirx.Cast, casts.append))
    types.update(str(cast.ty.dtype) for cast in casts)
    narrow = sorted(dtype for dtype in types if _is_narrow(dtype))
    if narrow:
        return f"{', '.join(narrow)} has no vector conversions"
    scalar = sorted({call.op.name for call in calls_of(stage.value)} & set(SCALAR_CALLS))
    return f"{', '.join(scalar)} has no vector form" if scalar else ""


def _is_narrow(dtype: str) -> bool:
    if dtype.startswith(("float8_", "float6_", "float4_")):
        return True
    return dtype.startswith(("int", "uint")) and int(dtype.lstrip("uint") or 0) < NARROWEST_INTEGER


def emit(kernel: Kernel, target: Target) -> Stmt:
    """Return the stages one after the other, each with scalar elements in parallel tasks."""
    return sequence([_scalar(stage, target) for stage in kernel.stages])


def _scalar(stage: Stage, target: Target) -> Stmt:
    kernel = Kernel((stage,))
    if stage.is_reduction:
        reduction = Reduction()
        analysis = reduction.takes(kernel, target)
        assert analysis is not None
        analysis = replace(analysis, columns=None, along=None)
        return reduction.apply(analysis, defaults(reduction.space(target, analysis)), target)
    elementwise = Elementwise()
    analysis = elementwise.takes(kernel, target)
    assert analysis is not None
    return elementwise.apply(analysis, {**defaults(elementwise.space(target, analysis)), "lanes": 1}, target)
