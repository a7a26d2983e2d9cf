"""Functions of one element at a time: arithmetic, broadcasts, layout changes, concatenation, padding, gathers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, as_int, branches_on, group_axes
from schedules.by_turns import row_by_turns
from schedules.division import TASKS_PER_CORE, Division, even_parts
from schedules.family import Choice, Kernel, Parameters, Space, is_large, parallel_if_large, vector_width, work_of
from schedules.intrin.elementary_calls import calls_functions
from schedules.loops import (
    LINE_BITS,
    Extent,
    index,
    loop,
    parallel,
    product,
    quotient,
    remainder,
    store,
    tiles,
    unflatten,
    vector,
)
from schedules.segments import Segment, phases, segments
from schedules.stages import Stage, sequence
from targets.base import Target


@dataclass(frozen=True, eq=False)
class ElementwiseAnalysis:
    """The axes of an elementwise stage, grouped; the last group is the one that is vectorized."""

    stage: Stage
    groups: tuple[AxisGroup, ...]
    conditional: bool
    division: Division


class Elementwise:
    """Outer axes in parallel, the contiguous one in vectors."""

    name = "elementwise"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ElementwiseAnalysis | None:
        """Return the analysis of a single stage without reduction."""
        if len(kernel.stages) != 1 or kernel.stages[0].is_reduction:
            return None
        stage = kernel.stages[0]
        groups = tuple(group_axes(stage.spatial, [stage]))
        conditional = bool(groups) and branches_on(stage.value, groups[-1].inner)
        return ElementwiseAnalysis(stage, groups, conditional, kernel.division)

    def space(self, target: Target, analysis: ElementwiseAnalysis) -> Space:
        """Return the vectors' width and the length of a task on a single axis."""
        lanes = vector_width(target, analysis.stage)
        return (
            Choice("lanes", _default_lanes(analysis, target), (lanes, 2 * lanes, 4 * lanes)),
            Choice("chunk", 4096, (1024, 4096, 16384)),
        )

    def apply(self, analysis: ElementwiseAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        stage, groups, lanes = analysis.stage, analysis.groups, parameters["lanes"]

        def located(point: list[Expr], part: Stage) -> tuple[Sequence[Expr], Expr]:
            values = {}
            for group, position in zip(groups, point, strict=True):
                values.update(group.point(position))
            return part.at(values)

        def element(point: list[Expr], part: Stage = stage) -> Stmt:
            indices, value = located(point, part)
            return store(part.output, value, indices)

        def row(outer: list[Expr], start: Extent, extent: Extent) -> Stmt:
            if analysis.conditional:  # a vector condition would be taken apart into lanes; LLVM masks it
                return loop(extent, lambda i: element([*outer, start + i]))
            return overlapping_vectors(extent, lanes, lambda offset: element([*outer, start + offset]))

        is_parted = _is_parted(analysis)
        places = _places(analysis)

        def whole_row(outer: list[Expr]) -> Stmt:
            if places and isinstance(groups[-1].extent, int):
                return row_by_turns(places, lambda at, part: located([*outer, at], part), groups[-1].extent, lanes)
            parts = segments(stage, groups[-1].inner) if is_parted else []
            if not any(part.end - part.begin >= lanes and not part.conditional for part in parts):
                return row(outer, index(0), groups[-1].extent)
            return sequence([segment(outer, part) for part in parts])

        def segment(outer: list[Expr], part: Segment) -> Stmt:
            def at(offset: Expr) -> Stmt:
                return element([*outer, offset + part.begin], part.stage)

            extent = part.end - part.begin
            return loop(extent, at) if part.conditional else overlapping_vectors(extent, lanes, at)

        if not groups:
            return element([])
        work = product([axis.extent for axis in stage.spatial])
        outer_extents = [group.extent for group in groups[:-1]]
        inner = groups[-1].extent
        if analysis.division is Division.IMAGE and divides_image(analysis):
            return _by_image(analysis, TASKS_PER_CORE * target.cores, whole_row)
        if outer_extents:
            return parallel_if_large(
                product(outer_extents), work, lambda task: whole_row(unflatten(task, outer_extents))
            )
        chunk = parameters["chunk"] if is_large(work) else 0
        return split_row(inner, chunk, lambda start, extent: row([], start, extent))


def _default_lanes(analysis: ElementwiseAnalysis, target: Target) -> int:
    """Return a register's lanes; on x86 a line's, where rows have as many elements.

    Two registers of AVX2 have two chains of arithmetic, and what fills a line may be stored past the caches. Elementary
    functions are longer chains, whose latency four hide better: on a Zen 3's thread erf of 2**20 elements takes 645 us
    where it took 738, gelu 768 and 854.
    """
    lanes = vector_width(target, analysis.stage)
    extent = analysis.groups[-1].extent if analysis.groups else 1
    if target.architecture != "x86_64" or not isinstance(extent, int) or _places(analysis):
        return lanes
    line = lanes * max(1, LINE_BITS // target.vector_bits)
    lines = (2 * line, line) if target.has_few_registers and calls_functions(analysis.stage.value) else (line,)
    return next((width for width in lines if extent >= width), lanes)


def _is_parted(analysis: ElementwiseAnalysis) -> bool:
    """Return whether conditions may part the rows."""
    return analysis.conditional and len(analysis.groups[-1].axes) == 1


def _places(analysis: ElementwiseAnalysis) -> list[Stage]:
    """Return the stage at each place of a period by which elements of a row are computed in different ways."""
    return phases(analysis.stage, analysis.groups[-1].inner) if _is_parted(analysis) else []


def divides_image(analysis: ElementwiseAnalysis) -> bool:
    """Return whether the stage is of one image [1, C/block, spatial..., block] that can be divided by its parts."""
    shape = [as_int(extent) for extent in analysis.stage.output.shape]
    if len(analysis.groups) != len(("blocks", "image", "block")) or len(shape) <= len(analysis.groups):
        return False
    blocks, image, _ = (group.extent for group in analysis.groups)
    return isinstance(image, int) and shape[:2] == [1, blocks] and image == math.prod(each or 0 for each in shape[2:-1])


def _by_image(analysis: ElementwiseAnalysis, most_parts: int, row: Callable[[list[Expr]], Stmt]) -> Stmt:
    """Return all channels of parts of an image, one part after the other."""
    blocks, image, _ = (group.extent for group in analysis.groups)
    assert isinstance(image, int)
    parts = even_parts(image, most_parts)
    size = image // parts

    def task(number: Expr) -> Stmt:
        part, block = unflatten(number, [parts, blocks])
        return loop(size, lambda position: row([block, part * size + position]))

    return parallel(product([parts, blocks]), task, is_large(work_of(analysis.stage)))


def vector_tiles(extent: Extent, lanes: int, element: Callable[[Expr], Stmt]) -> Stmt:
    """Return vectors over [0, extent); a symbolic remainder is left to a scalar loop."""
    sizes = [lanes] if isinstance(extent, int) else [lanes, 1]
    return tiles(extent, sizes, lambda base, width: vector(width, lambda i: element(base + i)))


def overlapping_vectors(extent: Extent, lanes: int, element: Callable[[Expr], Stmt]) -> Stmt:
    """Return vectors over [0, extent); what they leave of a static extent is one that begins in the one before it.

    `element` must store the same whenever it is done. A vector of odd width would be taken apart into several.
    """
    return overlapping_tiles(extent, lanes, lambda base, width: vector(width, lambda i: element(base + i)))


def overlapping_tiles(extent: Extent, lanes: int, tile: Callable[[Expr, int], Stmt]) -> Stmt:
    """Return the same of tiles, of which `tile` gets the first position and how many there are."""
    rest = extent % lanes if isinstance(extent, int) else 0
    width = 1 << (rest - 1).bit_length() if rest else 0
    if not isinstance(extent, int) or not rest or width > extent:
        return tiles(extent, [lanes] if isinstance(extent, int) else [lanes, 1], tile)
    last = tile(index(extent - width), width)
    return sequence([tiles(extent - rest, [lanes], tile), last]) if extent > rest else last


def split_row(extent: Extent, chunk: int, row: Callable[[Expr, Extent], Stmt]) -> Stmt:
    """Return one long axis as parallel tasks of `chunk` elements and what remains after them (`chunk` 0: one task)."""
    zero = index(0)
    if not chunk:
        return row(zero, extent)
    count, rest = quotient(extent, chunk), remainder(extent, chunk)
    statements = []
    if not (isinstance(count, int) and count == 0):
        work = count * index(chunk) if not isinstance(count, int) else count * chunk
        statements.append(parallel_if_large(count, work, lambda task: row(task * chunk, chunk)))
    if not (isinstance(rest, int) and rest == 0):
        statements.append(row(index(0) + count * chunk, rest))
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
