"""Convolutions: Conv, ConvTranspose, DeformConv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import relax, te, tirx, topi

from optimizer.frontend.accumulation import accumulation_dtype, cast
from optimizer.frontend.dimensions import Dimension, Shape, provably_equal, simplified, static_shape
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import TensorValue, Value
from optimizer.frontend.windows import dilated_extents, sliding_windows

_FORWARD: dict[int, Callable[..., relax.Expr]] = {
    1: relax.op.nn.conv1d,
    2: relax.op.nn.conv2d,
    3: relax.op.nn.conv3d,
}
_TRANSPOSED: dict[int, Callable[..., relax.Expr]] = {
    1: relax.op.nn.conv1d_transpose,
    2: relax.op.nn.conv2d_transpose,
    3: relax.op.nn.conv3d_transpose,
}


@converter("Conv")
def conv(node: Node) -> Result:
    """Convert Conv: N-D cross-correlation with groups, strides, dilations, padding and an optional bias."""
    data, weight = node.input(0), node.input(1)
    result = cross_correlation(node, data.expr, weight.expr, weight, accumulation_dtype(data.dtype))
    return with_bias(node, result, node.optional_input(2), data.dtype)


def cross_correlation(node: Node, data: relax.Expr, filters: relax.Expr, weight: Value, out_dtype: str) -> TensorValue:
    """Return the convolution of `data`, shaped like input 0, with `filters`, shaped like `weight` [O, I/groups, ...].

    Strides, padding and the rest are the node's attributes.
    """
    kernel = kernel_shape(node, weight)
    operator = _FORWARD.get(len(kernel))
    if operator is None:
        raise node.unsupported(f"a convolution over {len(kernel)} spatial axes")
    windows = sliding_windows(node, kernel)
    pads = windows.static_pads
    if pads is None:
        data = padded(node, data, windows.pads_begin, windows.pads_end).expr
        pads = [0] * (2 * len(kernel))
    result = operator(
        data,
        filters,
        strides=list(windows.strides),
        padding=pads,
        dilation=list(windows.dilations),
        groups=node.integer("group", 1),
        out_dtype=out_dtype,
    )
    return node.emit(result)


def kernel_shape(node: Node, weight: Value) -> tuple[int, ...]:
    """Return the spatial shape of a convolution's weight, which must be known at compile time."""
    kernel = static_shape(weight.shape[2:])
    if kernel is None:
        raise node.unsupported("the shape of the kernel is not known at compile time")
    if list(kernel) != node.integers("kernel_shape", kernel):
        raise node.unsupported(f"kernel_shape {node.integers('kernel_shape')} for a weight of shape {weight.shape}")
    return kernel


def with_bias(node: Node, result: Value, bias: Value | None, dtype: str) -> relax.Expr:
    """Return `result` [N, C, spatial...] plus `bias` [C], as `dtype`; a constant bias is reshaped at compile time."""
    expr = result.expr
    if bias is not None:
        shape = (1, bias.shape[0], *[1] * (result.rank - 2))
        expr = relax.op.add(expr, node.cast(node.reshape(bias, shape), result.dtype).expr)
    return cast(expr, result.dtype, dtype)


def padded(node: Node, data: relax.Expr, begins: Shape, ends: Shape, value: float = 0.0) -> TensorValue:
    """Return `data` padded along its spatial axes; the widths may be symbolic."""
    return node.compute(
        lambda tensor: topi.nn.pad(tensor, [0, 0, *begins], [0, 0, *ends], value),
        data,
        primfunc_name_hint="pad",
    )


@dataclass(frozen=True)
class _Transposition:
    """Geometry of a ConvTranspose; output element o is element o + pads_begin of the uncropped result."""

    strides: list[int]
    dilations: list[int]
    extents: tuple[int, ...]
    pads_begin: Shape
    pads_end: Shape
    output_padding: list[int]
    uncropped: Shape
    output: Shape


