"""Products of quantized activations with quantized weights, from packed codes, by integer dot products.

A task takes a strip of columns, whose packed weights stay in the first-level cache, through all rows; a register tile
takes a few rows at once, so that the codes are unpacked once for them. One row (a decoder's step) is the tile of one
row: there the kernel streams the weights once, at the speed of memory. With a symbolic number of rows the tile is
chosen as the kernel runs, and a row alone has code of its own. Many rows are computed in tile registers where a target
has them (`schedules/quantized_tiles.py`), and from unpacked codes where registers are few
(`schedules/panel_strips.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    ramp,
    store,
    tile_choice,
    tiles,
    unflatten,
    vector,
    with_local,
)
from schedules.matmul import follows_as_stage, split_epilogue
from schedules.panel_strips import PanelStrip
from schedules.quantized_operators import QuantizedProduct
from schedules.quantized_structure import Operands, described_by, is_product, operands_of
from schedules.quantized_tiles import in_tiles, where_many
from schedules.stages import Axis, Stage, sequence, substitute
from schedules.tiling import Block
from schedules.weight_panels import FEWEST_ROWS as FEWEST_ROWS_OF_PANELS
from schedules.weight_panels import PackedWeights, WeightPanel
from schedules.weight_streams import WeightStreams, blocks_at_once
from targets.base import Target

# Rows that one task takes at most, so that few columns still make work for all cores.
ROW_BLOCK = 128
# The first row of a block, and how many there are.
Rows = tuple[Expr, Extent]
# Where the sums of a tile are, by row and vector.
Totals = Callable[[int, int], TensorLoad]


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
        return (2, 2) if analysis.product.layout.bits == 4 or target.has_vnni else (1, 2)
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
        self.target = target
        self.vectors = min(vectors, ceiling_int(analysis.columns.extent, dot.lanes))
        few = isinstance(self.all_rows, int) and self.all_rows < FEWEST_ROWS_OF_PANELS
        self.panel_tile = None if few else dot.panel_tile
        columns, one = int(analysis.columns.extent), self._is_of_one_row
        blocks = blocks_at_once(columns, self.layout.columns, target.read_streams) if one else 1
        self.streams = WeightStreams(self.product, self.operands, analysis.groups, blocks, target.streamed_to)

    @property
    def width(self) -> int:
        """How many columns a task computes."""
        vectors = max(self.vectors, self.panel_tile[1] if self.panel_tile is not None else 0)
        return max(vectors * self.dot.lanes, self.layout.columns * self.streams.blocks)

    def statement(self, strip_of: Block | None = None, width: int | None = None) -> Stmt:
        """Return the parallel loop over strips of `width` columns and blocks of rows, which `strip_of` computes.

        If they are not given, a task computes a strip of its own width.
        """
        analysis, width = self.analysis, width or self.width
        outer, strips = [group.extent for group in analysis.outer], ceiling_int(analysis.columns.extent, width)
        blocks = ceiling(self.all_rows, ROW_BLOCK)

        def own(point: Mapping[Var, Expr], base: Expr, count: int, block: Expr) -> Stmt:
            return self.strip(point, base, count, self.rows_of(block))

        compute = strip_of or own

        def task(number: Expr) -> Stmt:
            if self.panel_tile is None:
                *outside, strip, block = unflatten(number, [*outer, strips, blocks])
            else:  # Rows stay in the second-level cache from one panel to the next.
                *outside, block, strip = unflatten(number, [*outer, blocks, strips])
            point: dict[Var, Expr] = {}
            for group, position in zip(analysis.outer, outside, strict=True):
                point.update(group.point(position))
            return tile_choice(
                strip, int(analysis.columns.extent), width, lambda base, count: compute(point, base, count, block)
            )

        work = product([*outer, self.all_rows, analysis.columns.extent, analysis.stage.reduction[0].extent])
        tasks = parallel(product([*outer, strips, blocks]), task, is_large(work))
        return tasks if self._is_of_one_row else self.dot.with_steps(tasks, self.target)

    @property
    def all_rows(self) -> Extent:
        """How many rows there are."""
        return self.analysis.rows.extent if self.analysis.rows is not None else 1

    @property
    def _is_of_one_row(self) -> bool:
        rows = self.analysis.rows
        return rows is None or (rows.static and rows.extent == 1)

    def rows_of(self, block: Expr) -> Rows:
        """Return the first row of a block, and how many there are."""
        rows, size = self.all_rows, index(ROW_BLOCK)
        if isinstance(rows, int) and rows <= ROW_BLOCK:
            return index(0), rows
        if self.panel_tile is not None:  # Equal blocks: a core computes all of one, or half.
            parts = tirx.max(index(ceiling(rows, ROW_BLOCK)), index(1)) * self.panel_tile[0]
            size = tirx.floordiv(index(rows) + parts - 1, parts) * self.panel_tile[0]
        first = block * size
        return first, tirx.min(size, index(rows) - first)

    def strip(self, point: Mapping[Var, Expr], base: Expr, count: int, rows: Rows) -> Stmt:
        """Return the code for `count` columns from `base` on and the rows of a block."""
        first, rest = rows
        sizes = [size for size in (self.rows, 4, 2, 1) if size <= self.rows]

        def tile(row: Expr, height: int) -> Stmt:
            # A single row reads one block of columns after the other, or several by turns, as memory is faster.
            width = self.vectors * self.dot.lanes if height > 1 else self.layout.columns * self.streams.blocks
            parts = [
                self._tile(point, row, height, base + first, min(width, count - first))
                for first in range(0, count, width)
            ]
            return sequence(parts)

        few = tiles(rest, sizes, lambda row, height: tile(first + row, height))
        if self.panel_tile is None:
            return few
        many = PanelStrip(self, self.panel_tile[0], point, base, count).statement(rows, ROW_BLOCK)
        return many if isinstance(rest, int) else tirx.IfThenElse(rest >= index(FEWEST_ROWS_OF_PANELS), many, few)

    def _tile(self, point: Mapping[Var, Expr], row: Expr, height: int, base: Expr, count: int) -> Stmt:
        """Return the code of a register tile."""
        vectors = ceiling_int(count, self.dot.lanes)
        lanes, cells = self.dot.lanes, height * ceiling_int(count, self.dot.lanes)
        totals = local([cells * lanes], "float32", "totals")
        points = [self.point_of(point, row + number) for number in range(height)]

        def total_of(r: int, v: int) -> TensorLoad:
            return load(totals, [ramp((r * vectors + v) * lanes, lanes)])

        def finish(number: int) -> Stmt:
            r, v = divmod(number, vectors)
            return self.finished(
                points[r],
                base + v * lanes,
                min(lanes, count - v * lanes),
                lambda lane: load(totals, [index(number * lanes) + lane]),
            )

        zero = tirx.Broadcast(tirx.const(0.0, "float32"), lanes)
        return with_local(
            [totals],
            [
                *(store(totals, zero, [ramp(cell * lanes, lanes)]) for cell in range(cells)),
                *self._groups(points, base, (vectors, total_of)),
                *(finish(cell) for cell in range(cells)),
            ],
        )

    def finished(
        self, point: Mapping[Var, Expr], column: Expr, width: int, total: Callable[[Expr], TensorLoad]
    ) -> Stmt:
        """Return the epilogue of `width` columns from one on, whose sums are where `total` says of each."""

        def element(lane: Expr) -> Stmt:
            here = {**point, self.analysis.columns.variable: column + lane}
            return self.analysis.epilogue.store(_times(total(lane), 1 / self.dot.unit), here)

        return vector(width, element)

    def point_of(self, point: Mapping[Var, Expr], row: Expr) -> dict[Var, Expr]:
        """Return the point of a row at one of the other axes."""
        return {**point, **(self.analysis.rows.point(row) if self.analysis.rows is not None else {})}

    def _groups(self, points: Sequence[Mapping[Var, Expr]], base: Expr, sums_of: tuple[int, Totals]) -> list[Stmt]:
        """Return the loops over all groups of K."""
        weights = PackedWeights(self.product, self.operands, self.dot, base)

        def group_of(group: Expr, requests: list[Stmt]) -> Stmt:
            return self.group((group, group), points, weights, sums_of, requests)

        if len(points) == 1:
            blocks = ceiling_int(sums_of[0] * self.dot.lanes, self.layout.columns)
            return self.streams.over_groups(base, blocks, group_of)
        return [loop(self.analysis.groups, lambda group: group_of(group, []))]

    def group(
        self,
        groups: tuple[Expr, Expr],
        points: Sequence[Mapping[Var, Expr]],
        weights: PackedWeights | WeightPanel,
        sums_of: tuple[int, Totals],
        requests: Sequence[Stmt],
    ) -> Stmt:
        """Return the code that adds one group of K, of activations and of weights, to the tile's sums.

        `sums_of` are the tile's vectors, and where their sums are.
        """
        group, of_weights = groups
        vectors, total_of = sums_of
        bits = self.layout.bits
        middle = self.dot.center - (0 if self.operands.zero_points is not None else 1 << (bits - 1))
        sums = [self._activation(self.operands.sums, point, [group]) for point in points]
        offsets = [total * tirx.const(middle, "int32") if middle else tirx.const(0, "int32") for total in sums]
        starts = [self.dot.start(offset) for offset in offsets]
        dtype = starts[0][0].ty.dtype
        elements = int(dtype.lanes)
        cells = [(r, v) for r in range(len(points)) for v in range(vectors)]
        partial = local([len(cells) * len(starts[0]) * elements], str(dtype).split("x", maxsplit=1)[0], "partial")

        def place(cell: int, part: int) -> Expr:
            return ramp((cell * len(starts[0]) + part) * elements, elements)

        def read(cell: int) -> list[Expr]:
            return [load(partial, [place(cell, part)]) for part in range(len(starts[0]))]

        def write(cell: int, values: Sequence[Expr]) -> list[Stmt]:
            return [store(partial, value, [place(cell, part)]) for part, value in enumerate(values)]

        statements: list[Stmt] = list(requests)
        for cell, (r, _) in enumerate(cells):
            statements += write(cell, starts[r])
        size = self.product.activation_group
        for step in range(size // self.layout.step):
            codes = [weights.codes(of_weights, step, v) for v in range(vectors)]
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
            parameters = (weights.scales(of_weights, v), weights.zero_points(of_weights, v))
            total = total_of(r, v)
            value = total + self._scaled(exact, parameters, (points[r], group), sums[r])
            statements.append(store(total.source, value, list(total.indices)))
        return with_local([partial], statements)

    def _activation(self, read: TensorLoad, point: Mapping[Var, Expr], last: Sequence[Expr]) -> Expr:
        """Return an element of the activations of one row."""
        leading = [substitute(i, point) for i in list(read.indices)[: len(read.indices) - len(last)]]
        return load(read.source, [*leading, *last])

    def _activations(self, point: Mapping[Var, Expr], group: Expr, first: int, count: int) -> Expr:
        """Return neighbouring activations of one row as a vector of int8."""
        return self._activation(self.operands.codes, point, [group, ramp(first, count)])

    def _scaled(
        self, exact: Expr, parameters: tuple[Expr, Expr | None], at: tuple[Mapping[Var, Expr], Expr], total: Expr
    ) -> Expr:
        """Return (sum of products - zero point * sum of activations) * the product of both scales, in units."""
        lanes, (scales, zeros) = self.dot.lanes, parameters
        scale = self._activation(self.operands.scales, at[0], [at[1]])
        factor = scales * tirx.Broadcast(scale, lanes)
        if zeros is None:
            return exact * factor
        of_activations = _times(tirx.Cast("float32", total), self.dot.unit)
        return (exact - zeros * tirx.Broadcast(of_activations, lanes)) * factor


def ceiling_int(extent: int | Expr, size: int) -> int:
    """Return how many parts of `size` cover a constant extent."""
    return -(-int(extent) // size)


def _times(value: Expr, factor: float) -> Expr:
    """Return a float times a constant; no code where it is one."""
    return value if factor == 1 else value * tirx.const(factor, "float32")
