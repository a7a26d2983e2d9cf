"""Running sums and products along an axis."""

from __future__ import annotations

from collections.abc import Callable

import tvm.ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as ir

from optimizer.frontend.converters.kernel_loops import kernel, loops
from optimizer.frontend.converters.precision import HALF_TYPES
from optimizer.frontend.converters.runtime_axes import vector
from optimizer.frontend.dimensions import Shape, product
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import Value

Combine = Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr]

_INT64 = "int64"
# So many neighbouring lines are scanned at once, as many as there are left of them.
_SIDE_BY_SIDE = (64, 16, 1)
_OPERATORS: dict[str, tuple[Combine, int]] = {"CumSum": (lambda x, y: x + y, 0), "CumProd": (lambda x, y: x * y, 1)}


def _register(operator: str, combine: Combine, identity: int) -> None:
    @converter(operator)
    def convert(node: Node) -> Result:
        data = node.input(0)
        wide = "float32" if data.dtype in HALF_TYPES else data.dtype
        lines = node.emit(relax.op.reshape(data.expr, _lines(node, data)))
        if wide != data.dtype:
            lines = node.emit(relax.op.astype(lines.expr, wide))
        exclusive, reverse = bool(node.integer("exclusive", 0)), bool(node.integer("reverse", 0))
        scanned = node.compute(lambda tensor: _scan(tensor, combine, identity, exclusive, reverse), lines.expr)
        result = node.emit(relax.op.reshape(scanned.expr, list(data.shape)))
        return result if wide == data.dtype else relax.op.astype(result.expr, data.dtype)


def _lines(node: Node, data: Value) -> Shape:
    """Return the shape with the axes before and after the axis of the scan merged."""
    known = node.known_integers(1)
    if known is not None:
        axis = node.checked_axis(known[0], data.rank)
        return (product(data.shape[:axis]), data.shape[axis], product(data.shape[axis + 1 :]))

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

    return node.compute_shape(merged, node.dimensions(data), node.expr(1))


def _scan(lines: te.Tensor, combine: Combine, identity: int, exclusive: bool, reverse: bool) -> te.Tensor:
    """Return the running combination along axis 1 of a tensor of rank 3: many lines side by side where they lie so."""
    dtype = str(lines.dtype)

    def body(source: tirx.Buffer, target: tirx.Buffer) -> None:
        before, length, after = source.shape

        def scan(blocks: tvm.ir.Expr, first: int, width: int) -> None:
            divisor = tirx.max(blocks, tirx.const(1, _INT64))  # an empty loop must not fold to a division by zero
            with loops([before * blocks], parallel=True) as (task,):
                i = tirx.floordiv(task, divisor)
                start = first + tirx.floormod(task, divisor) * width
                running = ir.alloc_buffer((width,), dtype, scope="local")
                with ir.vectorized(0, width) as lane:
                    ir.buffer_store(running, tirx.const(identity, dtype), [lane])
                with ir.serial(0, length) as step:
                    j = length - 1 - step if reverse else step

                    def emit() -> None:
                        with ir.vectorized(0, width) as lane:
                            ir.buffer_store(target, running[lane], [i, j, start + lane])

                    if exclusive:
                        emit()
                    with ir.vectorized(0, width) as lane:
                        ir.buffer_store(running, combine(running[lane], source[i, j, start + lane]), [lane])
                    if not exclusive:
                        emit()

        if not isinstance(after, tirx.IntImm):
            scan(after, 0, 1)
            return
        start, rest = 0, int(after)
        for width in _SIDE_BY_SIDE:
            if rest >= width:
                scan(tirx.const(rest // width, _INT64), start, width)
            start, rest = start + rest // width * width, rest % width

    return kernel([lines], [lines.shape], [dtype], body, "scan")


for _operator, (_combine, _identity) in _OPERATORS.items():
    _register(_operator, _combine, _identity)
