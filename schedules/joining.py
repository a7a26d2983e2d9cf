"""Two functions as one: the second's stages behind the first's, with what it reads of the first kept inside.

Whether that is worth anything, only the schedule can tell: where the stages make one kernel, the result of the first
function is never stored and read again.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Var

from schedules import direct_convolution, fallback
from schedules.access import Access, Step, as_int
from schedules.direct_convolution import DirectConvolution
from schedules.epilogue import Epilogue
from schedules.family import Kernel
from schedules.matmul import Matmul, split_epilogue
from schedules.reduction import Reduction
from schedules.registry import FAMILIES
from schedules.schedule import kernels_of
from schedules.stages import Axis, Stage, contains, parse, sequence
from schedules.winograd import Winograd
from targets.base import Target


def joined(first: tirx.PrimFunc, second: tirx.PrimFunc, reads: Sequence[int]) -> tirx.PrimFunc | None:
    """Return one function for `second`, whose parameters at positions `reads` are what `first` returns.

    Its parameters are those of `first`, then the others of `second`; the result of `first`, its last parameter, is
    kept inside. None where `first` reduces nothing, for functions of symbolic shapes, and for those that are not loop
    nests below a root block.
    """
    if not all(map(_is_static, (first, second))) or not _reduces(first):
        return None
    first, second = (s_tir.renew_defs(function) for function in (first, second))
    result = first.params[-1]
    given = [second.params[position] for position in reads]
    if not all(tvm_ffi.structural_equal(result.ty, parameter.ty) for parameter in given):
        return None

    def rename(variable: Var) -> Var:
        return result if contains(given, variable) else variable

    roots = [first.body.block, tvm_ffi.structural_map(second.body, (Var, rename)).block]
    body = sequence([statement for root in roots for statement in _statements(root)])
    inside = [*roots[0].alloc_buffers, result, *roots[1].alloc_buffers]
    root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=inside)
    parameters = [*first.params[:-1], *(p for p in second.params if not contains(given, p))]
    return tirx.PrimFunc(parameters, s_tir.SBlockRealize([], True, root), second.ret_type, second.attrs)


def why_apart(first: tirx.PrimFunc, second: tirx.PrimFunc) -> str:
    """Return why `joined` makes no function of two."""
    if not all(map(_is_static, (first, second))):
        return "a size is known only at run time, or a function is more than loop nests"
    if not _reduces(first):
        return "the first one reduces nothing: only what follows a product, a convolution or a reduction is merged"
    return "the second one reads the first one's result as something of another shape"


def is_one_kernel(function: tirx.PrimFunc, target: Target) -> bool:
    """Return whether a function is scheduled as one product, convolution or reduction that stores whole vectors."""
    staged = parse(function)
    kernels = kernels_of(staged) if staged is not None else []
    kernel = kernels[0] if len(kernels) == 1 else None
    if not isinstance(kernel, Kernel) or any(map(fallback.needs_scalars, kernel.stages)):
        return False
    family = next((family for family in FAMILIES if family.takes(kernel, target) is not None), None)
    return _stores_vectors(family, kernel, target)


def _stores_vectors(family: object, kernel: Kernel, target: Target) -> bool:
    """Return whether a family computes a kernel, and its lanes are neighbours in what it stores."""
    if isinstance(family, DirectConvolution):
        windows = direct_convolution.analyse(kernel)
        return windows is not None and _is_contiguous(windows.epilogue, windows.lane, target)
    if isinstance(family, Winograd):
        return True
    stage, follows = split_epilogue(kernel)
    if stage is None or follows is None:
        return False
    if isinstance(family, Matmul):
        matmul = family.takes(kernel, target)
        return matmul is not None and _is_contiguous(follows, matmul.columns.inner, target)
    return isinstance(family, Reduction)


def _is_contiguous(follows: Epilogue, lane: Axis, target: Target) -> bool:
    written = Access(follows.stage.output, follows.indices)
    lanes = target.vector_lanes(max(8, min(32, follows.stage.output.dtype.bits)))
    return written.step(lane) == Step.UNIT or (written.block(lane) > 0 and written.block(lane) % lanes == 0)


def _is_static(function: tirx.PrimFunc) -> bool:
    if not isinstance(function.body, s_tir.SBlockRealize):
        return False
    return all(
        tirx.is_buffer_var(parameter) and all(as_int(extent) is not None for extent in parameter.shape)
        for parameter in function.params
    )


def _reduces(function: tirx.PrimFunc) -> bool:
    staged = parse(function)
    return staged is not None and any(isinstance(stage, Stage) and stage.is_reduction for stage in staged.stages)


def _statements(root: s_tir.SBlock) -> list[tirx.Stmt]:
    return list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
