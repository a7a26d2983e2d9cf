"""A convolution and the depthwise one that alone reads it, in one launch: what is between stays in a core's caches.

A depthwise convolution computes a block of channels from the same block of what it reads. A task is some such blocks of
one image, or some rows of them: it computes the rows of the first convolution that its own reach into memory of its
own, then its own rows from there. Tasks of neighbouring rows both compute the rows that both reach.

Networks of inverted residuals widen an image by six, and narrow it again behind the depthwise convolution. The widest
of MobileNetV2, 38 MB for eight inputs, took 2.7 ms to write and 1.8 to read; both convolutions together take 1.7
(Granite Rapids, two threads).

Of bfloat16 the first convolution is computed in tile registers, and what is between is fp32: it is neither rounded nor
widened again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules import row_parts
from schedules.access import Axis, AxisGroup, as_int
from schedules.channel_windows import ChannelWindow, ChannelWindows, windows_of
from schedules.convolution_tile import column_extent, parts_rows_of_taps, register_tile
from schedules.direct_convolution import DirectConvolution, Emitter, emitter
from schedules.division import even_parts
from schedules.family import Choice, Kernel, Parameters, Space, is_large, work_of
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.load_fence import with_fences
from schedules.loops import index, load, local, loop, parallel, product, tile_choice, unflatten, with_local
from schedules.matrix_convolution import MatrixConvolution
from schedules.matrix_task import MatrixTask
from schedules.matrix_windows import MatrixWindows
from schedules.stages import Stage, StagedFunction, at_other_places, contains, loads_of, sequence, with_value
from targets.base import Target

# Batch, block of channels, row, column, channel of the block.
DIMENSIONS = 5
ELEMENT, ELEMENT_BYTES = "float32", 4
# The part of the second-level cache for a task's rows between the convolutions, beside what it reads and writes.
CACHE_PART = 4
# In tile registers, the part of it for as many blocks of channels as a task has, where there are so many tasks a core:
# with one or two blocks 96->576 at 14x14 takes 198 us, 174 with six; one image of 160->960 at 7x7 16.3 with six, 13.4
# with one (Granite Rapids).
TILES_PART, LEAST_TASKS = 8, 2
# The part of a target's cores that wait for the last task.
WAITING_PART = 4
# Of so many rows between the convolutions at most one is computed twice: with one of 7 MobileNetV2's images of 56 rows
# took 7 % longer than with two kernels, EfficientNet-B0 with one input 3 % (Granite Rapids).
ROWS_OF_ONE_TWICE = 8


@dataclass(frozen=True, eq=False)
class ChainedKernel(Kernel):
    """A convolution and a depthwise one that reads its result, in order of execution."""

    parts: tuple[Kernel, ...] = ()


@dataclass(frozen=True, eq=False)
class ChannelChainAnalysis:
    """Both convolutions; `between` is the buffer that the first one writes, `window` the second one's rows.

    `rows` is how many rows the result has. `tiles` is the first convolution where it is computed in tile registers.
    """

    first: ChannelWindows
    second: ChannelWindows
    between: Var
    window: ChannelWindow
    rows: int
    tiles: MatrixWindows | None = None

    @property
    def images(self) -> int:
        """The number of images."""
        return _known(self.between.shape[0])

    @property
    def blocks(self) -> int:
        """The number of blocks of channels."""
        return _known(self.between.shape[1])

    def reach(self, rows: int) -> int:
        """Return how many rows between the convolutions, or beyond their border, `rows` rows of the result reach."""
        window = self.window
        return (rows - 1) * window.stride + (_known(index(window.tap.extent)) - 1) * window.dilation + 1

    def reached(self, rows: int) -> int:
        """Return how many rows between the convolutions `rows` rows of the result reach at most."""
        return min(self.reach(rows), self.window.extent)


class ChannelChain:
    """A convolution and the depthwise one behind it, some blocks of channels after the others."""

    name = "channel-chain"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ChannelChainAnalysis | None:
        """Return the analysis of two such convolutions of images of known size, in fp32 or in tile registers.

        Only of cores that begin two multiply-adds a cycle is it known that they gain.
        """
        if not isinstance(kernel, ChainedKernel) or target.multiply_adds == 1:
            return None
        chain = _in_tiles(kernel, target) or _in_registers(kernel, target)
        if chain is None:
            return None
        tasks = -(-chain.rows // _rows_of_task(chain, target, _tile(chain, target)[0]))
        twice = tasks * chain.reached(-(-chain.rows // tasks)) - chain.window.extent
        return chain if twice * ROWS_OF_ONE_TWICE < chain.window.extent else None

    def space(self, target: Target, analysis: ChannelChainAnalysis) -> Space:
        """Return the register tiles of both, and the rows of the result that make one task."""
        blocks, columns = _tile(analysis, target)
        rows = _rows_of_task(analysis, target, blocks)
        return (
            Choice("blocks", blocks, (1, 2, 3, 4, 6)),
            Choice("columns", columns, (4, 6, 7, 9, 14, 28)),
            Choice("last_columns", register_tile(analysis.second, target)[1], (4, 7, 9, 14)),
            Choice("rows", rows, (4, 7, 8, 14, 16, 28, 56)),
        )

    def apply(self, analysis: ChannelChainAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the parallel loop over images, blocks of channels and runs of rows."""
        statement = _Chain(analysis, parameters, target).statement()
        if analysis.tiles is not None:
            return analysis.tiles.tiles.imported(statement)
        return with_fences(statement, target) if parts_rows_of_taps(analysis.first, target) else statement


