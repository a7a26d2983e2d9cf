"""Running sums and products along an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm.ir
from tvm import DataType, relax, te, tirx
from tvm.script.ir_builder import tirx as ir

from optimizer.frontend.converters.kernel_loops import kernel, loops
from optimizer.frontend.converters.precision import HALF_TYPES
from optimizer.frontend.converters.runtime_axes import vector
from optimizer.frontend.dimensions import Dimension, Shape, product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value
from schedules.loops import LINE_BITS, prefetch

Combine = Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr]

_INT64 = "int64"
# Neighbouring lines of a task, at least and at most, and how many tasks are enough. Where caches do not hold the tensor
# long pieces of rows count more than that the values so far lie on the stack.
_SHORTEST_STRIP, _LONGEST_STRIP, _TASKS = 64, 256, 4
_LARGE_ELEMENTS, _LONGEST_LARGE_STRIP = 4 * 1024 * 1024, 1024
# So many elements and their sums are more than a core's own caches hold.
_FAR_ELEMENTS = 256 * 1024
# A vector of lines is carried through so many rows in registers.
_LANES, _ROWS = 16, 2
# Where lines lie one behind the other so many are carried side by side, so many steps at a time: each addition waits
# for the one before it in its line.
_LINES_TOGETHER, _STEPS = 4, 4
_OPERATORS: dict[str, tuple[Combine, int]] = {"CumSum": (lambda x, y: x + y, 0), "CumProd": (lambda x, y: x * y, 1)}


def _register(operator: str, combine: Combine, identity: int) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        data = node.input(0)
        wide = "float32" if data.dtype in HALF_TYPES else data.dtype
        shape, axis = _lines(node, data)
        lines = node.emit(relax.op.reshape(data.expr, shape))
        if wide != data.dtype:
            lines = node.emit(relax.op.astype(lines.expr, wide))
        exclusive, reverse = bool(node.integer("exclusive", 0)), bool(node.integer("reverse", 0))
        scanned = node.compute(_Scan(combine, identity, axis, exclusive, reverse).of, lines.expr)
        result = node.emit(relax.op.reshape(scanned.expr, list(data.shape)))
        return result if wide == data.dtype else relax.op.astype(result.expr, data.dtype)


def _lines(node: Node, data: Value) -> tuple[Shape, int]:
    """Return the shape with at most one axis after that of the scan, and which axis that is."""
    known = node.known_integers(1)
    if known is not None:
        axis = node.checked_axis(known[0], data.rank)
        if axis >= data.rank - 2:
            return tuple(data.shape), axis
        return (*data.shape[: axis + 1], product(data.shape[axis + 1 :])), axis

    def merged(shape: te.Tensor, given: te.Tensor) -> te.Tensor:
        rank = int(shape.shape[0])
        axis = given(*(0 for _ in given.shape)).astype("int64")
        axis = tirx.Select(axis < 0, axis + rank, axis)
        one = tirx.const(1, "int64")
        before, length, after = one, one, one
        for place in range(rank):
            before = before * tirx.Select(axis > place, shape[place], one)
            length = length * tirx.Select(axis == place, shape[place], one)
            after = after * tirx.Select(axis < place, shape[place], one)
        return vector([before, length, after])

    return node.compute_shape(merged, node.dimensions(data), node.expr(1)), 1


@dataclass(frozen=True)
class _Scan:
    """The running combination along an axis that is the last one or the one before: neighbouring lines together."""

    combine: Combine
    identity: int
    axis: int
    exclusive: bool
    reverse: bool

    def of(self, lines: te.Tensor) -> te.Tensor:
        """Return the tensor of all running combinations."""

        def body(source: tirx.Buffer, target: tirx.Buffer) -> None:
            after = self._after(source)
            outer = product(source.shape[: self.axis])
            count = int(outer) if isinstance(outer, int | tirx.IntImm) else 0
            if self.axis + 1 == len(source.shape) and count >= _TASKS * _LINES_TOGETHER:
                self._side_by_side(source, target, count)
                return
            if not isinstance(after, tirx.IntImm):
                self._strips(source, target, after, 0, 1)
                return
            columns = int(after)
            width = min(_strip([product(source.shape[: self.axis]), source.shape[self.axis], after]), columns)
            whole, rest = divmod(columns, width) if width else (0, 0)
            self._strips(source, target, tirx.const(whole, _INT64), 0, width)
            if rest:
                self._strips(source, target, tirx.const(1, _INT64), whole * width, rest)

        return kernel([lines], [lines.shape], [str(lines.dtype)], body, "scan")

    def _strips(self, source: tirx.Buffer, target: tirx.Buffer, count: tvm.ir.Expr, first: int, width: int) -> None:
        """Emit `count` strips of `width` lines, from line `first` on.

        A strip's values so far lie in the first-level cache. Some rows at a time pass through registers, so that what
        is read and written are long pieces of a few rows, not a line or two of every one.
        """
        length = source.shape[self.axis]
        with loops([product(source.shape[: self.axis]) * count], parallel=True) as (task,):
            outside, strip = _divided(task, count)
            start = first + strip * width
            running = ir.alloc_buffer((width,), str(source.dtype), scope="local")
            with ir.serial(0, width) as lane:
                ir.buffer_store(running, tirx.const(self.identity, str(source.dtype)), [lane])

            def rows(row: tvm.ir.Expr, height: int) -> None:
                whole, rest = divmod(width, _LANES)
                with ir.serial(0, whole) as number:
                    self._tile(source, target, (outside, row, start), running, (number * _LANES, height, _LANES))
                if rest:
                    offset = tirx.const(whole * _LANES, _INT64)
                    self._tile(source, target, (outside, row, start), running, (offset, height, rest))

            blocks, elements = tirx.floordiv(length, _ROWS), product(source.shape)
            is_far = isinstance(elements, int | tirx.IntImm) and int(elements) >= _FAR_ELEMENTS
            with ir.serial(0, blocks) as block:
                if is_far and width >= _LANES:
                    self._ask(source, target, (outside, (block + 1) * _ROWS, start), width)
                rows(block * _ROWS, _ROWS)
            with ir.serial(0, length - blocks * _ROWS) as row:
                rows(blocks * _ROWS + row, 1)

    def _ask(
        self, source: tirx.Buffer, target: tirx.Buffer, at: tuple[tvm.ir.Expr, tvm.ir.Expr, tvm.ir.Expr], width: int
    ) -> None:
        """Emit requests for the lines of the next rows of a strip, `at` a place past the last one or not.

        The rows of a strip lie far from each other, so that the hardware sees none of them coming.
        """
        outside, first, start = at
        step = LINE_BITS // DataType(str(source.dtype)).bits
        with ir.serial(0, -(-width // step)) as number:
            for each in range(_ROWS):
                row = self._step(source, first + each)
                for buffer in (source, target):
                    place = self._place(buffer, outside, row, start + number * step)
                    ir.evaluate(prefetch(buffer[tuple(place)]).value)

    def _step(self, lines: tirx.Buffer, step: tvm.ir.Expr) -> tvm.ir.Expr:
        """Return where on the axis a step is."""
        return lines.shape[self.axis] - 1 - step if self.reverse else step

    def _side_by_side(self, source: tirx.Buffer, target: tirx.Buffer, count: int) -> None:
        """Emit `count` contiguous lines, some at a time; the last ones begin among the ones before them."""
        length, dtype = source.shape[self.axis], str(source.dtype)
        with loops([tirx.const(-(-count // _LINES_TOGETHER), _INT64)], parallel=True) as (task,):
            first = tirx.min(task * _LINES_TOGETHER, tirx.const(count - _LINES_TOGETHER, _INT64))
            running = [ir.alloc_buffer((1,), dtype, scope="local") for _ in range(_LINES_TOGETHER)]
            for each in running:
                ir.buffer_store(each, tirx.const(self.identity, dtype), [0])
            blocks = tirx.floordiv(length, _STEPS)
            with ir.serial(0, blocks) as block:
                self._steps(source, target, (first, block * _STEPS), running, _STEPS)
            with ir.serial(0, length - blocks * _STEPS) as number:
                self._steps(source, target, (first, blocks * _STEPS + number), running, 1)

    def _steps(
        self,
        source: tirx.Buffer,
        target: tirx.Buffer,
        at: tuple[tvm.ir.Expr, tvm.ir.Expr],
        running: Sequence[tirx.Buffer],
        steps: int,
    ) -> None:
        """Emit so many steps of neighbouring lines `at` a line and a step; reads before writes, as in `_tile`."""
        first, step = at
        values = ir.alloc_buffer((len(running), steps), str(source.dtype), scope="local")
        start = source.shape[self.axis] - steps - step if self.reverse else step

        def place(buffer: tirx.Buffer, line: int, lane: tvm.ir.Expr) -> list[tvm.ir.Expr]:
            return self._place(buffer, first + line, start + lane, tirx.const(0, _INT64))

        for line in range(len(running)):
            with ir.vectorized(0, steps) as lane:
                ir.buffer_store(values, source[tuple(place(source, line, lane))], [line, lane])
        for number in reversed(range(steps)) if self.reverse else range(steps):
            for line, total in enumerate(running):
                before = ir.alloc_buffer((1,), str(source.dtype), scope="local")
                ir.buffer_store(before, total[0], [0])
                ir.buffer_store(total, self.combine(before[0], values[line, number]), [0])
                ir.buffer_store(values, (before if self.exclusive else total)[0], [line, number])
        for line in range(len(running)):
            with ir.vectorized(0, steps) as lane:
                ir.buffer_store(target, values[line, lane], place(target, line, lane))

    def _after(self, lines: tirx.Buffer | te.Tensor) -> tvm.ir.Expr:
        """Return how many lines lie side by side."""
        return lines.shape[self.axis + 1] if self.axis + 1 < len(lines.shape) else tirx.const(1, _INT64)

    def _place(
        self, lines: tirx.Buffer, outside: tvm.ir.Expr, step: tvm.ir.Expr, column: tvm.ir.Expr
    ) -> list[tvm.ir.Expr]:
        """Return the indices of an element of the flattened outer axes, the axis, and the one after it if there is."""
        point: list[tvm.ir.Expr] = []
        for extent in reversed(lines.shape[1 : self.axis]):
            outside, own = _divided(outside, extent)
            point.insert(0, own)
        before = [outside, *point] if self.axis else []
        return [*before, step, *([column] if self.axis + 1 < len(lines.shape) else [])]

    def _tile(
        self,
        source: tirx.Buffer,
        target: tirx.Buffer,
        at: tuple[tvm.ir.Expr, tvm.ir.Expr, tvm.ir.Expr],
        running: tirx.Buffer,
        tile: tuple[tvm.ir.Expr, int, int],
    ) -> None:
        """Emit steps of neighbouring lines of a strip `at` a place: from an offset, so many steps and lines.

        All is read before anything is written: where rows lie a multiple of a page apart, a load waits for a store.
        """
        (outside, step, start), (offset, height, lanes) = at, tile
        dtype, column = str(source.dtype), start + offset
        rows = [self._step(source, step + each) for each in range(height)]
        values = ir.alloc_buffer((height + 1, lanes), dtype, scope="local")
        with ir.vectorized(0, lanes) as lane:
            ir.buffer_store(values, running[offset + lane], [0, lane])
        for number, row in enumerate(rows):
            with ir.vectorized(0, lanes) as lane:
                ir.buffer_store(
                    values, source[tuple(self._place(source, outside, row, column + lane))], [number + 1, lane]
                )
        for number in range(height):
            with ir.vectorized(0, lanes) as lane:
                ir.buffer_store(
                    values, self.combine(values[number, lane], values[number + 1, lane]), [number + 1, lane]
                )
        for number, row in enumerate(rows):
            with ir.vectorized(0, lanes) as lane:
                result = values[number if self.exclusive else number + 1, lane]
                ir.buffer_store(target, result, self._place(source, outside, row, column + lane))
        with ir.vectorized(0, lanes) as lane:
            ir.buffer_store(running, values[height, lane], [offset + lane])


def _divided(number: tvm.ir.Expr, extent: tvm.ir.Expr) -> tuple[tvm.ir.Expr, tvm.ir.Expr]:
    """Return quotient and remainder; a loop over nothing must not fold to a division by zero."""
    divisor = tirx.max(extent, tirx.const(1, _INT64))
    return tirx.floordiv(number, divisor), tirx.floormod(number, divisor)


def _strip(shape: Sequence[Dimension]) -> int:
    """Return how many neighbouring lines a task has, of which there may be fewer."""
    before, length, after = (int(extent) if isinstance(extent, int | tirx.IntImm) else None for extent in shape)
    assert after is not None
    if before is not None and length is not None and before * length * after > _LARGE_ELEMENTS:
        return _LONGEST_LARGE_STRIP
    tasks = -(-_TASKS // max(1, before or _TASKS))
    return min(max(-(-after // tasks // _LANES) * _LANES, _SHORTEST_STRIP), _LONGEST_STRIP)


for _operator, (_combine, _identity) in _OPERATORS.items():
    _register(_operator, _combine, _identity)
