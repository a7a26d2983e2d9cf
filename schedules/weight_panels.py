"""Panels of quantized weights for many rows: codes and their parameters, unpacked once for all rows of a task.

A register tile that unpacks codes itself does so again for each few rows, and reads packed weights of all of K from
the second-level cache. A panel holds the codes of some columns over part of K, a byte each, in the first-level cache;
sums of all rows of a task are in memory between the parts of K.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.integer_dot import IntegerDot
from schedules.loops import index, load, local, loop, ramp, store
from schedules.quantized_operators import QuantizedProduct
from schedules.quantized_structure import Operands
from schedules.stages import sequence
from targets.base import Target

# Rows from which on a panel makes up for being filled.
FEWEST_ROWS = 16
# Of the first-level cache, what a panel's codes may take beside its scales, and rows and sums that pass by.
_PART = 2


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """The weights of a product where they lie, from the column `base` on: a vector is some columns side by side."""

    product: QuantizedProduct
    operands: Operands
    dot: IntegerDot
    base: Expr

    def codes(self, group: Expr, step: int, vector: int) -> list[Expr]:
        """Return the codes of one step of a group of activations: bytes, as int32 lanes, in the order of K."""
        layout, lanes = self.product.layout, self.dot.lanes
        number = group * (self.product.activation_group // layout.step) + step
        column, columns = self.base + vector * lanes, index(layout.columns)
        first = tirx.floormod(column, columns) * layout.reduction
        source = self.operands.packed.source
        packed = load(source, [tirx.floordiv(column, columns), number, ramp(first, lanes * layout.reduction)])
        return self.dot.unpack(packed, layout.bits)

    def scales(self, group: Expr, vector: int) -> Expr:
        """Return the scales of a group as float32."""
        return self._parameters(self.operands.weight_scales, group, vector)

    def zero_points(self, group: Expr, vector: int) -> Expr | None:
        """Return the zero points of a group as float32; None where they are the middle of the codes."""
        zeros = self.operands.zero_points
        return None if zeros is None else self._parameters(zeros, group, vector)

    def _parameters(self, read: TensorLoad, group: Expr, vector: int) -> Expr:
        column, columns, lanes = self.base + vector * self.dot.lanes, index(self.product.layout.columns), self.dot.lanes
        weight_group = tirx.floordiv(group, index(self.product.group // self.product.activation_group))
        place = [tirx.floordiv(column, columns), weight_group, ramp(tirx.floormod(column, columns), lanes)]
        values = load(read.source, place)
        if str(read.source.dtype) == "uint8":
            values = tirx.Cast(f"int32x{lanes}", values)
        return tirx.Cast(f"float32x{lanes}", values)


@dataclass(frozen=True, eq=False)
class WeightPanel:
    """Memory for the weights of `vectors` vectors of columns over `groups` groups of activations."""

    packed: PackedWeights
    vectors: int
    groups: int
    memory: tuple[Var, ...]

    @staticmethod
    def of(packed: PackedWeights, vectors: int, groups: int) -> WeightPanel:
        """Return a panel, whose `memory` has to be allocated around its use."""
        lanes, steps = packed.dot.lanes, packed.product.activation_group // packed.dot.reduction
        parameters = ["scales"] if packed.operands.zero_points is None else ["scales", "zero_points"]
        codes = local([groups, steps, vectors * lanes], "int32", "codes")
        memory = (codes, *(local([groups, vectors * lanes], "float32", name) for name in parameters))
        return WeightPanel(packed, vectors, groups, memory)

    def filled(self, start: Expr, count: Expr) -> Stmt:
        """Return the code that unpacks `count` groups from `start` on."""
        product = self.packed.product

        def group(number: Expr) -> Stmt:
            statements: list[Stmt] = []
            for v in range(self.vectors):
                for step in range(product.activation_group // product.layout.step):
                    packed = self.packed.codes(start + number, step, v)
                    places = self._codes(number, step, v)
                    statements += [store(self.memory[0], *each) for each in zip(packed, places, strict=True)]
                values = (self.packed.scales(start + number, v), self.packed.zero_points(start + number, v))
                for memory, value in zip(self.memory[1:], values, strict=False):
                    assert value is not None
                    statements.append(store(memory, value, [number, self._columns(v)]))
            return sequence(statements)

        return loop(count, group)

    def codes(self, group: Expr, step: int, vector: int) -> list[Expr]:
        """Return the codes of one step of a group of the panel, as `PackedWeights` does."""
        return [load(self.memory[0], place) for place in self._codes(group, step, vector)]

    def scales(self, group: Expr, vector: int) -> Expr:
        """Return the scales of a group of the panel."""
        return load(self.memory[1], [group, self._columns(vector)])

    def zero_points(self, group: Expr, vector: int) -> Expr | None:
        """Return the zero points of a group of the panel; None where they are the middle of the codes."""
        if self.packed.operands.zero_points is None:
            return None
        return load(self.memory[2], [group, self._columns(vector)])

    def _codes(self, group: Expr, step: int, vector: int) -> list[list[Expr]]:
        """Return where the codes of one step lie."""
        layout = self.packed.product.layout
        each = layout.step // layout.reduction
        return [[group, index(step * each + half), self._columns(vector)] for half in range(each)]

    def _columns(self, vector: int) -> Expr:
        lanes = self.packed.dot.lanes
        return ramp(vector * lanes, lanes)


def groups_of_panel(groups: int, activation_group: int, columns: int, target: Target) -> int:
    """Return how many groups of activations a panel of so many columns holds: equal parts of all, where that goes."""
    most = max(1, target.caches.level1 // _PART // (activation_group * columns))
    return -(-groups // -(-groups // most))