@functools.lru_cache(maxsize=1024)
def whole(staged: StagedFunction) -> ChainedKernel | None:
    """Return a function of two reductions, the second of what the first one makes, as one kernel; None otherwise."""
    stages = [stage for stage in staged.stages if isinstance(stage, Stage)]
    reductions = [position for position, stage in enumerate(stages) if stage.is_reduction]
    if len(stages) != len(staged.stages) or len(reductions) != 2:
        return None
    first, second = reductions
    if any(len(stages[position].output.shape) != DIMENSIONS for position in reductions):
        return None
    for end in range(second, first, -1):
        before, after = stages[:end], stages[end:]
        between = before[-1].output
        if not contains(staged.intermediate, between) or not _reads_alone(after, before, between):
            continue
        one = row_parts.kernel_of(staged, before)
        other = None if one is None else row_parts.kernel_of(staged, after)
        if one is not None and other is not None:
            return ChainedKernel((*one.stages, *other.stages), (between,), parts=(one, other))
    return None


def _reads_alone(stages: Sequence[Stage], before: Sequence[Stage], between: Var) -> bool:
    """Return whether `stages` read of what the stages before them make `between` alone."""
    made = [stage.output for stage in before if not stage.output.same_as(between)]
    return not any(contains(made, read.source) for stage in stages for read in stage.loads())


def _in_registers(kernel: ChainedKernel, target: Target) -> ChannelChainAnalysis | None:
    """Return the analysis of two convolutions in fp32."""
    first, second = (_windows(part, target) for part in kernel.parts)
    if first is None or second is None or any(_types(each) != {ELEMENT} for each in (first, second)):
        return None
    if first.channel is None:
        return None  # The first one may be a depthwise one, too.
    return _chain(first, second)


def _in_tiles(kernel: ChainedKernel, target: Target) -> ChannelChainAnalysis | None:
    """Return the analysis of a convolution of bfloat16 in tile registers and a depthwise one, in fp32 between them."""
    tiles = MatrixConvolution().takes(kernel.parts[0], target)
    second = _windows(kernel.parts[1], target)
    if tiles is None or second is None or not _is_blocked_image(tiles.windows) or _types(tiles.windows) != {BFLOAT16}:
        return None
    both = _unrounded(tiles.windows, second)
    chain = None if both is None else _chain(*both)
    return None if chain is None else replace(chain, tiles=replace(tiles, windows=chain.first))


def _windows(part: Kernel, target: Target) -> ChannelWindows | None:
    """Return the analysis of a convolution of images of known size that it stores in blocks of channels."""
    windows = DirectConvolution().takes(part, target)
    return windows if windows is not None and windows.columns is not None and _is_blocked_image(windows) else None


def _types(windows: ChannelWindows) -> set[str]:
    """Return the types of a convolution's operands and of its result."""
    return {str(each.dtype) for each in (windows.data.source, windows.weights.source, windows.epilogue.stage.output)}


def _unrounded(first: ChannelWindows, second: ChannelWindows) -> tuple[ChannelWindows, ChannelWindows] | None:
    """Return two convolutions, of which one rounds its result to bfloat16 and one widens it, with fp32 in its place."""
    epilogue, between = first.epilogue, first.epilogue.stage.output
    value = epilogue.value
    if epilogue.stage is epilogue.source or not isinstance(value, tirx.Cast) or str(value.value.ty.dtype) != ELEMENT:
        return None
    wide = tirx.decl_buffer(between.shape, ELEMENT, between.name)
    data = load(wide, list(second.data.indices))

    def widened(cast: tirx.Cast, mutator: tvm_ffi.StructuralMutator) -> Expr:
        is_data = isinstance(cast.value, TensorLoad) and cast.value.same_as(second.data)
        return data if is_data and str(cast.ty.dtype) == ELEMENT else mutator.default_mutate(cast)

    stage = with_value(second.stage, tvm_ffi.structural_mutate(second.stage.value, (tirx.Cast, widened)))
    reads = [*stage.loads(), *loads_of(second.epilogue.value)]
    if any(read.source.same_as(between) for read in reads):
        return None
    written = replace(epilogue, stage=replace(epilogue.stage, output=wide), value=value.value)
    return replace(first, epilogue=written), replace(second, stage=stage, data=data)


