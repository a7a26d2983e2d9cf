"""Sliding windows over the spatial axes: the geometry that convolutions and poolings share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import te, tirx

from optimizer.frontend.dimensions import Dimension, Shape, as_expression, simplified, static_shape
from optimizer.frontend.node import Node


@dataclass(frozen=True)
class Windows:
    """Windows over the spatial axes of a tensor [N, C, spatial...]; one entry per spatial axis in every field.

    Window `o` of an axis covers the positions `o * stride - pad_begin + r * dilation` for r in [0, kernel).
    Padding and output sizes may be symbolic. The last window may reach beyond `pad_end` when the output size was
    rounded up (ceil_mode).
    """

    spatial: Shape
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: Shape
    pads_end: Shape
    output: Shape

    @property
    def rank(self) -> int:
        """Return the number of spatial axes."""
        return len(self.kernel)

    @property
    def extents(self) -> tuple[int, ...]:
        """Return how many positions a window spans, its holes included."""
        return dilated_extents(self.kernel, self.dilations)

    @property
    def static_pads(self) -> list[int] | None:
        """Return the padding as [begins..., ends...] if it is constant, else None."""
        pads = static_shape((*self.pads_begin, *self.pads_end))
        return None if pads is None else list(pads)

    @property
    def covering_pads(self) -> list[int] | None:
        """Return constant padding that makes rounding down give `output` windows, or None if it is symbolic."""
        ends: list[Dimension] = []
        for index, extent in enumerate(self.extents):
            reached = (self.output[index] - 1) * self.strides[index] + extent
            ends.append(simplified(reached - self.spatial[index] - self.pads_begin[index]))
        pads = static_shape((*self.pads_begin, *ends))
        return None if pads is None else [max(pad, 0) for pad in pads]

    def positions(self, outputs: Sequence[tirx.Expr], offsets: Sequence[tirx.Expr]) -> list[tirx.Expr]:
        """Return the input positions of element `offsets` of window `outputs`; they may lie in the padding."""
        return [
            output * stride - begin + offset * dilation
            for output, offset, stride, begin, dilation in zip(
                outputs, offsets, self.strides, self.pads_begin, self.dilations, strict=True
            )
        ]

    def inside(self, positions: Sequence[tirx.Expr]) -> tirx.Expr:
        """Return the condition that positions lie in the tensor, not in the padding."""
        limits = [tirx.all(p >= 0, p < size) for p, size in zip(positions, self.spatial, strict=True)]
        return tirx.all(*limits)

    def reduce_axes(self) -> list[te.IterVar]:
        """Return one reduction axis over the elements of a window per spatial axis."""
        return [te.reduce_axis((0, size), name=f"window{axis}") for axis, size in enumerate(self.kernel)]


def dilated_extents(kernel: Sequence[int], dilations: Sequence[int]) -> tuple[int, ...]:
    """Return the number of positions that a dilated kernel spans along each axis."""
    return tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))


def sliding_windows(node: Node, kernel: Sequence[int], *, ceil_mode: bool = False) -> Windows:
    """Return the windows of a node over input 0, from its attributes strides, dilations, pads and auto_pad.

    The last window starts inside the tensor or its leading padding also in ceil_mode, as in PyTorch and onnxruntime.
    """
    spatial = node.input(0).shape[2:]
    rank = len(kernel)
    if len(spatial) != rank:
        raise node.unsupported(f"a kernel of {rank} axes on an input of rank {len(spatial) + 2}")
    strides, dilations = node.integers("strides", [1] * rank), node.integers("dilations", [1] * rank)
    extents = dilated_extents(kernel, dilations)
    mode = node.string("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends, output = _same_padding(spatial, extents, strides, upper=mode == "SAME_UPPER")
    else:
        pads = [0] * (2 * rank) if mode == "VALID" else node.integers("pads", [0] * (2 * rank))
        if len(pads) != 2 * rank or min(pads, default=0) < 0:
            raise node.unsupported(f"padding {pads}")
        begins, ends = tuple(pads[:rank]), tuple(pads[rank:])
        rows = zip(spatial, extents, strides, begins, ends, strict=True)
        output = tuple(_window_count(*row, ceil_mode=ceil_mode) for row in rows)
    if any(isinstance(size, int) and size <= 0 for size in output):
        raise node.unsupported(f"the windows do not fit into the input; the output would be {output}")
    return Windows(spatial, tuple(kernel), tuple(strides), tuple(dilations), begins, ends, output)


def _same_padding(
    spatial: Shape, extents: Sequence[int], strides: Sequence[int], *, upper: bool
) -> tuple[Shape, Shape, Shape]:
    """Return the padding at both ends and the output sizes, with one window for every `stride` positions."""
    begins: list[Dimension] = []
    ends: list[Dimension] = []
    outputs: list[Dimension] = []
    for size, extent, stride in zip(spatial, extents, strides, strict=True):
        output = simplified((size + stride - 1) // stride)
        missing = simplified((output - 1) * stride + extent - size)
        total = max(missing, 0) if isinstance(missing, int) else tirx.max(missing, as_expression(0))
        smaller = simplified(total // 2)
        larger = simplified(total - smaller)
        begins.append(smaller if upper else larger)
        ends.append(larger if upper else smaller)
        outputs.append(output)
    return tuple(begins), tuple(ends), tuple(outputs)


def _window_count(size: Dimension, extent: int, stride: int, begin: int, end: int, *, ceil_mode: bool) -> Dimension:
    room = size + begin + end - extent
    if not ceil_mode:
        return simplified(room // stride + 1)
    rounded_up = simplified((room + stride - 1) // stride + 1)
    starting_inside = simplified((size + begin + stride - 1) // stride)
    if isinstance(rounded_up, int) and isinstance(starting_inside, int):
        return min(rounded_up, starting_inside)
    return simplified(tirx.min(as_expression(rounded_up), as_expression(starting_inside)))
