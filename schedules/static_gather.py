"""Rows whose elements are picked from other rows at places that are known: resizing, strided slices, reversals.

What a vector of the output reads lies close together. It is loaded as neighbours, and shuffled into place; where the
places are not known to the compiler, or far apart, each lane would be loaded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup, Step, as_int, group_axes, occurs
from schedules.family import Choice, Kernel, Parameters, Space, parallel_if_large, vector_width, work_of
from schedules.loops import index, load, local, loop, product, store, unflatten, vector, with_local
from schedules.matmul import branches_on_any, step
from schedules.stages import Stage, loads_of, replace_loads, sequence, simplify_indices, substitute, variables_of
from targets.base import Target

# As far apart, in registers, may the first and the last element of a vector be; a shuffle of more is a long one.
MOST_REGISTERS = 4
# The longest row, and the most shuffles that are written out for one.
LONGEST_ROW = 4096
MOST_SHUFFLES = 256
TYPES = ("float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")

Places = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class StaticGatherAnalysis:
    """A stage whose `reads` are at `places` of their rows, one for each position on the output's `last` axis."""

    stage: Stage
    outer: tuple[AxisGroup, ...]
    last: AxisGroup
    reads: tuple[TensorLoad, ...]
    places: tuple[Places, ...]


@dataclass(frozen=True)
class _Pick:
    """A load of `width` neighbours from `start` on, and which of them each lane takes."""

    start: int
    width: int
    lanes: Places


@dataclass
class _Run:
    """Vectors of `width` elements from `start` on, `count` of them; from one to the next each pick moves by `steps`."""

    start: int
    width: int
    picks: tuple[_Pick, ...]
    count: int = 1
    steps: Places = ()