def _is_blocked_image(windows: ChannelWindows) -> bool:
    """Return whether a result of two operands, of known size, lies as [batch, block, row, column, channel].

    Each index is an axis or the only position.
    """
    if len(windows.stage.loads()) != 2 or any(as_int(extent) is None for extent in windows.epilogue.stage.output.shape):
        return False
    axes, indices = [axis.variable for axis in windows.stage.spatial], windows.epilogue.indices
    known = [contains(axes, each) if isinstance(each, Var) else as_int(each) == 0 for each in indices]
    return len(indices) == DIMENSIONS and all(known)


def _chain(first: ChannelWindows, second: ChannelWindows) -> ChannelChainAnalysis | None:
    """Return the analysis of a convolution of all channels, and one of each of the channels that it makes."""
    between, image = first.epilogue.stage.output, second.epilogue.indices
    channel = first.channel
    if second.channel is not None or (channel is not None and first.per_group != channel.extent):
        return None
    reads = [read for value in (second.stage.value, second.epilogue.value) for read in loads_of(value)]
    if sum(read.source.same_as(between) for read in reads) != 1 or not second.data.source.same_as(between):
        return None
    position = first.epilogue.indices[1]
    own_blocks = as_int(position) == 0 if channel is None else position.same_as(channel.variable)
    own_blocks &= second.block == first.block
    if not own_blocks or not all(map(_is_same, second.data.indices[:2], image[:2])):
        return None
    windows = windows_of(second.stage, second.data) or ()
    rows = next((axis for axis in second.stage.spatial if axis.variable.same_as(image[2])), None)
    window = next((each for each in windows if each.axis is not None and each.axis is rows), None)
    columns = second.columns
    if window is None or columns is None or len(columns.axes) > 1 or not columns.inner.variable.same_as(image[3]):
        return None
    return ChannelChainAnalysis(first, second, between, window, _known(second.epilogue.stage.output.shape[2]))


def _is_same(left: Expr, right: Expr) -> bool:
    """Return whether two positions are one axis, or both the only one."""
    return left.same_as(right) or (as_int(left) == 0 and as_int(right) == 0)


def _known(extent: Expr) -> int:
    size = as_int(extent)
    assert size is not None
    return size


