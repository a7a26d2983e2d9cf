"""Two functions as one: the second's stages behind the first's, with what it reads of the first kept inside.

Whether that is worth anything, only the schedule can tell: where the stages make one kernel, the result of the first
function is never stored and read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Expr, Var

from schedules import direct_convolution, fallback, gated_product, product_chain, row_parts
from schedules.access import Access, Step, as_int
from schedules.channel_chain import ChannelChain
from schedules.direct_convolution import DirectConvolution
from schedules.epilogue import Epilogue
from schedules.family import Kernel
from schedules.gated_product import GatedProduct, columns_of
from schedules.kernels import reuses_operands
from schedules.matmul import Matmul, split_epilogue
from schedules.matrix_convolution import MatrixConvolution
from schedules.normalized_product import NormalizedProduct
from schedules.prepack import with_packed_weights
from schedules.product_chain import ProductChain
from schedules.reduction import Reduction
from schedules.registry import FAMILIES
from schedules.rounded_rows import is_rounding, only_rounds
from schedules.row_parts import PartedKernel
from schedules.rowwise import Rowwise
from schedules.schedule import kernels_of
from schedules.stage_parsing import parse
from schedules.stages import Axis, OpaqueStage, Stage, StagedFunction, sequence, substitute
from schedules.winograd import Winograd
from targets.base import Target

_SEVERAL = "the schedule needs two kernels for the two"


def joined(
    first: tirx.PrimFunc,
    second: tirx.PrimFunc,
    reads: Sequence[int],
    *,
    shared: Sequence[tuple[int, int]] = (),
    returned: bool = False,
) -> tirx.PrimFunc | None:
    """Return one function for `second`, whose parameters at positions `reads` are what `first` returns.

    `shared` are positions of parameters of `second` and of `first` that get the same tensor. The parameters are those
    of `first`, then the others of `second`; the result of `first`, its last parameter, is kept inside, or `returned`,
    too, before the result of `second`. None where `first` reduces nothing but for what reads each of its elements
    for itself, and for functions that take more than tensors or are not loop nests below a root block.
    """
    if not all(map(_is_of_loop_nests, (first, second))) or not _may_join(first, second):
        return None
    first, second = (s_tir.renew_defs(function) for function in (first, second))
    result = first.params[-1]
    given = {second.params[position]: result for position in reads}
    given |= {second.params[position]: first.params[other] for position, other in shared}
    sizes = _sizes(given)
    if sizes is None:
        return None
    own = (*second.params, *second.body.block.alloc_buffers)
    renamed = {buffer: _resized(buffer, sizes) for buffer in own}
    renamed |= sizes | given
    roots = [first.body.block, tvm_ffi.structural_map(second.body, (Var, lambda v: renamed.get(v, v))).block]
    body = sequence([statement for root in roots for statement in _statements(root)])
    inside = [*roots[0].alloc_buffers, *([] if returned else [result]), *roots[1].alloc_buffers]
    root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=inside)
    *others, last = (renamed[parameter] for parameter in second.params if parameter not in given)
    parameters = [*first.params[:-1], *others, *([result] if returned else []), last]
    return tirx.PrimFunc(parameters, s_tir.SBlockRealize([], True, root), second.ret_type, second.attrs)


def _sizes(given: Mapping[Var, Var]) -> dict[Var, Expr] | None:
    """Return the values of symbols that give tensors the shapes and dtypes of others; None where there are none."""
    values: dict[Var, Expr] = {}
    for tensor, other in given.items():
        if str(tensor.dtype) != str(other.dtype) or len(tensor.shape) != len(other.shape):
            return None
        pairs = list(zip(tensor.shape, other.shape, strict=True))
        for own, size in pairs:
            if isinstance(own, tirx.Var):
                values.setdefault(own, size)
        if not all(tvm_ffi.structural_equal(substitute(own, values), size) for own, size in pairs):
            return None
    return values


def _resized(buffer: Var, sizes: Mapping[Var, Expr]) -> Var:
    """Return a buffer with symbols in its shape replaced; itself if it has none of them."""
    shape = [substitute(extent, sizes) for extent in buffer.shape]
    if all(new.same_as(old) for new, old in zip(shape, buffer.shape, strict=True)):
        return buffer
    return tirx.decl_buffer(shape, str(buffer.dtype), buffer.name, layout=None)  # one would keep the old symbols


def why_apart(first: tirx.PrimFunc, second: tirx.PrimFunc) -> str:
    """Return why `joined` makes no function of two."""
    if not all(map(_is_of_loop_nests, (first, second))):
        return "a function takes the value of a size, or is more than loop nests"
    if not _may_join(first, second):
        return "the first one reduces nothing, and the second one is not of rows or a reduction of what it reads"
    return "the second one reads the first one's result as something of another shape"


def kind_of(function: tirx.PrimFunc) -> Literal["product", "rows"] | None:
    """Return whether a function is a product (with what follows it one to one), or one of rows; None if neither."""
    staged = parse(function)
    if staged is None:
        return None
    chain = product_chain.whole(staged)
    return row_parts.kind(staged) if chain is None else "product" if chain.ends_with_product else None


def is_one_kernel(function: tirx.PrimFunc, target: Target) -> bool:
    """Return whether a function is scheduled as one kernel that stores whole vectors."""
    return why_several(function, target) is None


def why_several(function: tirx.PrimFunc, target: Target, constant: Sequence[int] = ()) -> str | None:
    """Return why a function is not scheduled as one kernel that stores whole vectors; None if it is.

    That may be a product, a convolution, a reduction, a product with functions of rows around it, or a gate of two
    products whose weights are packed: `constant` are the positions of the parameters that will be.
    """
    staged = parse(function)
    if staged is None:
        return _SEVERAL
    if gated_product.whole(staged) is not None:
        return _why_no_gate(with_packed_weights(function, target, constant)[0], target)
    if product_chain.whole(staged) is not None:
        return _why_no_chain(with_packed_weights(function, target, constant)[0], target)
    kernel = _only_kernel(staged, target)
    if isinstance(kernel, PartedKernel) and is_rounding(kernel.stages[0]):
        # Tile registers take packed weights.
        packed = parse(with_packed_weights(function, target, constant)[0])
        kernel = None if packed is None else _only_kernel(packed, target)
    family = _family_of(kernel, target)
    if not (_is_static(function) or isinstance(kernel, PartedKernel) or isinstance(family, Rowwise | Reduction)):
        return "a size is known only at run time"
    if not isinstance(kernel, Kernel):
        return _SEVERAL
    reasons = [reason for reason in map(fallback.needs_scalars, kernel.stages) if reason]
    if reasons:
        return reasons[0]
    if isinstance(kernel, PartedKernel):
        contraction = kernel.parts[kernel.product]
        return NormalizedProduct().refusal(kernel, target) or _why_scattered(Matmul(), contraction, target)
    return _why_scattered(family, kernel, target)


def _only_kernel(staged: StagedFunction, target: Target) -> Kernel | OpaqueStage | None:
    """Return the kernel of a function that is one."""
    kernels = kernels_of(staged, target)
    return kernels[0] if len(kernels) == 1 else None


def _family_of(kernel: object, target: Target) -> object | None:
    """Return the family that takes a kernel; None for what is none."""
    if not isinstance(kernel, Kernel):
        return None
    return next((family for family in FAMILIES if family.takes(kernel, target) is not None), None)


def _why_no_gate(function: tirx.PrimFunc, target: Target) -> str | None:
    """Return why two products, the second of which takes in the first one, are not one kernel; None if they are."""
    staged = parse(function)
    kernel = gated_product.whole(staged) if staged is not None else None
    if kernel is None:
        return _SEVERAL
    reasons = [reason for reason in map(fallback.needs_scalars, kernel.stages) if reason]
    refusal = reasons[0] if reasons else GatedProduct().refusal(kernel, target)
    analysis = GatedProduct().takes(kernel, target)
    if refusal is not None or analysis is None:
        return refusal
    last = analysis.second
    return None if _is_contiguous(last.epilogue, columns_of(last).inner, target) else _SEVERAL


def _why_no_chain(function: tirx.PrimFunc, target: Target) -> str | None:
    """Return why two products, the second of the first one's result, are not one kernel; None if they are."""
    staged = parse(function)
    kernel = None if staged is None else product_chain.whole(staged)
    if kernel is None:
        return _SEVERAL
    reasons = [reason for reason in map(fallback.needs_scalars, kernel.stages) if reason]
    contractions = [link.parts[link.product] for link in kernel.links]
    reasons += [reason for each in contractions if (reason := _why_scattered(Matmul(), each, target))]
    return reasons[0] if reasons else ProductChain().refusal(kernel, target)