class StaticGather:
    """Outer axes in parallel, vectors along the last one, put together from loads of neighbours."""

    name = "static-gather"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> StaticGatherAnalysis | None:
        """Return the analysis of an elementwise stage that reads along its last axis, but not one after the other."""
        stage, *others = kernel.stages
        if others or stage.is_reduction or branches_on_any(stage):
            return None
        groups = group_axes(stage.spatial, [stage])
        if not groups or len(groups[-1].axes) != 1:
            return None
        *outer, last = groups
        if not isinstance(last.extent, int) or last.extent > LONGEST_ROW:
            return None
        reads = [read for read in stage.loads() if step(read, last) not in (Step.NONE, Step.UNIT)]
        places = [_places(read, last) for read in reads]
        known = tuple(each for each in places if each is not None)
        if not reads or len(known) < len(reads):
            return None
        analysis = StaticGatherAnalysis(stage, tuple(outer), last, tuple(reads), known)
        runs = _runs(analysis, vector_width(target, stage))
        return analysis if runs is not None and len(runs) * len(reads) <= MOST_SHUFFLES else None

    def space(self, target: Target, analysis: StaticGatherAnalysis) -> Space:
        """Return the vectors' width."""
        lanes = vector_width(target, analysis.stage)
        return (Choice("lanes", lanes, (lanes // 2, lanes)),)

    def apply(self, analysis: StaticGatherAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest."""
        runs = _runs(analysis, parameters["lanes"])
        assert runs is not None
        extents = [group.extent for group in analysis.outer]

        def row(number: Expr) -> Stmt:
            point: dict[Var, Expr] = {}
            for group, position in zip(analysis.outer, unflatten(number, extents) if extents else [], strict=True):
                point.update(group.point(position))
            return sequence([loop(run.count, lambda i, run=run: _vector(analysis, run, i, point)) for run in runs])

        return parallel_if_large(product(extents), work_of(analysis.stage), row)


def _places(read: TensorLoad, last: AxisGroup) -> Places | None:
    """Return where in its row `read` is for each position on the last axis, None where that is not known."""
    variable, position = last.inner.variable, read.indices[-1]
    length = as_int(read.source.shape[-1])
    if str(read.source.dtype) not in TYPES or length is None or loads_of(position):
        return None
    if any(occurs(other, variable) for other in list(read.indices)[:-1]):
        return None
    if any(not other.same_as(variable) for other in variables_of(position)):
        return None
    points = [substitute(position, {variable: index(x)}) for x in range(int(last.extent))]
    places = [as_int(place) for place in simplify_indices(points)]
    known = tuple(place for place in places if place is not None and 0 <= place < length)
    return known if len(known) == len(places) else None


def _runs(analysis: StaticGatherAnalysis, lanes: int) -> list[_Run] | None:
    """Return the row as runs of vectors whose lanes are picked alike, None where elements are too far apart."""
    extent = int(analysis.last.extent)
    width = min(lanes, extent)
    whole = extent // width * width
    runs: list[_Run] = []
    for start in [*range(0, whole, width), *([extent - width] if whole < extent else [])]:
        picks = []
        for read, places in zip(analysis.reads, analysis.places, strict=True):
            pick = _pick(places[start : start + width], int(read.source.shape[-1]), MOST_REGISTERS * lanes)
            if pick is None:
                return None
            picks.append(pick)
        if not (runs and _continues(runs[-1], start, picks)):
            runs.append(_Run(start, width, tuple(picks)))
    return runs


def _pick(places: Places, length: int, most: int) -> _Pick | None:
    first = min(places)
    reach = max(places) - first + 1
    width = min(length, max(len(places), 1 << (reach - 1).bit_length())) if reach > 1 else 1
    if width > most:
        return None
    first = min(first, length - width)
    return _Pick(first, width, tuple(place - first for place in places))


def _continues(run: _Run, start: int, picks: Sequence[_Pick]) -> bool:
    """Make vectors from `start` on part of the run before them where they are picked like its own."""
    if start != run.start + run.count * run.width:
        return False
    if any(own.width != new.width or own.lanes != new.lanes for own, new in zip(run.picks, picks, strict=True)):
        return False
    moved = [new.start - own.start for own, new in zip(run.picks, picks, strict=True)]
    steps = tuple(moved) if run.count == 1 else run.steps
    if any(distance != run.count * each for distance, each in zip(moved, steps, strict=True)):
        return False
    run.steps, run.count = steps, run.count + 1
    return True


def _vector(analysis: StaticGatherAnalysis, run: _Run, number: Expr, point: dict[Var, Expr]) -> Stmt:
    """Return vector `number` of a run."""
    stage, axis = analysis.stage, analysis.last.inner
    buffers = [local([run.width], str(read.source.dtype), "picked") for read in analysis.reads]
    lane = tirx.Ramp(index(0), index(1), run.width) if run.width > 1 else index(0)
    steps = run.steps or (0,) * len(run.picks)
    loaded: list[Stmt] = []
    for read, buffer, pick, moved in zip(analysis.reads, buffers, run.picks, steps, strict=True):
        *outside, _ = [substitute(position, point) for position in read.indices]
        place = number * moved + pick.start
        if pick.width == 1:
            picked = load(read.source, [*outside, place])
            loaded.append(store(buffer, tirx.Broadcast(picked, run.width) if run.width > 1 else picked, [lane]))
            continue
        neighbours = load(read.source, [*outside, tirx.Ramp(place, index(1), pick.width)])
        repeated = [neighbours] * -(-run.width // pick.width)  # a shuffle has no more lanes than what it is of
        loaded.append(store(buffer, tirx.Shuffle(repeated, [tirx.IntImm("int32", p) for p in pick.lanes]), [lane]))

    def element(v: Expr) -> Stmt:
        def in_place(read: TensorLoad) -> Expr | None:
            return next(
                (load(b, [v]) for own, b in zip(analysis.reads, buffers, strict=True) if own.same_as(read)), None
            )

        values = {**point, axis.variable: number * run.width + run.start + v}
        value = substitute(replace_loads(stage.value, in_place), values)
        return store(stage.output, value, [substitute(position, values) for position in stage.indices])

    return with_local(buffers, [*loaded, vector(run.width, element)])
