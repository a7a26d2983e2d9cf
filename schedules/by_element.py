"""Sums of products with an operand that is the same in all lanes, where instructions take one element of a register.

Arm multiplies a vector by an element of another at no cost: a row's neighbouring elements along the reduction come with
one load for as many terms as a vector holds, instead of one load each. x86 multiplies by an element in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr, TensorLoad
from tvm.tirx.stmt import Stmt

from schedules.access import Access, AxisGroup, Step
from schedules.loops import Extent, index, load, local, loop, store, tiles, unrolled, vector, with_local
from schedules.stages import Stage, replace_loads, sequence, with_value
from targets.base import Target

# A statement for some terms of a reduction from one on, before which there are some that may be read as well.
Terms = Callable[[Expr, int, int], Stmt]


def multiplies_by_element(target: Target) -> bool:
    """Return whether the target's multiply-adds take one element of a register for all lanes."""
    return target.architecture == "aarch64"


def element_read(stage: Stage, lanes: AxisGroup, along: AxisGroup) -> TensorLoad | None:
    """Return the read of fp32 that is contiguous `along` an axis and the same in all `lanes`, if there is just one."""

    def step(read: TensorLoad, group: AxisGroup) -> Step:
        return Access(read.source, tuple(read.indices)).step(group.inner)

    found = [
        read
        for read in stage.loads()
        if str(read.source.dtype) == "float32" and (step(read, lanes), step(read, along)) == (Step.NONE, Step.UNIT)
    ]
    return found[0] if len(found) == 1 else None


def in_terms(extent: Extent, count: int, body: Terms, *, whole: bool = False) -> Stmt:
    """Return `body` for [0, extent), `count` terms at once: in loops, or as a `whole` without any."""
    if not isinstance(extent, int):
        return tiles(extent, [count, 1] if count > 1 else [1], lambda first, terms: body(first, terms, 0))
    times, rest = divmod(extent, count)
    around = unrolled if whole else loop
    statements = [around(times, lambda i: body(i * count, count, 0))] if times else []
    if rest:
        statements.append(body(index(times * count), rest, count - rest if times else 0))
    return sequence(statements)


def with_elements(
    read: Callable[[Expr, Expr], Expr],
    shape: tuple[int, int],
    before: int,
    step: Callable[[int, Callable[[Expr], Expr]], Stmt],
) -> Stmt:
    """Return the steps of `shape` rows by terms, of which each row's elements are loaded as one vector of fp32.

    `read` gives the element of a row and a term: neighbours in memory, with those of the terms `before`, which are
    loaded, too. `step` makes the statement of one term, and is given the element of a row.
    """
    rows, terms = shape
    width = before + terms
    held = local([rows * width], "float32", "elements")

    def fetch(row: Expr) -> Stmt:
        return vector(width, lambda lane: store(held, read(row, lane - before), [row * width + lane]))

    def element(term: int) -> Callable[[Expr], Expr]:
        return lambda row: load(held, [row * width + before + term])

    return with_local([held], [unrolled(rows, fetch), *(step(term, element(term)) for term in range(terms))])


def with_read(stage: Stage, read: TensorLoad, element: Expr) -> Stage:
    """Return `stage` with `element` in place of `read`."""
    return with_value(stage, replace_loads(stage.value, lambda other: element if other.same_as(read) else None))
