"""Narrow rows between memory, where they follow one another, and registers that hold a column of several rows each.

Rows of `width` elements, one for each lane, fill `width` registers. Where the width is odd, every lane holds each
column once, so that blends, of which a core does more than of shuffles, bring a column together in one register: they
turn each lane's elements through the registers, by 1, 2, 4 and so on, and one permutation puts the rows in order
(Catanzaro, Keller and Garland, A decomposition for in-place matrix transposition, PPoPP 2014). Of an even width that is
done with the largest power of two of neighbouring elements as one; then columns of two registers are put in two others,
each with half of the columns and twice the rows, until every register has one column.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.loops import index, load, local, store

# The positions in memory of what registers hold, lane by lane.
State = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=64)
def states(width: int, lanes: int) -> tuple[State, ...]:
    """Return the places of `lanes` rows: in memory, between, and in columns. Two registers at most make a next one.

    The number of lanes, a power of two, is a multiple of the largest power of two that divides the width.
    """
    together = width & -width
    odd, places = width // together, lanes // together
    in_memory = tuple(tuple(range(k * lanes, (k + 1) * lanes)) for k in range(width))
    steps = [in_memory]
    for bit in range((odd - 1).bit_length()):
        turned = 2 ** (bit + 1) - 1
        steps.append(tuple(_turned(group, column, turned, odd, places, together)
                           for group in range(together) for column in range(odd)))  # fmt: skip
    rows = places
    while rows < lanes:
        # Registers of all columns of few rows become ones of fewer columns of more rows.
        rows *= 2
        kept = lanes // rows
        steps.append(_columns(width, lanes, rows, kept))
    columns = _columns(width, lanes, lanes, 1)
    return tuple(steps if steps[-1] == columns else [*steps, columns])


def _turned(group: int, column: int, turned: int, odd: int, places: int, together: int) -> tuple[int, ...]:
    """Return what a register holds once each lane is turned by those bits of its number that are in `turned`."""
    start = group * places * odd
    result: list[int] = []
    for place in range(places):
        of = (column + (place % odd) - (place % odd & turned)) % odd
        # The one element of column `of` in this place.
        own = next(e for e in range(start, start + places * odd) if e % places == place and e % odd == of)
        result += range(own * together, (own + 1) * together)
    return tuple(result)


def _columns(width: int, lanes: int, rows: int, kept: int) -> State:
    """Return registers of `kept` neighbouring columns of `rows` neighbouring rows each."""
    starts = itertools.product(range(0, lanes, rows), range(0, width, kept))
    return tuple(tuple((first + row) * width + column + k for row in range(rows) for k in range(kept))
                 for first, column in starts)  # fmt: skip


def turned(before: Var, places: Sequence[State], lanes: int) -> tuple[list[Var], list[Stmt]]:
    """Return buffers [registers, lanes] of what `before` holds after each of `places`, its own first, and the code."""
    buffers, statements = [before], list[Stmt]()
    for old, new in itertools.pairwise(places):
        source = buffers[-1]
        buffers.append(local([len(new), lanes], str(before.dtype), "turned"))
        where = {element: (number, lane) for number, held in enumerate(old) for lane, element in enumerate(held)}
        for number, held in enumerate(new):
            found = [where[element] for element in held]
            registers = list(dict.fromkeys(register for register, _ in found))
            lane_of = [registers.index(register) * lanes + lane for register, lane in found]
            value = tirx.Shuffle([whole(source, register, lanes) for register in registers], lane_of)
            statements.append(store(buffers[-1], value, lanes_of(number, lanes)))
    return buffers, statements


def whole(buffer: Var, register: int, lanes: int) -> Expr:
    """Return one register of a buffer [registers, lanes]."""
    return load(buffer, lanes_of(register, lanes))


def lanes_of(register: int, lanes: int) -> list[Expr]:
    """Return the indices of all lanes of a register."""
    return [index(register), tirx.Ramp(index(0), index(1), lanes)]
