"""Strips of a quantized product for many rows: register tiles that read unpacked codes from a panel.

With 16 registers a tile has eight sums of a group's products and the operands of one step in them, and no others: sums
of groups are added to in memory, one instruction for its reading and the addition. On a Zen 3 the loop takes 234
instructions for 2048 products of a group, and 292 with a tile that unpacks codes itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.fixed_order import in_memory
from schedules.loops import Extent, index, load, local, loop, ramp, store, tiles, with_local
from schedules.stages import sequence
from schedules.weight_panels import PackedWeights, WeightPanel, groups_of_panel

if TYPE_CHECKING:
    from schedules.quantized_matmul import QuantizedEmitter


@dataclass(frozen=True, eq=False)
class PanelStrip:
    """A strip of `count` columns from `base` on at a `point` of the axes before rows, by tiles of `height` rows."""

    emitter: QuantizedEmitter
    height: int
    point: Mapping[Var, Expr]
    base: Expr
    count: int

    def statement(self, of_rows: tuple[Expr, Extent], most: int) -> Stmt:
        """Return the code for the first of some rows and how many: part after part of K, in each row after row."""
        first, rows = of_rows
        emitter, lanes, groups = self.emitter, self.emitter.dot.lanes, self.emitter.analysis.groups
        vectors = -(-self.count // lanes)
        packed = PackedWeights(emitter.product, emitter.operands, emitter.dot, self.base)
        each = groups_of_panel(groups, emitter.product.activation_group, vectors * lanes, emitter.target)
        panel = WeightPanel.of(packed, vectors, each)
        sums = local([rows if isinstance(rows, int) else most, vectors * lanes], "float32", "sums")
        zero = tirx.Broadcast(tirx.const(0.0, "float32"), lanes)

        def cleared(row: Expr) -> Stmt:
            return sequence([store(sums, zero, [row, ramp(v * lanes, lanes)]) for v in range(vectors)])

        def part(number: Expr) -> Stmt:
            start = number * each
            here = index(each) if groups % each == 0 else tirx.min(index(each), index(groups) - start)

            def tile(row: Expr, height: int) -> Stmt:
                points = [emitter.point_of(self.point, first + row + number) for number in range(height)]
                return loop(here, lambda group: self._group(panel, (sums, row), points, (start + group, group)))

            return sequence([panel.filled(start, here), tiles(rows, [self.height, 1], tile)])

        def finished(row: Expr) -> Stmt:
            point = emitter.point_of(self.point, first + row)
            return tiles(
                self.count,
                [lanes],
                lambda column, width: emitter.finished(
                    point, self.base + column, width, lambda lane: load(sums, [row, column + lane])
                ),
            )

        parts = [loop(rows, cleared), loop(-(-groups // each), part), loop(rows, finished)]
        return with_local([sums, *panel.memory], parts)

    def _group(
        self, panel: WeightPanel, at: tuple[Var, Expr], points: Sequence[Mapping[Var, Expr]], groups: tuple[Expr, Expr]
    ) -> Stmt:
        """Return the code that adds a group of K to the sums of the rows at `points`, which lie from a row on."""
        (sums, row), lanes = at, self.emitter.dot.lanes

        def total(r: int, v: int) -> TensorLoad:
            return load(sums, [row + r, ramp(v * lanes, lanes)])

        added = self.emitter.group(groups, points, panel, (panel.vectors, total), [])
        return sequence([in_memory(load(sums, [row, index(0)])), added])
