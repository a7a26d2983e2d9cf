"""Requests for the weights of a single row's product, which memory bounds: of several blocks of columns by turns.

A core waits for a limited number of lines at a time, and hardware that follows a stream looks ahead no further than
its page, and only where it has seen a few lines of that. Several streams, each on pages of its own, bring more. At the
end of blocks the requests are for the beginnings of the next ones, where hardware has no stream to follow yet.
Loops in C on two threads of a Granite Rapids, GB/s, first quartile of 22 to 27 turns:

| inputs | a block, 8 KiB ahead | and its scales | two, 2 KiB ahead | four | eight | four without requests |
|---|---|---|---|---|---|---|
| 2048 | 28.9 | 28.8 | 32.9 | 33.0 | 31.6 | 28.1 |
| 8192 | 30.4 | 30.0 | 36.0 | 38.4 | 35.5 | 32.6 |
| 2048, in pages of 4 KiB | 27.5 | 26.9 | 29.9 | 31.9 | 32.4 | 26.8 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad
from tvm.tirx.stmt import Stmt

from schedules.loops import LINE_BITS, index, load, loop, prefetch
from schedules.quantized_operators import QuantizedProduct
from schedules.quantized_structure import Operands
from schedules.stages import sequence

# How far ahead of its use a block alone asks for its weights: 8 KiB take as long to read as a few accesses to memory,
# also where other programs use it, too.
ALONE_AHEAD = 8192
# The same of each of several blocks.
EACH_AHEAD = 2048
# Tasks of which one more or less for a core is no matter.
MANY_TASKS = 32

# The code of one group, which begins with the requests given.
OfGroup = Callable[[Expr, list[Stmt]], Stmt]


def blocks_at_once(columns: int, width: int, most: int) -> int:
    """Return how many blocks of `width` columns a task reads by turns: `most`, or fewer for two cores' even shares."""
    count = most
    while count > 1:
        tasks = -(-columns // (width * count))
        if tasks % 2 == 0 or tasks >= MANY_TASKS:
            return count
        count //= 2
    return 1


@dataclass(frozen=True, eq=False)
class WeightStreams:
    """The weights of a row's product over `groups` of activations, of which `blocks` blocks are read by turns.

    They are asked for into the cache of level `cache`.
    """

    product: QuantizedProduct
    operands: Operands
    groups: int
    blocks: int
    cache: int

    @property
    def _steps(self) -> int:
        """How many steps of the reduction, each some bytes of a block, a group has."""
        return self.product.activation_group // self.product.layout.step

    @property
    def _step_bytes(self) -> int:
        return self.product.layout.columns * self.product.layout.reduction

    def over_groups(self, column: Expr, blocks: int, of_group: OfGroup) -> list[Stmt]:
        """Return the loops over all groups of the `blocks` blocks from the one of `column` on, with their requests."""
        first = tirx.floordiv(column, index(self.product.layout.columns))
        if self.blocks == 1:
            return [loop(self.groups, lambda group: of_group(group, self._alone(group, column, first)))]
        ahead = min(self.groups, max(1, EACH_AHEAD // (self._steps * self._step_bytes)))
        rest = self.groups - ahead
        loops = [loop(rest, lambda group: of_group(group, self._of_all(first, blocks, group + ahead)))] if rest else []
        return [*loops, loop(ahead, lambda group: of_group(group + rest, self._of_all(first + blocks, blocks, group)))]

    def _alone(self, group: Expr, column: Expr, block: Expr) -> list[Stmt]:
        """Return requests for the codes that one block needs soon, and behind its last ones for the next block's."""
        within = tirx.floormod(column, index(self.product.layout.columns)) * self.product.layout.reduction
        steps = range(ALONE_AHEAD // self._step_bytes, ALONE_AHEAD // self._step_bytes + self._steps)
        return [self._request(self.operands.packed, block, group * self._steps + step, within) for step in steps]

    def _of_all(self, first: Expr, blocks: int, group: Expr) -> list[Stmt]:
        """Return requests for all weights of one group in `blocks` blocks: codes, scales and zero points."""
        steps = [group * self._steps + step for step in range(self._steps)]
        codes = [
            self._request(self.operands.packed, first + block, step, index(0))
            for step in steps
            for block in range(blocks)
        ]
        each = (self.operands.weight_scales, self.operands.zero_points)
        return [*codes, *(self._parameters(read, first, blocks, group) for read in each if read is not None)]

    def _parameters(self, read: TensorLoad, first: Expr, blocks: int, group: Expr) -> Stmt:
        """Return requests for scales or zero points of one group, where it is the first of a line's."""
        of_scale = self.product.group // self.product.activation_group
        every = of_scale * max(1, LINE_BITS // (int(read.source.dtype.bits) * self.product.layout.columns))
        place = tirx.floordiv(group, index(of_scale))
        requests = [self._request(read, first + block, place, index(0)) for block in range(blocks)]
        first_of_line = tirx.floormod(group, index(every)) == index(0)
        return tirx.IfThenElse(first_of_line, sequence(requests), None) if every > 1 else sequence(requests)

    def _request(self, read: TensorLoad, block: Expr, place: Expr, within: Expr) -> Stmt:
        return prefetch(load(read.source, [block, place, within]), self.cache)
