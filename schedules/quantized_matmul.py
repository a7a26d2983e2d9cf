"""Products of quantized activations with quantized weights, from packed codes, by integer dot products.

A task takes a strip of columns, whose packed weights stay in the first-level cache, through all rows; a register tile
takes a few rows at once, so that the codes are unpacked once for them. One row (a decoder's step) is the tile of one
row: there the kernel streams the weights once, at the speed of memory. With a symbolic number of rows the tile is
chosen as the kernel runs, and a row alone has code of its own. Many rows are computed in tile registers where a target
has them (`schedules/quantized_tiles.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, group_axes
from schedules.epilogue import Epilogue
from schedules.family import Choice, Kernel, Parameters, Space, is_large
from schedules.intrin.integer_dot import IntegerDot, integer_dot
from schedules.loops import (
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    store,
    tile_choice,
    tiles,
    unflatten,
    vector,
    with_local,
)
from schedules.matmul import follows_as_stage, split_epilogue
from schedules.quantized_operators import QuantizedProduct
from schedules.quantized_structure import Operands, described_by, is_product, operands_of
from schedules.quantized_tiles import in_tiles, where_many
from schedules.stages import Axis, Stage, sequence, substitute
from schedules.tiling import Block
from schedules.weight_streams import WeightStreams, blocks_at_once
from targets.base import Target

# Rows that one task takes, so that few columns still make work for all cores.
ROW_BLOCK = 128


@dataclass(frozen=True, eq=False)
class QuantizedMatmulAnalysis:
    """A quantized product: `rows` of activations, `columns` of outputs, and what it reads."""

    stage: Stage
    epilogue: Epilogue
    outer: tuple[AxisGroup, ...]
    rows: AxisGroup | None
    columns: Axis
    product: QuantizedProduct
    operands: Operands
    groups: int


class QuantizedMatmul:
    """Register-tiled product with packed weights of 4 or 8 bits."""

    name = "quantized-matmul"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> QuantizedMatmulAnalysis | None:
        """Return the analysis of a reduction whose value is a quantized product's, term by term."""
        stage, follows = split_epilogue(kernel)
        if stage is None or follows is None or len(stage.reduction) != 1 or not stage.spatial:
            return None
        operands = operands_of(stage)
        if operands is None:
            return None
        described = described_by(operands, target)
        if described is None or integer_dot(target, described.layout.bits) is None:
            return None
        columns = stage.spatial[-1]
        if not isinstance(columns.extent, int) or not is_product(stage, described, operands, columns):
            return None
        groups = group_axes(stage.spatial[:-1], [stage, follows_as_stage(follows)])
        rows = groups[-1] if groups else None
        return QuantizedMatmulAnalysis(
            stage, follows, tuple(groups[:-1]), rows, columns, described, operands, int(operands.codes.source.shape[-2])
        )

    def space(self, target: Target, analysis: QuantizedMatmulAnalysis) -> Space:
        """Return the register tile."""
        rows, vectors = _register_tile(target, analysis)
        return (Choice("rows", rows, (1, 2, 4, 6, 8, 12)), Choice("vectors", vectors, (1, 2, 4)))

    def apply(self, analysis: QuantizedMatmulAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        many, alone = QuantizedEmitter.of(analysis, parameters, target).statement(), row_alone(analysis)
        tiled = in_tiles([analysis], target)
        if tiled is not None and analysis.rows is not None:
            many = where_many(analysis.rows.extent, tiled, many)
        if alone is None:
            return many
        return where_alone(analysis, QuantizedEmitter.of(alone, parameters, target).statement(), many)


def row_alone(analysis: QuantizedMatmulAnalysis) -> QuantizedMatmulAnalysis | None:
    """Return a product of any number of rows as the one of a single row; None for what has no axes of rows alone."""
    if analysis.rows is None or analysis.rows.static or analysis.outer:
        return None
    return replace(analysis, rows=AxisGroup(tuple(replace(axis, extent=1) for axis in analysis.rows.axes)))


def where_alone(analysis: QuantizedMatmulAnalysis, one: Stmt, many: Stmt) -> Stmt:
    """Return code that chooses as it runs whether there is `one` row, which needs no division by how many there are."""
    assert analysis.rows is not None
    return tirx.IfThenElse(index(analysis.rows.extent) == index(1), one, many)


def _register_tile(target: Target, analysis: QuantizedMatmulAnalysis) -> tuple[int, int]:
    """Return rows and vectors whose sums, of integers and of floats, fit the registers beside codes and activations."""
    if target.has_few_registers:
        return (2, 2) if analysis.product.layout.bits == 4 else (1, 2)
    if target.architecture == "x86_64":
        return 6, 2
    # One vector of codes is unpacked for eight rows, whose sums of integers and floats take half of 32 registers.
    return 8, 1


class QuantizedEmitter:
    """Emission of one quantized product; the methods share the analysis and the register tile."""

    @staticmethod
    def of(analysis: QuantizedMatmulAnalysis, parameters: Parameters, target: Target) -> QuantizedEmitter:
        """Return the emitter of a product that the family takes on `target`, under the family's parameters."""
        dot = integer_dot(target, analysis.product.layout.bits)
        assert dot is not None
        return QuantizedEmitter(analysis, dot, parameters["rows"], parameters["vectors"], target)

    def __init__(
        self, analysis: QuantizedMatmulAnalysis, dot: IntegerDot, rows: int, vectors: int, target: Target
    ) -> None:
        self.analysis = analysis
        self.operands = analysis.operands
        self.product = analysis.product
        self.layout = analysis.product.layout
        self.dot = dot
        self.rows = rows
        self.vectors = min(vectors, ceiling_int(analysis.columns.extent, dot.lanes))
        columns, one = int(analysis.columns.extent), analysis.rows is None or _is_one(analysis.rows)
        blocks = blocks_at_once(columns, self.layout.columns, target.read_streams) if one else 1
        self.streams = WeightStreams(self.product, self.operands, analysis.groups, blocks, target.streamed_to)

    @property
    def width(self) -> int:
        """How many columns a task computes."""
        return max(self.vectors * self.dot.lanes, self.layout.columns * self.streams.blocks)

    def statement(self, strip_of: Block | None = None, width: int | None = None) -> Stmt:
        """Return the parallel loop over strips of `width` columns and blocks of rows, which `strip_of` computes.

        If they are not given, a task computes a strip of its own width.
        """
        analysis, width, compute = self.analysis, width or self.width, strip_of or self.strip
        outer = [group.extent for group in analysis.outer]
        rows: Extent = analysis.rows.extent if analysis.rows is not None else 1
        strips, blocks = ceiling_int(analysis.columns.extent, width), ceiling(rows, ROW_BLOCK)

        def task(number: Expr) -> Stmt:
            *outside, strip, block = unflatten(number, [*outer, strips, blocks])
            point: dict[Var, Expr] = {}
            for group, position in zip(analysis.outer, outside, strict=True):
                point.update(group.point(position))
            return tile_choice(
                strip, int(analysis.columns.extent), width, lambda base, count: compute(point, base, count, block)
            )

        work = product([*outer, rows, analysis.columns.extent, analysis.stage.reduction[0].extent])
        return parallel(product([*outer, strips, blocks]), task, is_large(work))

    def strip(self, point: Mapping[Var, Expr], base: Expr, count: int, block: Expr) -> Stmt:
        """Return the code for `count` columns from `base` on and the rows of a block."""
        rows: Extent = self.analysis.rows.extent if self.analysis.rows is not None else 1
        sizes = [size for size in (self.rows, 4, 2, 1) if size <= self.rows]

        def tile(row: Expr, height: int) -> Stmt:
            # A single row reads one block of columns after the other, or several by turns, as memory is faster.
            width = self.vectors * self.dot.lanes if height > 1 else self.layout.columns * self.streams.blocks
            parts = [
                self._tile(point, row, height, base + first, min(width, count - first))
                for first in range(0, count, width)
            ]
            return sequence(parts)

        if isinstance(rows, int) and rows <= ROW_BLOCK:
            return tiles(rows, sizes, tile)
        first = block * ROW_BLOCK
        rest = tirx.min(index(ROW_BLOCK), index(rows) - first)
        return tiles(rest, sizes, lambda row, height: tile(first + row, height))

    def _tile(self, point: Mapping[Var, Expr], row: Expr, height: int, base: Expr, count: int) -> Stmt:
        """Return the code of a register tile."""
        vectors = ceiling_int(count, self.dot.lanes)
        lanes, cells = self.dot.lanes, height * ceiling_int(count, self.dot.lanes)
        totals = local([cells * lanes], "float32", "totals")
        points = [self._point(point, row + number) for number in range(height)]

        def finish(number: int) -> Stmt:
            r, v = divmod(number, vectors)
            width = min(lanes, count - v * lanes)

            def element(lane: Expr) -> Stmt:
                column = base + v * lanes + lane
                here = {**points[r], self.analysis.columns.variable: column}
                total = load(totals, [index(number * lanes) + lane])
                return self.analysis.epilogue.store(_times(total, 1 / self.dot.unit), here)

            return vector(width, element)

        zero = tirx.Broadcast(tirx.const(0.0, "float32"), lanes)
        return with_local(
            [totals],
            [
                *(store(totals, zero, [_ramp(index(cell * lanes), lanes)]) for cell in range(cells)),
                *self._groups(points, base, vectors, totals),
                *(finish(cell) for cell in range(cells)),
            ],
        )

    def _point(self, point: Mapping[Var, Expr], row: Expr) -> dict[Var, Expr]:
        return {**point, **(self.analysis.rows.point(row) if self.analysis.rows is not None else {})}

    def _groups(self, points: Sequence[Mapping[Var, Expr]], base: Expr, vectors: int, totals: Var) -> list[Stmt]:
        """Return the loops over all groups of K."""

        def group_of(group: Expr, requests: list[Stmt]) -> Stmt:
            return self._group(group, points, base, (vectors, totals), requests)

        if len(points) == 1:
            blocks = ceiling_int(vectors * self.dot.lanes, self.layout.columns)
            return self.streams.over_groups(base, blocks, group_of)
        return [loop(self.analysis.groups, lambda group: group_of(group, []))]

    def _group(
        self,
        group: Expr,
        points: Sequence[Mapping[Var, Expr]],
        base: Expr,
        sums_of: tuple[int, Var],
        requests: Sequence[Stmt],
    ) -> Stmt:
        """Return the code that adds one group of K to the tile's sums: its vectors, and where these lie."""
        vectors, totals = sums_of
        lanes, bits = self.dot.lanes, self.layout.bits
        middle = self.dot.center - (0 if self.operands.zero_points is not None else 1 << (bits - 1))
        sums = [self._activation(self.operands.sums, point, [group]) for point in points]
        offsets = [total * tirx.const(middle, "int32") if middle else tirx.const(0, "int32") for total in sums]
        starts = [self.dot.start(offset) for offset in offsets]
        dtype = starts[0][0].ty.dtype
        elements = int(dtype.lanes)
        cells = [(r, v) for r in range(len(points)) for v in range(vectors)]
        partial = local([len(cells) * len(starts[0]) * elements], str(dtype).split("x", maxsplit=1)[0], "partial")

        def place(cell: int, part: int) -> Expr:
            return _ramp(index((cell * len(starts[0]) + part) * elements), elements)

        def read(cell: int) -> list[Expr]:
            return [load(partial, [place(cell, part)]) for part in range(len(starts[0]))]

        def write(cell: int, values: Sequence[Expr]) -> list[Stmt]:
            return [store(partial, value, [place(cell, part)]) for part, value in enumerate(values)]

        statements: list[Stmt] = list(requests)
        for cell, (r, _) in enumerate(cells):
            statements += write(cell, starts[r])
        size = self.product.activation_group
        for step in range(size // self.layout.step):
            number = group * (size // self.layout.step) + step
            codes = [self._codes(number, base + v * lanes) for v in range(vectors)]
            for half in range(len(codes[0])):
                k = step * self.layout.step + half * self.layout.reduction
                for cell, (r, v) in enumerate(cells):
                    x = self.dot.activations(
                        lambda first, count, r=r: self._activations(points[r], group, first, count), k
                    )
                    added = self.dot.accumulate(read(cell), codes[v][half], x)
                    statements += write(cell, self.dot.in_steps(added) if len(points) > 1 else added)
        for cell, (r, v) in enumerate(cells):
            exact = self.dot.total(read(cell), offsets[r])
            here = _ramp(index(cell * lanes), lanes)
            value = load(totals, [here]) + self._scaled(exact, group, base + v * lanes, points[r], sums[r])
            statements.append(store(totals, value, [here]))
        return with_local([partial], statements)

    def _codes(self, step: Expr, column: Expr) -> list[Expr]:
        """Return the codes of one step for a vector of columns: bytes, as int32 lanes, in the order of K."""
        layout, lanes = self.layout, self.dot.lanes
        columns = index(layout.columns)
        first = tirx.floormod(column, columns) * layout.reduction
        source = self.operands.packed.source
        packed = load(source, [tirx.floordiv(column, columns), step, _ramp(first, lanes * layout.reduction)])
        return self.dot.unpack(packed, layout.bits)

    def _activation(self, read: TensorLoad, point: Mapping[Var, Expr], last: Sequence[Expr]) -> Expr:
        """Return an element of the activations of one row."""
        leading = [substitute(i, point) for i in list(read.indices)[: len(read.indices) - len(last)]]
        return load(read.source, [*leading, *last])

    def _activations(self, point: Mapping[Var, Expr], group: Expr, first: int, count: int) -> Expr:
        """Return neighbouring activations of one row as a vector of int8."""
        return self._activation(self.operands.codes, point, [group, _ramp(index(first), count)])

    def _scaled(self, exact: Expr, group: Expr, column: Expr, point: Mapping[Var, Expr], total: Expr) -> Expr:
        """Return (sum of products - zero point * sum of activations) * the product of both scales, in units."""
        lanes = self.dot.lanes
        scale = self._activation(self.operands.scales, point, [group])
        factor = self._parameters(self.operands.weight_scales, group, column) * tirx.Broadcast(scale, lanes)
        if self.operands.zero_points is None:
            return exact * factor
        zeros = self._parameters(self.operands.zero_points, group, column)
        of_activations = _times(tirx.Cast("float32", total), self.dot.unit)
        return (exact - zeros * tirx.Broadcast(of_activations, lanes)) * factor

    def _parameters(self, read: TensorLoad, group: Expr, column: Expr) -> Expr:
        """Return scales or zero points of a vector of columns as float32."""
        columns = index(self.layout.columns)
        weight_group = tirx.floordiv(group, index(self.product.group // self.product.activation_group))
        place = [tirx.floordiv(column, columns), weight_group, _ramp(tirx.floormod(column, columns), self.dot.lanes)]
        values = load(read.source, place)
        lanes = self.dot.lanes
        if str(read.source.dtype) == "uint8":
            values = tirx.Cast(f"int32x{lanes}", values)
        return tirx.Cast(f"float32x{lanes}", values)


def ceiling_int(extent: int | Expr, size: int) -> int:
    """Return how many parts of `size` cover a constant extent."""
    return -(-int(extent) // size)


def _times(value: Expr, factor: float) -> Expr:
    """Return a float times a constant; no code where it is one."""
    return value if factor == 1 else value * tirx.const(factor, "float32")


def _ramp(base: Expr, lanes: int) -> Expr:
    return tirx.Ramp(base, tirx.const(1, "int64"), lanes)


def _is_one(rows: AxisGroup) -> bool:
    return rows.static and rows.extent == 1