@converter("ConvTranspose")
def conv_transpose(node: Node) -> Result:
    """Convert ConvTranspose: the gradient of Conv with respect to its input."""
    data, weight = node.input(0), node.input(1)
    kernel = kernel_shape(node, weight)
    operator = _TRANSPOSED.get(len(kernel))
    if operator is None:
        raise node.unsupported(f"a transposed convolution over {len(kernel)} spatial axes")
    geometry = _transposition(node, kernel)
    pads = _operator_pads(geometry)
    result = node.emit(
        operator(
            data.expr,
            weight.expr,
            strides=geometry.strides,
            padding=[0] * (2 * len(kernel)) if pads is None else pads,
            output_padding=[0] * len(kernel) if pads is None else geometry.output_padding,
            dilation=geometry.dilations,
            groups=node.integer("group", 1),
            out_dtype=accumulation_dtype(data.dtype),
        )
    )
    if pads is None:
        result = _cropped(node, result, geometry)
    return with_bias(node, result, node.optional_input(2), data.dtype)


def _transposition(node: Node, kernel: Sequence[int]) -> _Transposition:
    rank = len(kernel)
    spatial = node.input(0).shape[2:]
    strides, dilations = node.integers("strides", [1] * rank), node.integers("dilations", [1] * rank)
    extra = node.integers("output_padding", [0] * rank)
    extents = dilated_extents(kernel, dilations)
    rows = zip(spatial, strides, extents, strict=True)
    uncropped = tuple(simplified((size - 1) * stride + extent) for size, stride, extent in rows)
    mode = node.string("auto_pad", "NOTSET")
    output: list[Dimension] = []
    if node.has_attribute("output_shape"):
        output = list(node.integers("output_shape"))[-rank:]
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        output = [simplified(size * stride) for size, stride in zip(spatial, strides, strict=True)]
    if output:
        totals = [simplified(full + e - out) for full, e, out in zip(uncropped, extra, output, strict=True)]
        begins, ends = _distributed(node, totals, upper=mode == "SAME_UPPER")
    else:
        pads = [0] * (2 * rank) if mode == "VALID" else node.integers("pads", [0] * (2 * rank))
        begins, ends = tuple(pads[:rank]), tuple(pads[rank:])
        rows = zip(uncropped, extra, begins, ends, strict=True)
        output = [simplified(full + e - begin - end) for full, e, begin, end in rows]
    if any(isinstance(begin, int) and begin < 0 for begin in begins):
        raise node.unsupported(f"negative padding {begins}")
    return _Transposition(strides, dilations, extents, begins, ends, extra, uncropped, tuple(output))


