"""Elementwise functions that read along another axis than they write: transpositions and layout changes.

The output is computed in square tiles; each is first read along the input's contiguous axis into a buffer of the tile's
size, so that every cache line is read once and whole, and then written along the output's. A whole tile of as many
vectors as they have lanes is turned in registers, and so is one of fewer rows or columns, 4 or 8, where an axis has no
more. Where tiles do not divide an axis the last one begins earlier and computes again what it has in common with the
one before it, so that all tiles of axes longer than a tile are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Expr, Range, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, Step, as_int, branches_on, free_variables, group_axes
from schedules.division import TASKS_PER_CORE, Division
from schedules.family import Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.matrix_tiles import matrix_tiles
from schedules.loops import (
    LINE_BITS,
    SECOND_LEVEL,
    index,
    load,
    local,
    loop,
    parallel,
    prefetch,
    product,
    store,
    unflatten,
    unrolled,
    vector,
    with_local,
)
from schedules.matmul import step
from schedules.matrix_tile import stride_of
from schedules.stages import Axis, Stage, replace_loads, sequence, substitute
from schedules.streaming import LAST_CACHE_BYTES, LINE_BYTES
from schedules.turn import interleave_rows, turn_by_quarters, turn_rows, turn_short_rows
from targets.base import Target

# Below this a tile is too narrow for its detour through memory to pay, unless it is of pairs, which one shuffle takes
# apart or brings together.
SHORTEST_AXIS = 4
PAIR = 2
# How many tiles ahead lines are asked for: rows are too far apart for the hardware to see what comes next. Where a tile
# has whole lines, two are enough to be under way: 1023x1025 took 633 us by four, 577 by two and 610 by one or three
# (Emerald Rapids, one thread).
TILES_AHEAD = 4
LINES_AHEAD = 2
# Lines about so far apart have the same few places in a first-level cache, and each has an address to translate, which
# so many blocks side by side share: 4096x4096 took 17.8 ms by one block, 15.8 by two, 11.2 by four (Zen 3, one thread).
PAGE_BYTES = 4096
BLOCKS_OF_PAGE = 4


@dataclass(frozen=True, eq=False)
class TransposeAnalysis:
    """A stage whose reads `turned` are contiguous along group `across` while it writes along `along`."""

    stage: Stage
    outer: tuple[AxisGroup, ...]
    across: AxisGroup
    along: AxisGroup
    turned: tuple[TensorLoad, ...]
    division: Division


class Transpose:
    """Square tiles through a buffer."""

    name = "transpose"
    version = 2

    def takes(self, kernel: Kernel, target: Target) -> TransposeAnalysis | None:
        """Return the analysis of an elementwise stage with a read that is contiguous along another axis."""
        stage, *others = kernel.stages
        if others or stage.is_reduction:
            return None
        stage = _with_blocks_apart(stage)
        if any(branches_on(stage.value, axis) for axis in stage.spatial):
            return None
        every = group_axes(stage.spatial, [stage])
        if not every or not _long(every[-1]):
            return None
        groups, along = every[:-1], every[-1]
        for across in reversed(groups):
            turned = tuple(
                read for read in stage.loads() if _is_strided(read, along) and step(read, across) == Step.UNIT
            )
            if turned and _long(across):
                outer = tuple(group for group in groups if group is not across)
                return TransposeAnalysis(stage, outer, across, along, turned, kernel.division)
        return None

    def space(self, target: Target, analysis: TransposeAnalysis) -> Space:
        """Return the side of a tile, and how many of them side by side one task reads on its way along the output."""
        side = _side(analysis.turned, target)
        tiles = 2 if _fills_registers(analysis.turned, side, target) else 1
        candidates = (side // 2, side, 2 * side)
        if _pays_by_lines(analysis, side, target):
            return (Choice("side", 2 * side, candidates), Choice("tiles", BLOCKS_OF_PAGE, (1, 2, 4, 8)))
        return (Choice("side", side, candidates), Choice("tiles", tiles, (1, 2, 4, 8)))

    def apply(self, analysis: TransposeAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        side = parameters["side"]
        strip = side * parameters["tiles"]
        across, along = int(analysis.across.extent), int(analysis.along.extent)
        outer = [group.extent for group in analysis.outer]

        strips = max(1, across // strip)
        tasks = product([*outer, strips])
        # Without a task for each core the other axis is divided, too.
        parts = 1
        if isinstance(tasks, int) and tasks < target.cores:
            parts = max(1, min(along // side, TASKS_PER_CORE * target.cores // tasks))
        by_image = analysis.division is Division.IMAGE and as_int(analysis.stage.output.shape[0]) == 1

        def task(number: Expr) -> Stmt:
            if by_image:
                position, *outside, part = unflatten(number, [strips, *outer, parts])
            else:
                *outside, position, part = unflatten(number, [*outer, strips, parts])
            point: dict[Var, Expr] = {}
            for group, value in zip(analysis.outer, outside, strict=True):
                point.update(group.point(value))

            def strip_of(start: Expr, rows: int) -> Stmt:
                def column_of(column: Expr, columns: int) -> Stmt:
                    return _overlapping(
                        start,
                        rows,
                        side,
                        lambda row, count: _tile(analysis, point, (row, count), (column, columns), target),
                    )

                return _part_of(along, side, part, parts, column_of)

            # The last strip has the rest as well: what overlaps is of one task.
            last = across - (strips - 1) * strip
            if last == strip:
                return strip_of(position * strip, strip)
            if strips == 1:
                return strip_of(index(0), last)
            start = position * strip
            return tirx.IfThenElse(position < strips - 1, strip_of(start, strip), strip_of(start, last))

        return parallel(product([tasks, parts]), task, is_large(work_of(analysis.stage)))


def _with_blocks_apart(stage: Stage) -> Stage:
    """Return `stage` with each axis that is read in blocks, by axis // b and axis % b, as two axes, and these, too."""
    for axis in stage.spatial:
        size = _block_size(stage.loads(), axis)
        if isinstance(axis.extent, int) and size > 1 and axis.extent % size == 0:
            return _with_blocks_apart(_with_two_axes(stage, axis, axis.extent // size, size))
    return stage


def _with_two_axes(stage: Stage, axis: Axis, count: int, size: int) -> Stage:
    """Return `stage` with `axis` as two: `count` blocks of `size` members."""
    parts = [Axis(Var("block", axis.variable.ty), count), Axis(Var("member", axis.variable.ty), size)]
    place = parts[0].variable * size + parts[1].variable
    analyzer = sym.Analyzer()
    for own, extent in zip(parts, (count, size), strict=True):
        analyzer.bind(own.variable, Range(tirx.const(0, own.variable.ty), tirx.const(extent, own.variable.ty)))
    indices, value = stage.at({axis.variable: place})

    def simplified(read: TensorLoad) -> Expr:
        return load(read.source, [analyzer.simplify(each) for each in read.indices])

    spatial = tuple(part for each in stage.spatial for part in (parts if each is axis else [each]))
    return replace(stage, indices=indices, value=replace_loads(value, simplified), spatial=spatial)


def _block_size(reads: Sequence[TensorLoad], axis: Axis) -> int:
    """Return the largest b of which reads have a remainder axis % b, 0 where there is none."""
    sizes: set[int] = set()

    def note(remainder: tirx.FloorMod) -> None:
        if remainder.a.same_as(axis.variable):
            sizes.add(as_int(remainder.b) or 0)

    for read in reads:
        for position in read.indices:
            tvm_ffi.structural_walk(position, (tirx.FloorMod, note))
    return max(sizes, default=0)


def _overlapping(start: Expr, extent: int, side: int, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return tiles of `side` over `extent` positions from `start`; where a rest is left the last one begins earlier."""
    if extent < side:
        return body(start, extent)
    statements = [loop(extent // side, lambda number: body(start + number * side, side))]
    if extent % side:
        statements.append(body(start + (extent - side), side))
    return sequence(statements)


def _part_of(extent: int, side: int, part: Expr, parts: int, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return one of so many parts of the tiles of `_overlapping` from 0 on; the last part has the tile of the rest."""
    if parts == 1:
        return _overlapping(index(0), extent, side, body)
    whole = extent // side
    count = -(-whole // parts)
    first = part * count
    tiles = loop(tirx.min(index(count), whole - first), lambda number: body((first + number) * side, side))
    if not extent % side:
        return tiles
    return sequence([tiles, tirx.IfThenElse(part == parts - 1, body(index(extent - side), side), None)])


def _is_strided(read: TensorLoad, along: AxisGroup) -> bool:
    """Return whether steps along a group are strides, those of an index with an upper bound included."""
    unbounded = [at.a if isinstance(at, tirx.Min) and isinstance(at.b, tirx.IntImm) else at for at in read.indices]
    return step(tirx.BufferLoad(read.source, unbounded), along) == Step.STRIDED


def _long(group: AxisGroup) -> bool:
    return isinstance(group.extent, int) and (group.extent == PAIR or group.extent >= SHORTEST_AXIS)


def _tile(
    analysis: TransposeAnalysis,
    point: dict[Var, Expr],
    across: tuple[Expr, int],
    along: tuple[Expr, int],
    target: Target,
) -> Stmt:
    """Return one tile; `across` and `along` are offset and count on the two axes."""
    rows, columns = across[1], along[1]
    stage = analysis.stage
    buffers = [local([columns * rows], str(read.source.dtype), "turned") for read in analysis.turned]

    is_square = rows == columns
    is_shuffled = not any(str(buffer.dtype) == "bool" for buffer in buffers)
    side = _side(analysis.turned, target)
    by_quarters = is_square and rows == 2 * side and _has_quarters(analysis.turned, side, target)
    in_registers = by_quarters or (is_shuffled and _is_registers(rows, columns, side))

    def at(r: Expr, c: Expr) -> dict[Var, Expr]:
        return {**point, **analysis.across.point(across[0] + r), **analysis.along.point(along[0] + c)}

    def fill(buffer: Var, read: TensorLoad) -> Stmt:
        return (unrolled if in_registers else loop)(
            columns,
            lambda c: vector(rows, lambda r: store(buffer, substitute(read, at(r, c)), [c * rows + r])),
        )

    def element(r: Expr, c: Expr) -> Stmt:
        value = _reading(stage.value, analysis.turned, buffers, r * columns + c if in_registers else c * rows + r)
        values = at(r, c)
        return store(stage.output, substitute(value, values), [substitute(i, values) for i in stage.indices])

    copies = [fill(buffer, read) for buffer, read in zip(buffers, analysis.turned, strict=True)]
    each_row = unrolled if in_registers else loop
    loaded = list(buffers)
    if by_quarters:
        buffers = [local([columns * rows], str(buffer.dtype), "rows") for buffer in loaded]
        turned = [turn_by_quarters(own, new, side) for own, new in zip(loaded, buffers, strict=True)]
        loaded += buffers
    else:
        turned = [_turned(each, rows, columns) for each in buffers] if in_registers else []
    turns = [turn for each in turned for turn in each]
    # What short rows read lies together, and parts of lines come with the parts before them.
    is_far = in_registers and is_square and _fills_registers(analysis.turned, rows, target)
    ahead = _ahead(analysis, lambda r, c: at(r, c + _tiles_ahead(target) * columns), rows, target) if is_far else []
    together = _rows_of_vector(analysis, columns, target) if in_registers else 1

    def several(group: Expr) -> Stmt:
        values = at(group * together, index(0))
        *before, last = [substitute(each, values) for each in stage.indices]

        def lane(v: Expr) -> Stmt:
            value = _reading(stage.value, analysis.turned, buffers, group * (together * columns) + v)
            return store(stage.output, value, [*before, last + v])

        return vector(together * columns, lane)

    if together > 1 and rows % together == 0:
        written = unrolled(rows // together, several)
    else:
        written = each_row(rows, lambda r: vector(columns, lambda c: element(r, c)))
    return with_local(loaded, [*copies, *ahead, *turns, written])


def _rows_of_vector(analysis: TransposeAnalysis, columns: int, target: Target) -> int:
    """Return how many rows of a result make one vector: short ones that follow each other, pairs or those rounded.

    The instruction that rounds a vector takes numbers below the normal ones for zero, as products in tile registers do.
    """
    stage, lanes = analysis.stage, target.vector_lanes(max(32, analysis.stage.output.dtype.bits))
    if str(stage.output.dtype) == BFLOAT16:
        if matrix_tiles(target, BFLOAT16, BFLOAT16) is None:
            return 1
    elif columns != PAIR:
        return 1
    if len(analysis.turned) != len(stage.loads()) or free_variables(stage) or columns != analysis.along.extent:
        return 1
    written = load(stage.output, list(stage.indices))
    apart = [stride_of(written, group) for group in (analysis.across, analysis.along)]
    follow = [None if each is None else as_int(each) for each in apart] == [columns, 1]
    return lanes // columns if follow and lanes % columns == 0 else 1


def _ahead(
    analysis: TransposeAnalysis, at: Callable[[Expr, Expr], dict[Var, Expr]], side: int, target: Target
) -> list[Stmt]:
    """Return requests for the lines of a tile of `side` rows whose elements `at` places, where they may be far away."""
    stage, zero = analysis.stage, index(0)
    # Of shorter rows the hardware sees what comes next.
    if int(analysis.along.extent) <= _tiles_ahead(target) * side:
        return []
    elements = work_of(stage)
    size = elements * stage.output.dtype.bits // 8 if isinstance(elements, int) else LAST_CACHE_BYTES
    if size <= target.caches.level2 // 2:
        return []

    def line(read: TensorLoad, values: dict[Var, Expr]) -> Stmt:
        return prefetch(substitute(read, values), SECOND_LEVEL)

    reads = [unrolled(side, lambda c, r=read: line(r, at(zero, c))) for read in analysis.turned]
    if size >= LAST_CACHE_BYTES:  # written past the caches
        return reads
    own = load(stage.output, stage.indices)
    return [*reads, unrolled(side, lambda r: line(own, at(r, zero)))]


def _tiles_ahead(target: Target) -> int:
    """Return how many tiles ahead lines are asked for."""
    return LINES_AHEAD if target.vector_bits == LINE_BITS else TILES_AHEAD


def _side(reads: Sequence[TensorLoad], target: Target) -> int:
    """Return the side of the tiles of elements, as wide as the widest one, that are turned in registers."""
    lanes = target.vector_lanes(max(read.source.dtype.bits for read in reads))
    return min(lanes, target.vector_registers // 2)  # one for each row, and as many for what is on its way


def _fills_registers(reads: Sequence[TensorLoad], side: int, target: Target) -> bool:
    """Return whether a tile's rows are whole registers: narrower ones are parts of a line."""
    return all(read.source.dtype.bits * side >= target.vector_bits for read in reads)


def _has_quarters(reads: Sequence[TensorLoad], side: int, target: Target) -> bool:
    """Return whether blocks of whole lines are turned by quarters: x86's registers are lines, or halves of them."""
    halves = all(2 * side * read.source.dtype.bits == LINE_BITS for read in reads)
    return target.architecture == "x86_64" and halves and _fills_registers(reads, side, target)


def _pays_by_lines(analysis: TransposeAnalysis, side: int, target: Target) -> bool:
    """Return whether lines are better read and written once and whole than by halves.

    That is where a cache has not kept a line when its other half's turn comes: rows that lie pages apart share its few
    places, and outputs beyond the last cache go past it.
    """
    stage = analysis.stage
    axes = (analysis.across, analysis.along)
    if not _has_quarters(analysis.turned, side, target) or any(int(axis.extent) < 2 * side for axis in axes):
        return False
    strides = [
        *(stride_of(read, analysis.along) for read in analysis.turned),
        stride_of(load(stage.output, list(stage.indices)), analysis.across),
    ]
    known = [0 if each is None else as_int(each) or 0 for each in strides]
    elements, size = work_of(stage), LINE_BYTES // (2 * side)
    beyond = [(each * size + LINE_BYTES) % PAGE_BYTES for each in known if each * size > PAGE_BYTES // 2]
    is_paged = any(each < 2 * LINE_BYTES for each in beyond)
    return is_paged or (isinstance(elements, int) and elements * size >= LAST_CACHE_BYTES)


def _is_registers(rows: int, columns: int, side: int) -> bool:
    """Return whether what a tile's rows or its columns lie in are vectors that can be shuffled."""
    powers = all(each & (each - 1) == 0 for each in (rows, columns))
    return max(rows, columns) == side and powers


def _turned(buffer: Var, rows: int, columns: int) -> list[Stmt]:
    """Return the transposition of a tile that lies by columns in registers."""
    if rows == columns:
        return turn_rows(buffer, rows)
    return turn_short_rows(buffer, rows, columns) if rows < columns else interleave_rows(buffer, columns, rows)


def _reading(value: Expr, reads: Sequence[TensorLoad], buffers: Sequence[Var], position: Expr) -> Expr:
    """Return `value` with `reads` replaced by the buffers' elements at `position`."""

    def rewrite(read: TensorLoad) -> Expr | None:
        return next(
            (load(buffer, [position]) for own, buffer in zip(reads, buffers, strict=True) if own.same_as(read)), None
        )

    return replace_loads(value, rewrite)
