"""Which convolutions can be given blocks of channels, and their geometry."""

from __future__ import annotations

import numpy as np
import tvm
import tvm.ir
import tvm.tirx
from tvm import relax

from passes.base import Refusal
from passes.blocked_operators import Geometry
from passes.channelwise_operators import CONVOLUTIONS, TRANSPOSED

_PLAIN_LAYOUTS = ("NCW", "NCHW", "NCDHW", "OIW", "OIHW", "OIDHW", "IOW", "IOHW", "IODHW")
# Weights for each lane from which on a first layer pays for its conversion where dot products are of pairs: 3 channels
# of 224x224 to 8 took 510 us in blocks of 32, and 242 plain, to 15 channels 540 and 591 (Emerald Rapids).
LEAST_PAIRED = 12


def checked_geometry(call: tvm.ir.Call) -> Geometry:
    """Return the geometry of a convolution that may be blocked; raises Refusal."""
    check_operands(call)
    return geometry_of(call)


def geometry_of(call: tvm.ir.Call) -> Geometry:
    """Return the geometry of a convolution."""
    attributes = call.attrs
    rank, pads = len(attributes.strides), [int(pad) for pad in attributes.padding]
    return Geometry(
        strides=tuple(map(int, attributes.strides)),
        dilations=tuple(map(int, attributes.dilation)),
        pads_begin=tuple(pads[:rank]),
        pads_end=tuple(pads[rank:]),
    )


def check_operands(call: tvm.ir.Call) -> None:
    """Refuse a convolution that is not of fp32 in plain layouts, with constant weights and a known image size."""
    data, weight = call.args
    check_layouts(call)
    types = {str(expr.ty.dtype.dtype) for expr in (data, weight, call)}
    if types != {"float32"}:
        raise Refusal(f"it computes with {', '.join(sorted(types))}, not with float32 alone")
    if not isinstance(weight, tvm.ir.GenericConst):
        raise Refusal("the weights are not constant")


def check_outputs(weights: np.ndarray, block: int, *, pairs: bool, first: bool) -> None:
    """Refuse a convolution of a plain image that has too few output channels to pay for its conversion.

    `weights` are [O, I, *K] in fp32. With `pairs` it has dot products of such in blocks, which are several times as
    fast; a `first` layer has few input channels and several taps.
    """
    outputs = len(weights)
    if 2 * outputs < block and not (pairs and (not first or weights.size >= block * LEAST_PAIRED)):
        raise Refusal(f"{outputs} output channels would leave most of a block of {block} empty")


def convolutions_of(module: tvm.IRModule) -> list[tvm.ir.Call]:
    """Return all calls of convolutions, transposed or not, of a module."""
    found: list[tvm.ir.Call] = []

    def note(expr: relax.Expr) -> None:
        if (
            isinstance(expr, tvm.ir.Call)
            and isinstance(expr.op, tvm.ir.Op)
            and expr.op.name in {**CONVOLUTIONS, **TRANSPOSED}
        ):
            found.append(expr)

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, note)
    return found


def check_layouts(call: tvm.ir.Call) -> None:
    """Refuse a convolution that is not in plain layouts, or of an image of unknown size."""
    data, attributes = call.args[0], call.attrs
    if attributes.data_layout not in _PLAIN_LAYOUTS or attributes.kernel_layout not in _PLAIN_LAYOUTS:
        raise Refusal(f"the layouts {attributes.data_layout} and {attributes.kernel_layout} are not the plain ones")
    if data.ty.shape is None or any(static(size) is None for size in data.ty.shape.values[1:]):
        raise Refusal("the size of the image is not known at compile time")


def static(size: tvm.ir.Expr) -> int | None:
    """Return a size that is known at compile time, None for another."""
    return int(size) if isinstance(size, tvm.tirx.IntImm) else None