def _distributed(node: Node, totals: Sequence[Dimension], *, upper: bool) -> tuple[Shape, Shape]:
    """Return what to cut at the two ends. A missing row (total -1) is added at the end; onnxruntime does so too."""
    begins: list[Dimension] = []
    for total in totals:
        if isinstance(total, int) and total < -1:
            raise node.unsupported("output_shape is larger than the output by more than output_padding explains")
        half = simplified(total // 2) if not isinstance(total, int) else max(total, 0) // 2
        begins.append(half if upper or provably_equal(total, -1) else simplified(total - half))
    return tuple(begins), tuple(simplified(total - begin) for total, begin in zip(totals, begins, strict=True))


def _operator_pads(geometry: _Transposition) -> list[int] | None:
    """Return the padding for TVM's operator, or None where that one does not cover the case."""
    pads = static_shape((*geometry.pads_begin, *geometry.pads_end))
    if pads is None:
        return None
    fits = all(0 <= pad < extent for pad, extent in zip(pads, geometry.extents * 2, strict=True))
    small = all(extra < stride for extra, stride in zip(geometry.output_padding, geometry.strides, strict=True))
    return list(pads) if fits and small else None


def _cropped(node: Node, result: TensorValue, geometry: _Transposition) -> TensorValue:
    """Return the part of the uncropped result that is asked for; beyond its end there are zeros."""

    def crop(full: te.Tensor) -> te.Tensor:
        def element(batch: tirx.Expr, channel: tirx.Expr, *outputs: tirx.Expr) -> tirx.Expr:
            positions = [output + begin for output, begin in zip(outputs, geometry.pads_begin, strict=True)]
            inside = tirx.all(*[p < size for p, size in zip(positions, geometry.uncropped, strict=True)])
            return tirx.if_then_else(inside, full(batch, channel, *positions), tirx.const(0, full.dtype))

        return te.compute((*full.shape[:2], *geometry.output), element, name="crop")

    return node.compute(crop, result.expr, primfunc_name_hint="crop")


@converter("DeformConv")
def deform_conv(node: Node) -> Result:
    """Convert DeformConv: a 2-D convolution whose windows are sampled at offset positions, bilinearly.

    A corner of a sample that lies outside of the image counts as zero (arXiv 1703.06211, arXiv 1811.11168).
    """
    data, weight, offset = node.input(0), node.input(1), node.input(2)
    kernel = kernel_shape(node, weight)
    if len(kernel) != 2:
        raise node.unsupported(f"a deformable convolution over {len(kernel)} spatial axes")
    windows = sliding_windows(node, kernel)
    groups, offset_groups = node.integer("group", 1), node.integer("offset_group", 1)
    wide = accumulation_dtype(data.dtype)
    operands = [node.cast(value, wide).expr for value in (data, weight, offset)]
    if node.has_input(4):
        operands.append(node.cast(node.input(4), wide).expr)

    def sampled_conv(image: te.Tensor, filters: te.Tensor, shift: te.Tensor, *mask: te.Tensor) -> te.Tensor:
        batches, channels = image.shape[:2]
        window_size = kernel[0] * kernel[1]
        channels_per_offset = channels // offset_groups

        def sample(*position: tirx.Expr) -> tirx.Expr:
            n, c, ky, kx, oy, ox = position
            place = (c // channels_per_offset) * window_size + ky * kernel[1] + kx
            top, left = windows.positions((oy, ox), (ky, kx))
            y = tirx.Cast(wide, top) + shift(n, place * 2, oy, ox)
            x = tirx.Cast(wide, left) + shift(n, place * 2 + 1, oy, ox)
            value = bilinear_sample(image, (n, c), y, x)
            return value * mask[0](n, place, oy, ox) if mask else value

        columns = te.compute((batches, channels, *kernel, *windows.output), sample, name="sampled_columns")
        inputs, outputs = filters.shape[1], filters.shape[0]
        rc = te.reduce_axis((0, inputs), name="rc")
        ry, rx = windows.reduce_axes()
        return te.compute(
            (batches, outputs, *windows.output),
            lambda n, f, oy, ox: te.sum(
                columns(n, f // (outputs // groups) * inputs + rc, ry, rx, oy, ox) * filters(f, rc, ry, rx),
                axis=[rc, ry, rx],
            ),
            name="deformable_conv2d",
        )

    result = node.compute(sampled_conv, *operands, primfunc_name_hint="deformable_conv2d")
    return with_bias(node, result, node.optional_input(3), data.dtype)


def bilinear_sample(image: te.Tensor, leading: Sequence[tirx.Expr], y: tirx.Expr, x: tirx.Expr) -> tirx.Expr:
    """Return `image[*leading]` at the fractional position (y, x); corners outside of the image count as zero."""
    height, width = image.shape[-2:]
    top, left = te.floor(y), te.floor(x)
    row, column = tirx.Cast("int64", top), tirx.Cast("int64", left)
    one = tirx.const(1, image.dtype)
    total: tirx.Expr = tirx.const(0, image.dtype)
    for dy, weight_y in ((0, one - (y - top)), (1, y - top)):
        for dx, weight_x in ((0, one - (x - left)), (1, x - left)):
            i, j = row + dy, column + dx
            inside = tirx.all(i >= 0, i < height, j >= 0, j < width)
            corner = tirx.if_then_else(inside, image(*leading, i, j), tirx.const(0, image.dtype))
            total = total + weight_y * weight_x * corner
    return total
