"""Products of quantized activations with packed codes in tile registers, for many rows.

Integers would have to leave the registers after each group of 32 along K, to be scaled: a block takes twice as long so
as one whose operands are scaled before (512 x 4864 x 896, Granite Rapids: 8.1 and 3.6 ms). So both operands become
bf16, activations once for all tasks, weights once for all rows of a task, in the order of pairs that the instruction
reads; sums are of fp32 over all of K. Codes are exact in bf16: what is rounded, to 8 bits, is their product with the
scale, less than activations lost when they became codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup
from schedules.epilogue import Epilogue
from schedules.intrin.llvm_call import splat, unpacked
from schedules.intrin.matrix_tiles import BLOCK, TILE, MatrixTiles, matrix_tiles
from schedules.loops import (
    Extent,
    ceiling,
    index,
    load,
    local,
    loop,
    parallel,
    ramp,
    region,
    store,
    then_wait,
    tile_choice,
    tiles,
    with_local,
)
from schedules.matrix_tile import MatrixOperands, block_of_sums, in_blocks
from schedules.stages import Axis, sequence, substitute
from targets.base import Target

if TYPE_CHECKING:
    from schedules.quantized_matmul import QuantizedMatmulAnalysis

# Rows from which on the tiles make up for making bf16 of the weights.
FEWEST_ROWS = 16
# Of the second-level cache, what a task's weights in bf16 may take beside the rows that pass by.
PANEL_PART = 2
# Up to so many tasks for each core are tried, to leave all cores equally much.
MOST_TASKS_OF_A_CORE = 8

Products = Sequence["QuantizedMatmulAnalysis"]
# From the first row and column of a block, memory for it alone, and the epilogues that hand on through that.
HandOn = Callable[[Expr, Expr], tuple[Sequence[Var], Sequence[Epilogue]]]


def in_tiles(products: Products, target: Target, hand_on: HandOn | None = None) -> Stmt | None:
    """Return the products of the same rows and equally many columns, block by block; None where tiles do not fit.

    If `hand_on` is given, it says what follows each product; there are several products only then.
    """
    first = products[0]
    registers = matrix_tiles(target, "bfloat16", "bfloat16")
    if registers is None or first.rows is None or any(each.outer for each in products):
        return None
    depth = first.groups * first.product.activation_group
    if depth % registers.terms or first.product.activation_group % TILE:
        return None
    if isinstance(first.rows.extent, int) and first.rows.extent < FEWEST_ROWS:
        return None
    given = hand_on or (lambda _row, _column: ((), [first.epilogue]))
    emitter = _Emitter(tuple(products), first.rows, depth, registers, target, given)
    return registers.imported(emitter.statement())


def where_many(rows: Extent, many: Stmt, few: Stmt) -> Stmt:
    """Return code that takes the way of `many` rows where there are so many."""
    if isinstance(rows, int):
        return many if rows >= FEWEST_ROWS else few
    return tirx.IfThenElse(index(rows) >= index(FEWEST_ROWS), many, few)


@dataclass(frozen=True, eq=False)
class _Emitter:
    products: tuple[QuantizedMatmulAnalysis, ...]
    rows: AxisGroup
    depth: int
    registers: MatrixTiles
    target: Target
    hand_on: HandOn

    @property
    def columns(self) -> int:
        return int(self.products[0].columns.extent)

    def statement(self) -> Stmt:
        """Return the region: rows are made bf16, then each task computes some columns of all rows."""
        rounded = local([self.rows.extent, self.depth], "uint16", "rounded")
        width = BLOCK * self._strips()

        def task(number: Expr) -> Stmt:
            return tile_choice(number, self.columns, width, lambda base, count: self._columns(rounded, base, count))

        parts = [
            then_wait(parallel(self.rows.extent, lambda row: self._round_row(rounded, row))),
            parallel(ceiling(self.columns, width), task),
        ]
        return with_local([rounded], [region(parts)])

    def _strips(self) -> int:
        """Return how many times 32 columns a task takes: as many as fit, if they leave the cores equally much."""
        strips, cores = -(-self.columns // BLOCK), self.target.cores
        each = len(self.products) * self.depth * BLOCK * 2
        fitting = max(1, min(strips, self.target.caches.level2 // PANEL_PART // each))
        fewest = -(-strips // (MOST_TASKS_OF_A_CORE * cores))

        def longest(count: int) -> int:
            return -(-strips // count // cores) * count

        return min(range(fitting, min(fewest, fitting) - 1, -1), key=longest)

    def _round_row(self, rounded: Var, row: Expr) -> Stmt:
        """Return what makes bf16 of the codes of a row, times their scales."""
        operands, size = self.products[0].operands, self.products[0].product.activation_group
        point = self.rows.point(row)

        def group(number: Expr) -> Stmt:
            scale = tirx.Broadcast(_of_row(operands.scales, point, [number]), TILE)

            def part(first: int) -> Stmt:
                codes = _of_row(operands.codes, point, [number, ramp(first, TILE)])
                value = tirx.Cast(f"float32x{TILE}", tirx.Cast(f"int32x{TILE}", codes)) * scale
                bits = tirx.Cast(f"uint16x{TILE}", tirx.shift_right(_half_up(value), _splat(16)))
                return store(rounded, bits, [row, ramp(number * size + first, TILE)])

            return sequence([part(first) for first in range(0, size, TILE)])

        return loop(self.products[0].groups, group)

    def _columns(self, rounded: Var, base: Expr, count: int) -> Stmt:
        """Return all rows of `count` columns: first their weights, then block after block of rows."""
        pairs = self.depth // 2
        panels = [local([-(-count // BLOCK) * pairs, 1, BLOCK], "uint32", "panel") for _ in self.products]
        filled = [
            tiles(count, [BLOCK], lambda start, width, p=p, panel=panel: self._fill(p, panel, (base, start), width))
            for p, panel in zip(self.products, panels, strict=True)
        ]

        def block(number: Expr, height: Extent) -> Stmt:
            return tiles(
                count,
                [BLOCK],
                lambda start, width: self._block(rounded, panels, (number * BLOCK, base, start), (height, width)),
            )

        return with_local(panels, [*filled, in_blocks(self.registers, self.rows.extent, block)])

    def _fill(self, analysis: QuantizedMatmulAnalysis, panel: Var, place: tuple[Expr, Expr], width: int) -> Stmt:
        """Return what makes bf16 of the weights of up to 32 columns: pairs along K, a column in each lane."""
        layout, pairs = analysis.product.layout, self.depth // 2
        base, start = place
        first = tirx.floordiv(start, index(BLOCK)) * pairs

        def step(number: Expr) -> Stmt:
            statements = []
            for part in range(0, BLOCK, TILE):
                # Where nothing is to the right, the left again: TVM would leave the right ones out of a panel's rows.
                block = tirx.floordiv(base + start + (part if part < width else 0), index(TILE))
                for pair, value in enumerate(_pairs(analysis, block, number)):
                    at = first + number * (layout.step // 2) + pair
                    statements.append(store(panel, value, [at, index(0), ramp(part, TILE)]))
            return sequence(statements)

        return loop(self.depth // layout.step, step)

    def _block(
        self, rounded: Var, panels: Sequence[Var], place: tuple[Expr, Expr, Expr], shape: tuple[Extent, int]
    ) -> Stmt:
        """Return up to 32 rows by 32 columns of all products."""
        first, base, start = place
        row, k = (Var(name, "int64") for name in ("row", "k"))
        buffers, epilogues = self.hand_on(first, base + start)
        pairs = self.depth // 2
        statements = []
        for analysis, panel, epilogue in zip(self.products, panels, epilogues, strict=True):
            pair = tirx.floordiv(start, index(BLOCK)) * pairs + tirx.floordiv(k, index(2))
            operands = MatrixOperands(
                self.registers,
                load(panel, [pair, index(0), index(0)]),
                load(rounded, [row, k]),
                AxisGroup((Axis(row, self.rows.extent),)),
                AxisGroup((analysis.columns,)),
                AxisGroup((Axis(k, self.depth),)),
            )
            own = analysis.rows
            assert own is not None

            def at(r: Expr, c: Expr, own: AxisGroup = own, columns: Axis = analysis.columns) -> Mapping[Var, Expr]:
                return {**own.point(first + r), columns.variable: base + start + c, row: first + r}

            whole = isinstance(shape[0], int) and shape[0] == BLOCK
            statements.append(block_of_sums(operands, analysis.stage, epilogue, at, shape, whole))
        return with_local(buffers, statements)


def _pairs(analysis: QuantizedMatmulAnalysis, block: Expr, step: Expr) -> list[Expr]:
    """Return the weights of one step of a block of columns in bf16: two neighbours of K in each lane."""
    operands, product = analysis.operands, analysis.product
    layout = product.layout
    group = tirx.floordiv(step, index(product.group // layout.step))
    packed = load(operands.packed.source, [block, step, tirx.Ramp(index(0), index(1), TILE * layout.reduction)])
    scale = _parameters(operands.weight_scales, block, group)
    middle = tirx.Broadcast(tirx.const(float(1 << (layout.bits - 1)), "float32"), TILE)
    zero = middle if operands.zero_points is None else _parameters(operands.zero_points, block, group)

    def rounded(codes: Expr, byte: int) -> Expr:
        code = tirx.bitwise_and(tirx.shift_right(codes, splat(8 * byte, TILE)), splat(255, TILE))
        return _half_up((tirx.Cast(f"float32x{TILE}", code) - zero) * scale)

    values = []
    for codes in unpacked(packed, layout.bits, TILE):
        for byte in range(0, layout.reduction, 2):
            low = tirx.shift_right(rounded(codes, byte), _splat(16))
            high = tirx.bitwise_and(rounded(codes, byte + 1), _splat(0xFFFF0000))
            values.append(tirx.bitwise_or(low, high))
    return values


def _parameters(read: TensorLoad, block: Expr, group: Expr) -> Expr:
    values = load(read.source, [block, group, ramp(0, TILE)])
    if str(read.source.dtype) == "uint8":
        values = tirx.Cast(f"int32x{TILE}", values)
    return tirx.Cast(f"float32x{TILE}", values)


def _half_up(value: Expr) -> Expr:
    """Return the bits of finite floats, whose upper half is the nearest bf16; of two the one further from zero."""
    return tirx.reinterpret(f"uint32x{TILE}", value) + _splat(0x8000)


def _of_row(read: TensorLoad, point: Mapping[Var, Expr], last: Sequence[Expr]) -> Expr:
    leading = [substitute(each, point) for each in list(read.indices)[: len(read.indices) - len(last)]]
    return load(read.source, [*leading, *last])


def _splat(value: int) -> Expr:
    return tirx.Broadcast(tirx.const(value, "uint32"), TILE)
