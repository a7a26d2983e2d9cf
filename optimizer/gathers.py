"""Gathers that fuse with their neighbours.

TVM takes every function that reads at computed positions for opaque, and never fuses it. But where each element of the
result is one expression of elements of the operands, it does not matter for fusion how their positions are found.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from schedules.stage_parsing import parse
from schedules.stages import OpaqueStage

# TVM's OpPatternKind.
_INJECTIVE = 2
_OPAQUE = 8


def let_gathers_fuse(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with all functions marked injective that compute their result element by element."""
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and _is_opaque(function) and _is_elementwise(function):
            module.update_func(variable, function.with_attr("op_pattern", _INJECTIVE))
    return module


def _is_opaque(function: tirx.PrimFunc) -> bool:
    return function.attrs is not None and function.attrs.get("op_pattern", None) == _OPAQUE


def _is_elementwise(function: tirx.PrimFunc) -> bool:
    """Return whether a function stores each element of its last parameter once, and does nothing else."""
    staged = parse(function)
    if staged is None or len(staged.stages) != 1 or staged.intermediate:
        return False
    (stage,) = staged.stages
    if isinstance(stage, OpaqueStage) or stage.is_reduction or not stage.output.same_as(function.params[-1]):
        return False
    stored = [index for index in stage.indices if not isinstance(index, tirx.IntImm)]
    return len(stored) == len(stage.spatial) and all(
        index.same_as(axis.variable) for index, axis in zip(stored, stage.spatial, strict=True)
    )
