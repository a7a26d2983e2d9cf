"""Building blocks of emitted loop nests: loops of each kind, tiles with their tails, local buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.stages import sequence

Extent = int | Expr
INDEX = "int64"
# What a cache brings from memory at once.
LINE_BITS = 512
# The cache of that level in `prefetch`.
SECOND_LEVEL = 2
# Code for one cell of a register tile, from its row and column.
Element = Callable[[Expr, Expr], Stmt]


def index(value: Extent) -> Expr:
    """Return `value` as an index expression."""
    return tirx.IntImm(INDEX, value) if isinstance(value, int) else value


def ramp(first: Extent, lanes: int) -> Expr:
    """Return `lanes` neighbouring indices from `first` on."""
    return tirx.Ramp(index(first), tirx.const(1, INDEX), lanes)


def loop(
    extent: Extent, body: Callable[[Expr], Stmt], kind: tirx.ForKind = tirx.ForKind.SERIAL, name: str = "i"
) -> Stmt:
    """Return a loop over [0, extent); a loop of one iteration is its body."""
    if extent == 1 and isinstance(extent, int):
        return body(index(0))
    variable = Var(name, INDEX)
    return tirx.For(variable, index(0), index(extent), kind, body(variable))


def unrolled(extent: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """Return a loop that is unrolled completely."""
    return loop(extent, body, tirx.ForKind.UNROLLED, "u")


def vector(width: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """Return one vector statement of `width` lanes."""
    return loop(width, body, tirx.ForKind.VECTORIZED, "v")


def cells(rows: int, width: int, element: Element) -> Stmt:
    """Return `element` for every row, unrolled, by one vector of `width`: a register tile."""
    return unrolled(rows, lambda row: vector(width, lambda column: element(row, column)))


def cells_in_pieces(rows: int, width: int, element: Element) -> Stmt:
    """Return the same by vectors whose widths are powers of two, the widest first."""

    def of_row(row: Expr) -> Stmt:
        pieces = [bit for place in reversed(range(width.bit_length())) if (bit := width & 1 << place)]
        begins = [sum(pieces[:place]) for place in range(len(pieces))]
        parts = [
            vector(piece, lambda column, begin=begin: element(row, begin + column))
            for begin, piece in zip(begins, pieces, strict=True)
        ]
        return parts[0] if len(parts) == 1 else tirx.SeqStmt(parts)

    return unrolled(rows, of_row)


def parallel(extent: Extent, body: Callable[[Expr], Stmt], enabled: bool = True) -> Stmt:
    """Return a loop whose iterations run on all threads (in order on one thread where not `enabled`)."""
    return loop(extent, body, tirx.ForKind.PARALLEL if enabled else tirx.ForKind.SERIAL, "task")


def region(statements: Sequence[Stmt]) -> Stmt:
    """Return statements that all threads run in one launch: each its share of every parallel loop among them.

    Parallel loops of equal extent are shared out in the same way, so that iteration `i` of each is of the same thread.
    What stands outside of them (serial loops around them, conditions) every thread runs.
    """
    return _annotated("pragma_parallel_launch_point", sequence(statements))


def then_wait(statement: Stmt) -> Stmt:
    """Return a statement of a region, after which each thread waits until all others have done it, too."""
    return _annotated("pragma_parallel_barrier_when_finish", statement)


def _annotated(key: str, body: Stmt) -> Stmt:
    return tirx.AttrStmt(tirx.const(0, "int32"), key, tirx.const(1, "int32"), body)


def nest(extents: Sequence[Extent], body: Callable[[list[Expr]], Stmt]) -> Stmt:
    """Return serial loops over all `extents`, the last one innermost."""

    def descend(depth: int, point: list[Expr]) -> Stmt:
        if depth == len(extents):
            return body(point)
        return loop(extents[depth], lambda i: descend(depth + 1, [*point, i]))

    return descend(0, [])


def unflatten(flat: Expr, extents: Sequence[Extent]) -> list[Expr]:
    """Return the row-major coordinates of `flat` in a box of `extents`."""
    point: list[Expr] = []
    rest = flat
    varying = [i for i, extent in enumerate(extents) if extent != 1]
    for position in reversed(range(len(extents))):
        extent = extents[position]
        if isinstance(extent, int) and extent == 1:
            point.append(index(0))
        elif position == varying[0]:
            point.append(rest)
        else:
            divisor = _divisor(extent)
            point.append(tirx.floormod(rest, divisor))
            rest = tirx.floordiv(rest, divisor)
    return point[::-1]


def _divisor(extent: Extent) -> Expr:
    """Return an extent to divide by: one that is 0, or may fold to it, is kept from becoming a division by zero.

    The loop over an empty box has no iterations, so the coordinates in it do not matter.
    """
    if isinstance(extent, int):
        return index(max(extent, 1))
    return extent if isinstance(extent, tirx.Var) else tirx.max(index(extent), index(1))


def quotient(extent: Extent, size: int) -> Extent:
    """Return how many times `size` fits into `extent`."""
    return extent // size if isinstance(extent, int) else tirx.floordiv(extent, index(size))


def remainder(extent: Extent, size: int) -> Extent:
    """Return what is left of `extent` beyond multiples of `size`."""
    return extent % size if isinstance(extent, int) else tirx.floormod(extent, index(size))


def ceiling(extent: Extent, size: int) -> Extent:
    """Return how many tiles of `size` cover `extent`."""
    return -(-extent // size) if isinstance(extent, int) else tirx.floordiv(extent + (size - 1), index(size))


def flatten(point: Sequence[Expr], extents: Sequence[Extent]) -> Expr:
    """Return the row-major position of `point` in a box of `extents`."""
    flat: Expr = index(0)
    for position, extent in zip(point, extents, strict=True):
        flat = flat * index(extent) + position
    return flat


def product(extents: Sequence[Extent]) -> Extent:
    """Return the product of extents; an integer where all are."""
    result: Extent = 1
    for extent in extents:
        if isinstance(extent, int) and isinstance(result, int):
            result = result * extent
        else:
            result = index(result) * index(extent) if result != 1 else extent
    return result


def tiles(extent: Extent, sizes: Sequence[int], body: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return loops that cover [0, extent) by tiles of `sizes`, largest first; `body` gets offset and constant width.

    A static remainder smaller than the last size becomes one tile of exactly that width; a symbolic one needs
    `sizes` to end with 1.
    """
    statements: list[Stmt] = []
    start: Extent = 0
    rest = extent
    for size in sizes:
        count = quotient(rest, size) if size > 1 else rest
        if not (isinstance(count, int) and count == 0):
            base = index(start)
            statements.append(loop(count, lambda i, s=size, b=base: body(b + i * s, s)))
        if isinstance(rest, int):
            start = start + (rest // size) * size if isinstance(start, int) else start
            rest = rest % size
        else:
            start = start + count * index(size) if not isinstance(start, int) or start else count * index(size)
            rest = remainder(rest, size) if size > 1 else 0
    if isinstance(rest, int) and rest:
        statements.append(body(index(start), rest))
    return sequence(statements) if statements else tirx.Evaluate(0)


def in_vectors(lanes: int, extent: Extent, element: Callable[[Expr], Stmt]) -> Stmt:
    """Return `element` for [0, extent) in vectors, what a symbolic extent leaves of them one by one."""
    sizes = [lanes] if isinstance(extent, int) else [lanes, 1]
    return tiles(extent, sizes, lambda base, width: vector(width, lambda i: element(base + i)))


def tile_choice(number: Expr, extent: int, size: int, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return the body of tile `number` of [0, extent): a branch to a narrower last one where `size` leaves a rest."""
    full, rest = divmod(extent, size)
    if not rest:
        return body(number * size, size)
    if not full:
        return body(index(0), rest)
    return tirx.IfThenElse(number < full, body(number * size, size), body(index(full * size), rest))


def local(shape: Sequence[Extent], dtype: str, name: str) -> Var:
    """Return a buffer that lives inside one task."""
    return tirx.decl_buffer([index(extent) for extent in shape], dtype, name)


def with_local(buffers: Sequence[Var], statements: Sequence[Stmt]) -> Stmt:
    """Return `statements` with `buffers` allocated around them."""
    return tirx.SeqStmt([*(tirx.AllocBuffer(buffer, {}) for buffer in buffers), *statements])


def store(buffer: Var, value: Expr, indices: Sequence[Expr]) -> tirx.BufferStore:
    """Return `buffer[indices] = value`."""
    return tirx.BufferStore(buffer, value, list(indices))


def load(buffer: Var, indices: Sequence[Expr]) -> Expr:
    """Return `buffer[indices]`."""
    return tirx.BufferLoad(buffer, list(indices))


def prefetch(read: Expr, cache: int = 1) -> Stmt:
    """Return a request to bring the element that `read` loads, past the end or not, into the cache of that level."""
    address = tirx.address_of(read)
    for_reading, locality, data = (tirx.const(value, "int32") for value in (0, 4 - cache, 1))
    return tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, for_reading, locality, data))