def _why_scattered(family: object, kernel: Kernel, target: Target) -> str | None:
    return None if _stores_vectors(family, kernel, target) else _SEVERAL


def _stores_vectors(family: object, kernel: Kernel, target: Target) -> bool:
    """Return whether a family computes a kernel, and its lanes are neighbours in what it stores."""
    if isinstance(family, DirectConvolution | MatrixConvolution):
        windows = direct_convolution.analyse(kernel)
        return windows is not None and _is_contiguous(windows.epilogue, windows.lane, target)
    if isinstance(family, Winograd | ChannelChain):
        return True
    if isinstance(family, Rowwise):  # it takes a convolution's steps, too, where no better family does
        return not any(stage.is_reduction and reuses_operands(stage) for stage in kernel.stages)
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


def _is_of_loop_nests(function: tirx.PrimFunc) -> bool:
    return isinstance(function.body, s_tir.SBlockRealize) and all(map(tirx.is_buffer_var, function.params))


def _is_static(function: tirx.PrimFunc) -> bool:
    return all(as_int(extent) is not None for parameter in function.params for extent in parameter.shape)


def _may_join(first: tirx.PrimFunc, second: tirx.PrimFunc) -> bool:
    """Return whether two functions can be worth one kernel.

    What reduces nothing is computed once for each element that a reduction reads, so it joins functions of rows and
    reductions of one operand; products and convolutions read an element many times, of which rounding is worth their
    kernel alone where it stores the rounded rows.
    """
    own = _reductions(first)
    if own is None or own:
        return bool(own)
    reductions = _reductions(second)
    products = [stage for stage in reductions or () if reuses_operands(stage)]
    return bool(reductions) and (not products or (_only_rounds(first) and (len(products) == 1 or _is_chain(second))))


def _is_chain(function: tirx.PrimFunc) -> bool:
    staged = parse(function)
    return staged is not None and product_chain.whole(staged) is not None


def _only_rounds(function: tirx.PrimFunc) -> bool:
    staged = parse(function)
    return staged is not None and only_rounds(staged.stages)


def _reductions(function: tirx.PrimFunc) -> list[Stage] | None:
    """Return the reductions of a function, None where it does more than what stages say."""
    staged = parse(function)
    if staged is None:
        return None
    stages = [stage for stage in staged.stages if isinstance(stage, Stage)]
    return [stage for stage in stages if stage.is_reduction] if len(stages) == len(staged.stages) else None


def _statements(root: s_tir.SBlock) -> list[tirx.Stmt]:
    return list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
