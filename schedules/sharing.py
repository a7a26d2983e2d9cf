"""How cores may divide a kernel's tensors, by parts of the image or by channels, which its schedule knows.

`optimizer.work_division` weighs what follows from that for the kernels before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Var

from schedules.access import as_int
from schedules.channel_chain import ChannelChain
from schedules.channel_windows import ChannelWindows, windows_of
from schedules.convolution_tile import bytes_of
from schedules.depthwise_bytes import DepthwiseBytes
from schedules.direct_convolution import DirectConvolution
from schedules.division import Division
from schedules.elementwise import Elementwise, divides_image
from schedules.family import Kernel, defaults
from schedules.gated_product import GatedProduct
from schedules.matmul import Matmul
from schedules.matrix_convolution import MatrixConvolution
from schedules.normalized_product import NormalizedProduct
from schedules.quantized_matmul import QuantizedMatmul
from schedules.reduction import Reduction
from schedules.registry import FAMILIES
from schedules.rowwise import Rowwise
from schedules.schedule import kernels_of
from schedules.stage_parsing import parse
from schedules.transpose import Transpose
from schedules.winograd import Winograd
from targets.base import Target

# Batch, blocks of channels, at least one dimension of the image, the channels of a block.
FEWEST_DIMENSIONS = 4


@dataclass(frozen=True)
class Sharing:
    """How cores may divide a kernel: as its schedule always does (`fixed`), or as its function says (None).

    By channels each core reads all of parameter `whole` (None where all are divided as the result is). By parts of the
    image it reads `border` bytes of its parts from others. A `product` divides its rows only where these outweigh its
    weights.
    """

    fixed: Division | None
    whole: int | None = None
    border: int = 0
    product: bool = False


def sharing(function: tirx.PrimFunc, target: Target) -> Sharing | None:
    """Return how cores may divide the kernel that writes a function's result, None for what is of no image."""
    staged = parse(function) if all(map(tirx.is_buffer_var, function.params)) else None
    kernels = kernels_of(staged, target) if staged is not None else []
    kernel = kernels[-1] if kernels else None
    if not isinstance(kernel, Kernel) or not kernel.stages[-1].output.same_as(function.params[-1]):
        return None
    for family in FAMILIES:
        analysis = family.takes(kernel, target)
        if analysis is not None:
            break
    else:
        return None
    output = function.params[-1]
    if isinstance(family, DirectConvolution):
        return _of_windows(analysis, function)
    if isinstance(family, ChannelChain):
        return Sharing(Division.CHANNELS, _position(function, analysis.first.data.source))
    if isinstance(family, DepthwiseBytes | MatrixConvolution):
        return _of_windows(analysis.windows, function)
    if isinstance(family, Winograd):
        divides = defaults(family.space(target, analysis))["task_blocks"] < int(analysis.weights.shape[0])
        whole = _position(function, analysis.data)
        return Sharing(Division.CHANNELS, whole) if divides else Sharing(Division.IMAGE)
    if isinstance(family, Matmul | NormalizedProduct | QuantizedMatmul | GatedProduct):
        return Sharing(Division.IMAGE, product=True)
    if isinstance(family, Transpose):
        return Sharing(None if _is_blocked(output, target) else Division.CHANNELS)
    if isinstance(family, Elementwise) and _is_blocked(output, target) and divides_image(analysis):
        return Sharing(None)
    if isinstance(family, Elementwise | Rowwise | Reduction):
        largest = max(function.params, key=bytes_of)
        return Sharing(Division.CHANNELS if _is_blocked(largest, target) else Division.IMAGE)
    return None


def _of_windows(analysis: ChannelWindows, function: tirx.PrimFunc) -> Sharing:
    """Return what cores read of a convolution or pooling."""
    data = analysis.data.source
    windows = windows_of(analysis.stage, analysis.data) or ()
    rows = next((window for window in windows if window.axis is not None), None)
    border = 0
    if rows is not None and isinstance(rows.tap.extent, int):
        beyond = max(0, (rows.tap.extent - 1) * rows.dilation + 1 - rows.stride)
        border = min(beyond, rows.extent) * bytes_of(data) // rows.extent
    whole = None if analysis.channel is None else _position(function, data)
    return Sharing(None, whole, border)


def _position(function: tirx.PrimFunc, buffer: Var) -> int | None:
    """Return which parameter a buffer is."""
    return next((i for i, parameter in enumerate(function.params) if parameter.same_as(buffer)), None)


def _is_blocked(tensor: Var, target: Target) -> bool:
    """Return whether a tensor has the shape of blocked channels."""
    shape = tensor.shape
    return len(shape) >= FEWEST_DIMENSIONS and as_int(shape[-1]) in _blocks(target)


def _blocks(target: Target) -> tuple[int, ...]:
    layouts = target.layouts
    return tuple(block for block in (layouts.channel_block, layouts.rounded_block, layouts.byte_block) if block)
