"""Sums of products with an operand that is the same in all lanes, where instructions take one element of a register.

Arm multiplies a vector by an element of another at no cost: a row's neighbouring elements along the reduction come with
one load for as many terms as a vector holds, instead of one load each. x86 multiplies by an element in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.access import Access, AxisGroup, Step
from schedules.loops import Extent, index, load, local, loop, store, tiles, unrolled, vector, with_local
from schedules.reducer import in_fp32
from schedules.stages import Stage, replaced, sequence, with_value
from targets.base import Target

# A statement for some terms of a reduction from one on, before which there are some that may be read as well.
Terms = Callable[[Expr, int, int], Stmt]
# So many terms, from the one on that begins at a read, as a number or a vector of them.
Words = Callable[[Expr, int], Expr]


def multiplies_by_element(target: Target) -> bool:
    """Return whether the target's multiply-adds take one element of a register for all lanes."""
    return target.architecture == "aarch64"


def element_read(stage: Stage, lanes: AxisGroup, along: AxisGroup) -> Expr | None:
    """Return the read in fp32 that is contiguous `along` an axis and the same in all `lanes`, if there is just one.

    One of a 16-bit float is widened, a whole vector by one instruction.
    """

    def steps(operand: Expr) -> tuple[Step, Step]:
        read = operand.value if isinstance(operand, tirx.Cast) else operand
        access = Access(read.source, tuple(read.indices))
        return access.step(lanes.inner), access.step(along.inner)

    found = [operand for operand in in_fp32(stage) if steps(operand) == (Step.NONE, Step.UNIT)]
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
    words: Words | None = None,
) -> Stmt:
    """Return the steps of `shape` rows by terms, of which each row's elements are loaded as one vector.

    `read` gives the element of a row and a term: neighbours in memory, with those of the terms `before`, which are
    loaded, too. `step` makes the statement of one term, and is given the element of a row. Where several neighbours are
    one term, `words` gives so many terms, from the one on that begins at a read, as a vector.
    """
    rows, terms = shape
    width = before + terms
    first = read(index(0), index(0))
    held = local([rows * width], str((first if words is None else words(first, 1)).ty.dtype), "elements")

    def fetch(row: Expr) -> Stmt:
        if words is not None:
            place = row * width if width == 1 else tirx.Ramp(row * width, index(1), width)
            return store(held, words(read(row, index(-before)), width), [place])
        return vector(width, lambda lane: store(held, read(row, lane - before), [row * width + lane]))

    def element(term: int) -> Callable[[Expr], Expr]:
        return lambda row: load(held, [row * width + before + term])

    return with_local([held], [unrolled(rows, fetch), *(step(term, element(term)) for term in range(terms))])


def terms_at_once(target: Target) -> int:
    """Return how many elements of a row along the reduction one load brings."""
    return target.vector_lanes(32) if multiplies_by_element(target) else 1


def over_terms(
    extent: Extent,
    count: int,
    rows: int,
    read: Callable[[Expr, Expr], Expr],
    step: Callable[[Expr, Callable[[Expr], Expr]], Stmt],
    words: Words | None = None,
) -> Stmt:
    """Return a reduction over `extent` terms by steps of one, for which `count` elements of a row are loaded at once.

    `read` gives the element of a row and a term; `step` is given a term and the element of a row. `words` as above.
    """

    def some(first: Expr, terms: int, before: int) -> Stmt:
        if before + terms == 1:
            return step(first, lambda row: read(row, first) if words is None else words(read(row, first), 1))
        return with_elements(
            lambda row, term: read(row, first + term),
            (rows, terms),
            before,
            lambda term, of_row: step(first + term, of_row),
            words,
        )

    return in_terms(extent, count, some)


def over_rows(
    rows: int,
    count: int,
    read: Callable[[Expr], Expr],
    step: Callable[[Callable[[Expr], Expr]], Stmt],
    words: Words | None = None,
) -> Stmt:
    """Return the step of one term, for which the elements of `count` rows, neighbours in memory, are loaded at once.

    `words` as above.
    """
    if count == 1:
        return step(lambda row: read(row) if words is None else words(read(row), 1))
    held = local([rows], str(read(index(0)).ty.dtype), "elements")

    def fetch(first: int) -> Stmt:
        width = min(count, rows - first)
        if words is not None:
            place = index(first) if width == 1 else tirx.Ramp(index(first), index(1), width)
            return store(held, words(read(index(first)), width), [place])
        return vector(width, lambda row: store(held, read(first + row), [first + row]))

    return with_local([held], [*map(fetch, range(0, rows, count)), step(lambda row: load(held, [row]))])


def with_read(stage: Stage, read: Expr, element: Expr) -> Stage:
    """Return `stage` with `element` in place of `read`, a read or what widens one."""
    return with_value(stage, replaced(stage.value, read, element))