def _tile(analysis: ChannelChainAnalysis, target: Target) -> tuple[int, int]:
    """Return the blocks of channels of a task, and the columns of a register tile of the first convolution."""
    if analysis.tiles is None:
        return register_tile(analysis.first, target)
    image = math.prod(_known(extent) for extent in analysis.between.shape[2:]) * ELEMENT_BYTES
    some = analysis.images * analysis.blocks // (target.cores * LEAST_TASKS)
    return even_parts(analysis.blocks, max(1, min(some, target.caches.level2 // TILES_PART // image))), 1


def _rows_of_task(analysis: ChannelChainAnalysis, target: Target, blocks: int) -> int:
    """Return the rows of the result with which cores are done first.

    Fewer rows leave less to wait for at the end, and more rows between the convolutions are computed twice.
    """
    total = analysis.rows
    row_bytes = blocks * _known(analysis.between.shape[3]) * analysis.first.block * ELEMENT_BYTES
    if analysis.tiles is not None and analysis.tiles.copies:
        row_bytes += analysis.tiles.bytes_of_row
    tiles = analysis.images * -(-analysis.blocks // blocks)

    def reached(parts: int) -> int:
        return analysis.reached(-(-total // parts))

    def duration(parts: int) -> int:
        return reached(parts) * (tiles * parts + target.cores // WAITING_PART)

    most = target.caches.level2 // CACHE_PART
    fitting = [parts for parts in range(1, total + 1) if reached(parts) * row_bytes <= most]
    return -(-total // min(fitting, key=duration, default=total))


@dataclass(frozen=True)
class _Chain:
    """Emission of both convolutions under given parameters."""

    analysis: ChannelChainAnalysis
    parameters: Parameters
    target: Target

    def statement(self) -> Stmt:
        """Return the parallel loop."""
        analysis = self.analysis
        blocks, rows = min(self.parameters["blocks"], analysis.blocks), min(self.parameters["rows"], analysis.rows)
        extents = [analysis.images, -(-analysis.blocks // blocks), -(-analysis.rows // rows)]

        def task(number: Expr) -> Stmt:
            image, tile, part = unflatten(number, extents)

            def some_rows(block: Expr, count: int) -> Stmt:
                return tile_choice(
                    part, analysis.rows, rows, lambda row, height: self._task(image, (block, count), (row, height))
                )

            return tile_choice(tile, analysis.blocks, blocks, some_rows)

        return parallel(product(extents), task, is_large(work_of(analysis.first.stage)))

    def _task(self, image: Expr, blocks: tuple[Expr, int], rows: tuple[Expr, int]) -> Stmt:
        """Return some blocks of channels of an image, and some rows of the result, each from one on."""
        window, between = self.analysis.window, self.analysis.between
        (block, count), (row, height) = blocks, rows
        kept = local([count, self.analysis.reached(height), *between.shape[3:]], ELEMENT, "between")
        first = row * window.stride + window.offset
        start, end = tirx.max(index(0), first), tirx.min(index(window.extent), first + self.analysis.reach(height))
        if self.analysis.tiles is None:
            made = self._first(image, blocks, start, end)
        else:
            # As many rows everywhere, at a border one or two that nobody reads.
            reached = self.analysis.reached(height)
            start = tirx.min(start, index(window.extent - reached))
            made = self._first_in_tiles(self.analysis.tiles, image, blocks, (start, reached))
        both = sequence([made, self._second(image, blocks, rows)])
        return with_local([kept], [_moved(both, between, kept, (block, start))])

    def _first_in_tiles(
        self, tiles: MatrixWindows, image: Expr, blocks: tuple[Expr, int], rows: tuple[Expr, int]
    ) -> Stmt:
        """Return some rows between the convolutions, from one on, computed in tile registers."""
        (block, count), (row, height) = blocks, rows
        point = {axis.variable: image for axis in tiles.images}
        width = 1 if tiles.copies else tiles.horizontal.outputs
        return MatrixTask(tiles, point, row * width, height * width, count, self.target.caches, False).of(block)

    def _first(self, image: Expr, blocks: tuple[Expr, int], start: Expr, end: Expr) -> Stmt:
        """Return the rows from `start` to `end` between the convolutions."""
        windows = self.analysis.first
        batch, _, row, column, _ = windows.epilogue.indices
        point = {batch: image} if isinstance(batch, Var) else {}
        rows, columns = (_axes(windows, each) for each in (row, column))
        is_all = as_int(start) == 0 and as_int(end) == self.analysis.window.extent
        if is_all and windows.columns is not None and set(rows) <= set(windows.columns.axes):
            return self._emitter(windows, "columns").row(point, index(0), *blocks)
        tiles = self._emitter(replace(windows, columns=AxisGroup(columns) if columns else None), "columns")

        def of_row(number: Expr) -> Stmt:
            return tiles.row({**point, **{axis.variable: start + number for axis in rows}}, index(0), *blocks)

        return loop(end - start, of_row)

    def _second(self, image: Expr, blocks: tuple[Expr, int], rows: tuple[Expr, int]) -> Stmt:
        """Return rows of the result."""
        windows = self.analysis.second
        batch, channel, own_row, _, _ = windows.epilogue.indices
        (block, count), (row, height) = blocks, rows
        tiles = self._emitter(windows, "last_columns")

        def of_row(number: Expr, line: Expr) -> Stmt:
            places = ((batch, image), (channel, block + number), (own_row, row + line))
            point = {axis: place for axis, place in places if isinstance(axis, Var)}
            return tiles.row(point, index(0), index(0), 1)

        return loop(count, lambda number: loop(height, lambda line: of_row(number, line)))

    def _emitter(self, windows: ChannelWindows, columns: str) -> Emitter:
        width = min(column_extent(windows), self.parameters[columns])
        return emitter(windows, {"blocks": self.parameters["blocks"], "columns": width}, self.target)


def _axes(windows: ChannelWindows, position: Expr) -> tuple[Axis, ...]:
    """Return the axis that is an index, none for the only position of a dimension."""
    return tuple(axis for axis in windows.stage.spatial if axis.variable.same_as(position))


def _moved(statement: Stmt, buffer: Var, kept: Var, start: tuple[Expr, Expr]) -> Stmt:
    """Return a statement with `kept` in the place of `buffer`, from a block of channels and a row of it on."""
    analyzer = sym.Analyzer()

    def place(source: Var, indices: Sequence[Expr]) -> tuple[Var, list[Expr]] | None:
        if not source.same_as(buffer):
            return None
        _, block, row, *rest = indices
        return kept, [analyzer.simplify(block - start[0]), analyzer.simplify(row - start[1]), *rest]

    return at_other_places(statement, place)
