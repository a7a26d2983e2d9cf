"""Detection in images: NonMaxSuppression, RoiAlign."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from tvm import relax, te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 - the name that TVM's own code gives it

from optimizer.frontend.accumulation import accumulation_dtype, cast
from optimizer.frontend.dimensions import as_expression
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter


@converter("NonMaxSuppression", since=10)
def non_max_suppression(node: Node) -> Result:
    """Convert NonMaxSuppression: greedily, by score, the boxes that overlap no box chosen before by more than a limit.

    Returns [selected, 3]: batch, class and box. Equal scores are taken in the order of the boxes.
    """
    boxes, scores = node.input(0), node.input(1)
    most = _scalar_input(node, 2, np.array(0, np.int64))
    overlap = _scalar_input(node, 3, np.array(0, np.float32))
    threshold = _scalar_input(node, 4, np.array(-np.inf, np.float32))
    has_threshold = node.has_input(4)
    centered = bool(node.integer("center_point_box", 0))

    def select(*tensors: te.Tensor) -> list[te.Tensor]:
        batches, classes, count = scores.shape
        shapes = [(batches, classes, count), (batches, classes), (batches, classes, count)]

        def build(inputs: Sequence[tirx.Buffer], outputs: Sequence[tirx.Buffer]) -> tirx.Stmt:
            return _suppression(inputs, outputs, centered=centered, has_threshold=has_threshold)

        shapes = [[as_expression(size) for size in shape] for shape in shapes]
        return te.extern(shapes, list(tensors), build, dtype=["int64"] * 3, name="non_max_suppression")

    call = node.graph.builder.call_te(
        select, boxes.expr, scores.expr, most, overlap, threshold, primfunc_name_hint="non_max_suppression"
    )
    chosen, counts, _ = node.emit_tuple(call)
    total = node.emit(relax.op.reshape(relax.op.sum(counts.expr), (1,)))
    length = node.graph.bind_elements(total, f"{node.output_hint}_count").item()
    return node.compute(
        lambda selected, numbers: _selected_boxes(selected, numbers, length),
        chosen.expr,
        counts.expr,
        primfunc_name_hint="selected_boxes",
    )


def _selected_boxes(selected: te.Tensor, numbers: te.Tensor, length: tirx.Expr) -> te.Tensor:
    """Return the chosen boxes of all batches and classes as one list of [batch, class, box]."""
    batches, classes = numbers.shape
    pairs = batches * classes
    zero, other = tirx.const(0, "int64"), te.reduce_axis((0, pairs), name="other")

    def number(pair: tirx.Expr) -> tirx.Expr:
        return numbers(pair // classes, pair % classes)

    ends = te.compute(
        (pairs,), lambda pair: te.sum(tirx.Select(other <= pair, number(other), zero), axis=other), name="ends"
    )
    before = te.reduce_axis((0, pairs), name="before")
    pair_of = te.compute(
        (length,), lambda row: te.sum(tirx.Select(ends(before) <= row, zero + 1, zero), axis=before), name="pair"
    )

    def element(row: tirx.Expr, column: tirx.Expr) -> tirx.Expr:
        pair = pair_of(row)
        batch, label = pair // classes, pair % classes
        box = selected(batch, label, row - (ends(pair) - number(pair)))
        return tirx.if_then_else(column == 0, batch, tirx.if_then_else(column == 1, label, box))

    return te.compute((length, as_expression(3)), element, name="selected_boxes")


def _scalar_input(node: Node, index: int, default: np.ndarray) -> relax.Expr:
    value = node.optional_input(index)
    return node.reshape(value if value is not None else node.constant(default), (1,)).expr


def _suppression(
    inputs: Sequence[tirx.Buffer], outputs: Sequence[tirx.Buffer], *, centered: bool, has_threshold: bool
) -> tirx.Stmt:
    """Return the greedy selection of each batch and class: chosen boxes in order, their number, and a scratch heap.

    Boxes come from the heap by score, and are held against those chosen so far: most are never looked at.
    """
    with IRBuilder() as builder:
        boxes, scores, most, overlap, threshold = (T.buffer_proxy(buffer) for buffer in inputs)
        selected, counts, heap = (T.buffer_proxy(buffer) for buffer in outputs)
        batches, classes, size = inputs[1].shape
        with T.parallel(0, batches * classes) as pair:
            batch, label = pair // classes, pair % classes
            waiting = T.buffer_proxy(T.alloc_buffer((1,), "int64", scope="local"))
            rejected = T.buffer_proxy(T.alloc_buffer((1,), "int32", scope="local"))
            sift = _Sift(heap, scores, (batch, label), waiting)
            counts[batch, label] = T.int64(0)
            waiting[0] = T.int64(0)
            with T.serial(0, size) as box:
                wanted = scores[batch, label, box] > threshold[0] if has_threshold else tirx.const(True, "bool")
                with T.If(wanted), T.Then():
                    heap[batch, label, waiting[0]] = tirx.Cast("int64", box)
                    waiting[0] = waiting[0] + 1
            count = waiting[0]
            with T.serial(0, count // 2) as step:
                sift.down(count // 2 - 1 - step)
            with T.While(tirx.all(waiting[0] > 0, counts[batch, label] < most[0])):
                best = heap[batch, label, 0]
                rejected[0] = T.int32(0)
                with T.serial(0, counts[batch, label]) as other, T.If(rejected[0] == 0), T.Then():
                    two = [
                        [boxes[batch, which, k] for k in range(4)] for which in (best, selected[batch, label, other])
                    ]
                    with T.If(_overlap(two, centered=centered, limit=overlap[0])), T.Then():
                        rejected[0] = T.int32(1)
                with T.If(rejected[0] == 0), T.Then():
                    selected[batch, label, counts[batch, label]] = best
                    counts[batch, label] = counts[batch, label] + 1
                waiting[0] = waiting[0] - 1
                heap[batch, label, 0] = heap[batch, label, waiting[0]]
                sift.down(T.int64(0))
        return builder.get()


class _Sift:
    """A heap of boxes whose first one has the greatest score, of equal ones the first (J. W. J. Williams, 1964)."""

    def __init__(
        self,
        heap: T.buffer_proxy,
        scores: T.buffer_proxy,
        line: tuple[tirx.Expr, tirx.Expr],
        count: T.buffer_proxy,
    ) -> None:
        self._heap, self._scores, self._line, self._count = heap, scores, line, count
        self._state = T.buffer_proxy(T.alloc_buffer((2,), "int64", scope="local"))  # a place, and the next one

    def down(self, start: tirx.Expr) -> None:
        """Emit the statements that bring the box at a place below all that come before it."""
        heap, state, count = self._heap, self._state, self._count[0]
        state[0], state[1] = start, start * 2 + 1
        with T.While(state[1] < count):
            right = state[1] + 1
            with T.If(right < count), T.Then(), T.If(self._precedes(right, state[1])), T.Then():
                state[1] = right
            with T.If(self._precedes(state[1], state[0])):
                with T.Then():
                    upper = T.buffer_proxy(T.alloc_buffer((1,), "int64", scope="local"))
                    upper[0] = heap[(*self._line, state[0])]
                    heap[(*self._line, state[0])] = heap[(*self._line, state[1])]
                    heap[(*self._line, state[1])] = upper[0]
                    state[0] = state[1]
                    state[1] = state[1] * 2 + 1
                with T.Else():
                    state[1] = count

    def _precedes(self, place: tirx.Expr, other: tirx.Expr) -> tirx.Expr:
        box, other_box = (self._heap[(*self._line, each)] for each in (place, other))
        score, other_score = (self._scores[(*self._line, each)] for each in (box, other_box))
        return tirx.any(score > other_score, tirx.all(score.equal(other_score), box < other_box))


def _overlap(boxes: Sequence[Sequence[tirx.Expr]], *, centered: bool, limit: tirx.Expr) -> tirx.Expr:
    """Return whether the intersection of two boxes over their union exceeds `limit`; empty boxes overlap nothing.

    A box is two opposite corners [y1, x1, y2, x2], or with `centered` [x, y, width, height].
    """
    spans = [_spans(box, centered=centered) for box in boxes]
    zero = tirx.const(0, "float32")
    intersection: tirx.Expr = tirx.const(1, "float32")
    for (low, high), (other_low, other_high) in zip(*spans, strict=True):
        intersection = intersection * tirx.max(tirx.min(high, other_high) - tirx.max(low, other_low), zero)
    areas = [(span[0][1] - span[0][0]) * (span[1][1] - span[1][0]) for span in spans]
    union = areas[0] + areas[1] - intersection
    valid = tirx.all(intersection > zero, areas[0] > zero, areas[1] > zero, union > zero)
    return tirx.all(valid, intersection / tirx.Select(valid, union, tirx.const(1, "float32")) > limit)


def _spans(box: Sequence[tirx.Expr], *, centered: bool) -> list[tuple[tirx.Expr, tirx.Expr]]:
    if centered:
        halves = [box[2] / tirx.const(2, "float32"), box[3] / tirx.const(2, "float32")]
        return [(center - half, center + half) for center, half in zip(box[:2], halves, strict=True)]
    return [(tirx.min(box[k], box[k + 2]), tirx.max(box[k], box[k + 2])) for k in (0, 1)]


@converter("RoiAlign", since=10)
def roi_align(node: Node) -> Result:
    """Convert RoiAlign: the mean (or maximum) of bilinear samples in each cell of a region (arXiv 1703.06870)."""
    data, regions, images = node.input(0), node.input(1), node.input(2)
    grid = [node.integer("output_height", 1), node.integer("output_width", 1)]
    ratio, scale = node.integer("sampling_ratio", 0), node.float("spatial_scale", 1.0)
    default = "half_pixel" if node.version >= 16 else "output_half_pixel"
    half_pixel = node.string("coordinate_transformation_mode", default) == "half_pixel"
    mode = node.string("mode", "avg")
    if mode not in ("avg", "max"):
        raise node.unsupported(f"mode '{mode}'")
    dtype = accumulation_dtype(data.dtype)

    def align(image: te.Tensor, boxes: te.Tensor, batch_of: te.Tensor) -> te.Tensor:
        def number(value: float) -> tirx.Expr:
            return tirx.const(value, dtype)

        def cell(region: tirx.Expr, channel: tirx.Expr, *place: tirx.Expr) -> tirx.Expr:
            starts, steps, counts = [], [], []
            for axis, column in ((0, 1), (1, 0)):
                start, end = (
                    boxes(region, index) * number(scale) - number(0.5 if half_pixel else 0.0)
                    for index in (column, column + 2)
                )
                # Malformed regions count as 1x1 in the older mode.
                length = end - start if half_pixel else tirx.max(end - start, number(1))
                step = length / number(grid[axis])
                count = tirx.const(ratio, "int64") if ratio > 0 else tirx.Cast("int64", te.ceil(step))
                starts.append(start + tirx.Cast(dtype, place[axis]) * step)
                steps.append(step / tirx.Cast(dtype, tirx.max(count, tirx.const(1, "int64"))))
                counts.append(tirx.max(count, tirx.const(0, "int64")))
            samples = [te.reduce_axis((0, count), name=f"sample{axis}") for axis, count in enumerate(counts)]
            position = [
                start + (tirx.Cast(dtype, sample) + number(0.5)) * step
                for start, step, sample in zip(starts, steps, samples, strict=True)
            ]
            # An image that is not there would be read from anywhere.
            number_of = tirx.max(tirx.min(tirx.Cast("int64", batch_of(region)), image.shape[0] - 1), 0)
            corners = _bilinear_corners(image, [number_of, channel], position, dtype)
            if mode == "avg":
                total = tirx.Cast(dtype, tirx.max(counts[0] * counts[1], tirx.const(1, "int64")))
                return te.sum(sum(corners[1:], corners[0]) / total, axis=samples)
            largest = corners[0]
            for corner in corners[1:]:
                largest = tirx.max(largest, corner)
            return te.max(largest, axis=samples)

        return te.compute((boxes.shape[0], image.shape[1], *grid), cell, name="roi_align")

    wide = [node.cast(value, dtype).expr for value in (data, regions)]
    aligned = node.compute(align, *wide, images.expr, primfunc_name_hint="roi_align").expr
    if mode == "max":
        # A cell without a sample keeps the lowest number of the reduction; ONNX gives 0 there.
        lowest = node.scalar(float(np.finfo(dtype).min), dtype)
        aligned = relax.op.where(relax.op.less_equal(aligned, lowest), node.scalar(0, dtype), aligned)
    return cast(node.emit(aligned).expr, dtype, data.dtype)


def _bilinear_corners(
    image: te.Tensor, leading: Sequence[tirx.Expr], position: Sequence[tirx.Expr], dtype: str
) -> list[tirx.Expr]:
    """Return the four weighted pixels around a position; up to one pixel outside it is moved onto the border."""
    rows: list[list[tuple[tirx.Expr, tirx.Expr]]] = []
    outside: list[tirx.Expr] = []
    one, zero = tirx.const(1, dtype), tirx.const(0, dtype)
    for at, size in zip(position, image.shape[-2:], strict=True):
        outside.append(tirx.any(at < -one, at > tirx.Cast(dtype, size)))
        inside = tirx.min(tirx.max(at, zero), tirx.Cast(dtype, size - 1))
        # Of a NaN the integer may be any.
        low = tirx.max(tirx.min(tirx.Cast("int64", te.floor(inside)), size - 1), 0)
        weight = inside - te.floor(inside)
        rows.append([(low, one - weight), (tirx.min(low + 1, size - 1), weight)])
    beyond = tirx.any(*outside)
    return [
        tirx.if_then_else(beyond, zero, weight_y * weight_x * image(*leading, y, x))
        for (y, weight_y), (x, weight_x) in itertools.product(*rows)
    ]
