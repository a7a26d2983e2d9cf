"""The register tile of a convolution over blocked channels, and how many of them make a task."""

from __future__ import annotations

import itertools
import math

from tvm.ir import Var

from schedules.access import as_int, linear_coefficient, occurs
from schedules.channel_windows import ChannelWindows
from schedules.division import TASKS_PER_CORE, Division, even_parts
from schedules.intrin.byte_dot import FOUR, FOURS, WORD
from schedules.loops import Extent, product
from targets.base import Target

MOST_BLOCKS, MOST_COLUMNS = 8, 28
# Weights of a row of taps that are worth a register each, where registers are few.
MOST_WEIGHTS = 8
# Lane by lane: the columns that a row of taps reaches beyond the tile, and its weights.
BORDER_OPERANDS = 4
# Cycles from one fused multiply-add to the next that reads its result, and how many of them start in one cycle.
LATENCY, THROUGHPUT = 4, 2
# Cycles from one element of the image that is loaded into all lanes to the next, where no instruction multiplies by it
# in memory: eight layers of 512 to 2048 channels and back at 7x7 take 5.9 ms with tiles of one block by 13 or 10
# columns, 4.6 with 2 by 6 or 3 by 4, 4.3 with 2 by 5 (Zen 3).
BROADCAST = 0.75
# Registers of products of words before they are added to sums, where multiply-adds need none.
PRODUCTS = 2
# Instructions of a step with words that take a cycle: tiles of 1 by 8, 2 by 4, 3 by 3, 2 by 5 and 6 by 2 took 6.2, 5.2,
# 5.8, 6.6 and 8.0 cycles (Zen 3).
WORD_INSTRUCTIONS = 4.5
# Loads of the image's elements that take as long as one of weights, as measured on tiles of 28 registers.
WEIGHT_COST = 5
# The same where weights are asked for ahead: of those that the second-level cache holds, and of others. A line of them
# takes so many cycles at least.
AHEAD_COST, FAR_COST, LINE_CYCLES = 1.5, 2.5, 3
# The part of the second-level cache for weights of tiles that read the same part of an image one after the other. A
# quarter is for their results, the rest for that part of the image.
WEIGHTS_PART = 2


def register_tile(analysis: ChannelWindows, target: Target) -> tuple[int, int]:
    """Return the blocks and columns of the tile that computes the output in the fewest cycles.

    A step of the tile takes as long as its multiply-adds, or the latency between two steps, and something for its
    loads. Weights count more: they come from further away than the image's elements, which other taps read again.
    """
    width = column_extent(analysis)
    most_blocks = min(MOST_BLOCKS, analysis.per_group) if analysis.channel is not None else 1
    words, broadcast = _reads_words(analysis), _broadcast_cycles(analysis, target)
    weights = _weight_loads(analysis, target)

    def cycles(tile: tuple[int, int]) -> float:
        blocks, columns = tile
        sizes = itertools.product(_tile_sizes(analysis.per_group, blocks), _tile_sizes(width, columns))
        return sum(
            count * of_columns * (_word_cycles(b, c) if words else _step_cycles(b, c, broadcast, weights))
            for (b, count), (c, of_columns) in sizes
        )

    candidates = []
    for blocks in range(1, most_blocks + 1):
        most = next((c for c in range(MOST_COLUMNS, 0, -1) if _fits(analysis, target, blocks, c)), 1)
        least = max(1, most // 2) if broadcast else most
        candidates.extend((blocks, -(-width // -(-width // columns))) for columns in range(most, least - 1, -1))
    return min(candidates, key=cycles)


def _weight_loads(analysis: ChannelWindows, target: Target) -> tuple[float, float]:
    """Return how many loads one of weights counts for, and the cycles that it takes at least.

    With 8 images tiles of 4 blocks by 6 columns, which load 10 times for 24 multiply-adds where those of 2 by 14 load
    16 times for 28, take 4 to 14 % less with 64 to 256 channels and 2 to 3 % less with 512 and 1024. Of 7x7 pixels they
    leave one, and take 4 to 5 % more with weights of 4 MiB (a core with two units of 512 bits).
    """
    if not asks_ahead(analysis, target):
        return WEIGHT_COST, 0
    return AHEAD_COST if bytes_of(analysis.weights.source) <= target.caches.level2 else FAR_COST, LINE_CYCLES


def asks_ahead(analysis: ChannelWindows, target: Target) -> bool:
    """Return whether a tile asks for the weights of later steps: where a core goes through one every few cycles.

    They lie in memory in the order of the channels of a block, each of which is loaded into all lanes.
    """
    data, lane = analysis.data, analysis.lane.variable
    by_channel = as_int(data.source.shape[-1]) == analysis.block
    by_channel &= not any(occurs(position, lane) for position in data.indices)
    is_product = len(analysis.stage.loads()) > 1 and analysis.terms == 1
    return target.multiply_adds > 1 and by_channel and is_product


def _broadcast_cycles(analysis: ChannelWindows, target: Target) -> float:
    """Return the cycles of a load of the image's element into all lanes, where it is an instruction; 0 elsewhere."""
    by_lane = occurs(analysis.data.indices[-1], analysis.lane.variable)
    multiplies_memory = target.architecture != "x86_64" or not target.has_few_registers
    return 0 if multiplies_memory or by_lane else BROADCAST


def task_shape(analysis: ChannelWindows, target: Target, blocks: int, columns: int) -> tuple[int, int]:
    """Return the rows and the tiles of columns of one task: as many as leave every core several tasks."""
    wanted = TASKS_PER_CORE * target.cores
    channel = analysis.channel
    tasks: Extent = product([group.extent for group in analysis.outer])
    if not isinstance(tasks, int):
        return 1, max(1, -(-column_extent(analysis) // columns))
    if channel is not None:
        assert isinstance(channel.extent, int)
        tasks *= channel.extent // analysis.per_group * -(-analysis.per_group // blocks)
    rows = analysis.outer[-1].extent if analysis.outer else 1
    assert isinstance(rows, int)
    column_tiles = -(-column_extent(analysis) // columns)
    is_narrow = target.has_few_registers or (blocks > 2 and asks_ahead(analysis, target))
    if tasks < wanted and is_narrow:
        # Narrow tiles are many, and often a prime number of them: no part has just what is left over.
        height, width = 1, -(-column_tiles // min(column_tiles, max(1, wanted // max(1, tasks))))
    elif tasks < wanted:
        height, width = 1, _even(column_tiles, max(1, column_tiles * tasks // wanted), analysis)
    else:
        height, width = _even(rows, max(1, min(rows, tasks // wanted)), analysis), column_tiles
    positions = _most_positions(analysis, target, blocks)
    if positions is None or height * width * columns <= positions:
        return height, width
    most = positions // columns
    height = even_parts(rows, max(1, min(height - 1, most // width)))
    if width <= most or analysis.column_window is not None:
        return height, width
    most = max(1, min(width - 1, most))
    if is_narrow:
        # Narrow tiles are many, and often a prime number of them.
        return height, -(-column_tiles // -(-column_tiles // most))
    return height, even_parts(column_tiles, most)


def _passes_in_parts(target: Target) -> bool:
    """Return whether a core may compute some tiles of channels of a part of an image before the next part.

    It was measured on cores that begin two multiply-adds a cycle: with AVX-512 and with AVX2.
    """
    return target.multiply_adds > 1 or target.has_few_registers


def _most_positions(analysis: ChannelWindows, target: Target, blocks: int) -> int | None:
    """Return of how many positions of an image one tile of channels is computed before the next one; None: of all.

    All tiles read the same part of the image, which is to stay in the second-level cache beside weights: where cores
    divide the image and the weights fit there, and where some tiles are computed together. In ResNet-50 with 8 images
    256 to 512 channels with stride 2 take 13 % less, 1024 to 512 at 14x14 5 % (Granite Rapids), 128 to 512 at 28x28 and
    64 to 256 at 56x56 with one 22 and 10 % (Zen 3 in AVX2).
    """
    reads_again = analysis.channel is not None and analysis.per_group > blocks and len(analysis.stage.loads()) > 1
    if not _passes_in_parts(target) or not reads_again:
        return None
    output = [*(group.extent for group in analysis.outer), column_extent(analysis)]
    positions = math.prod(extent for extent in output if isinstance(extent, int))
    weights, cache = bytes_of(analysis.weights.source), target.caches.level2
    if weights <= cache if analysis.division is Division.IMAGE else tiles_together(analysis, target, blocks) > 1:
        kept = cache * 3 // 4 - min(weights, cache // WEIGHTS_PART)
        return kept * positions // bytes_of(analysis.data.source)
    return None


def tiles_together(analysis: ChannelWindows, target: Target, blocks: int) -> int:
    """Return how many tiles of channels are computed of a part of the image before those of the next part.

    Where cores divide channels whose weights exceed the second-level cache, as many tiles as it can keep the weights
    of: all images pass by once for so many, not for each. With 8 images of 7x7 2048 to 512 channels take 13 % less
    (Granite Rapids). Where registers are few, tiles read an image oftener: there it is enough that the images exceed
    the cache.
    """
    channel, cache = analysis.channel, target.caches.level2
    is_divided = analysis.division is Division.IMAGE
    if not _passes_in_parts(target) or is_divided or channel is None or len(analysis.stage.loads()) < 2:
        return 1
    weights, tiles = bytes_of(analysis.weights.source), -(-analysis.per_group // blocks)
    images = bytes_of(analysis.data.source) if target.has_few_registers else 0
    if max(weights, images) <= cache:
        return 1
    groups = _static(channel.extent) // analysis.per_group
    most = cache // WEIGHTS_PART * tiles * groups // weights
    return even_parts(tiles, max(1, most))


def _static(extent: Extent) -> int:
    assert isinstance(extent, int)
    return extent


def _even(total: int, wanted: int, analysis: ChannelWindows) -> int:
    """Return about `wanted` of `total` rows or tiles a task; where cores divide an image, its parts are of one size."""
    if analysis.division is not Division.IMAGE:
        return wanted
    near = range(wanted + wanted // 2, (wanted - 1) // 2, -1)
    return next((each for each in near if total % each == 0), wanted)


def bytes_of(buffer: Var) -> int:
    """Return the size of a buffer, in which extents that are not static count as one."""
    return math.prod(as_int(extent) or 1 for extent in buffer.shape) * buffer.dtype.bits // 8


def column_extent(analysis: ChannelWindows) -> int:
    """Return how many neighbouring columns there are."""
    extent = analysis.columns.extent if analysis.columns is not None else 1
    assert isinstance(extent, int)
    return extent


def most_columns(target: Target, blocks: int, *, words: bool = False) -> int:
    """Return the most columns of a tile of `blocks` that multiplies vectors of weights by single elements.

    With `words` by pairs of them.
    """
    registers = target.vector_registers - (PRODUCTS if words else 0)
    return next(c for c in range(MOST_COLUMNS, 0, -1) if blocks * c + _operands(target, blocks, c) <= registers)


def _operands(target: Target, blocks: int, columns: int) -> int:
    """Return the registers of what a step multiplies, where LLVM loads the next step's weights early.

    x86 multiplies by an element in memory; Arm by one in a register, so each column needs its own.
    """
    return columns + 2 * blocks if target.architecture == "aarch64" else min(blocks, columns) + 1


def _fits(analysis: ChannelWindows, target: Target, blocks: int, columns: int) -> bool:
    """Return whether the tile's sums and what a step multiplies fit the vector registers.

    On Arm LLVM loads the next channel's weights early only where no loop over taps lies between. Where neighbouring
    columns read the same elements at neighbouring taps of one loop, LLVM keeps these, too: lane by lane all that a row
    of taps reaches, of which a stride is a multiple of the columns.
    """
    last = analysis.data.indices[-1]
    vectors = max(1, analysis.block // target.vector_lanes(32))
    if occurs(last, analysis.lane.variable):
        if follows_positions(analysis, target):
            weights = len(analysis.stage.loads()) > 1  # A pooling has none.
            taps = min(int(analysis.stage.reduction[-1].extent), MOST_WEIGHTS) if weights else 0
            return columns + taps + 1 <= target.vector_registers
        columns, operands = columns * vectors, vectors * (columns * _stride(analysis) + BORDER_OPERANDS)
        return columns + operands <= target.vector_registers
    blocks *= vectors
    if analysis.columns is not None and occurs(last, analysis.columns.inner.variable):
        operands = _operands(target, blocks, columns) if _reads_apart(analysis, target) else blocks + 2 * columns
    else:
        operands = _operands(target, blocks, columns)
        if _reads_words(analysis):
            operands += PRODUCTS
        if target.architecture == "aarch64" and analysis.terms == FOUR:
            operands -= columns // FOURS * (FOURS - 1)  # a vector has the fours of several columns
        image = analysis.data.indices[2:-1]
        taps = any(occurs(position, axis.variable) for position in image for axis in analysis.stage.reduction)
        if target.architecture == "aarch64" and taps:
            operands -= blocks
    return blocks * columns + operands <= target.vector_registers


def follows_positions(analysis: ChannelWindows, target: Target) -> bool:
    """Return whether a tile that is read lane by lane takes the taps of a row in the order of the elements.

    In the order of the taps all elements of a row are in registers at once, which leaves too few sums to hide the
    latency where there are 16 registers.
    """
    columns, innermost = analysis.columns, analysis.stage.reduction[-1]
    if not target.has_few_registers or analysis.block != target.vector_lanes(32):
        return False
    if not occurs(analysis.data.indices[-1], analysis.lane.variable) or columns is None or len(columns.axes) > 1:
        return False
    return analysis.terms == 1 and innermost.static and _column_step(analysis, innermost.variable) is not None


def parts_rows_of_taps(analysis: ChannelWindows, target: Target) -> bool:
    """Return whether no load moves from one row of taps to another.

    LLVM unrolls the few taps of an image that has no blocks of channels, adds what a sum gets of all of them in a row,
    and keeps all weights on the stack for the next tile, where there are 16 registers. 3 to 96 channels with windows
    of 4x4 took 508 us and take 413 (Zen 3).
    """
    is_plain = analysis.channel is not None and analysis.depth is None and len(analysis.stage.loads()) > 1
    return target.has_few_registers and is_plain and str(analysis.data.source.dtype) == "float32"


def _reads_apart(analysis: ChannelWindows, target: Target) -> bool:
    """Return whether neighbouring columns have no element in common that a register could keep for both."""
    innermost = analysis.stage.reduction[-1]
    if not parts_rows_of_taps(analysis, target) or not innermost.static:
        return False
    dilation = _column_step(analysis, innermost.variable)
    return dilation is not None and (int(innermost.extent) - 1) * dilation < _stride(analysis)


def steps_of_columns(analysis: ChannelWindows) -> tuple[int, int]:
    """Return how far apart the elements are that neighbouring columns read, and those of neighbouring taps of a row."""
    dilation = _column_step(analysis, analysis.stage.reduction[-1].variable)
    assert dilation is not None
    return _stride(analysis), dilation


def _column_step(analysis: ChannelWindows, tap: Var) -> int | None:
    """Return the distance of the elements that neighbouring taps read in a column's row; None if they do not."""
    assert analysis.columns is not None
    column = analysis.columns.inner.variable
    position = next((each for each in analysis.data.indices if occurs(each, column) and occurs(each, tap)), None)
    return None if position is None else linear_coefficient(position, tap)


def _reads_words(analysis: ChannelWindows) -> bool:
    """Return whether pairs of bytes that lie as words are multiplied."""
    return str(analysis.data.source.dtype) == WORD and analysis.terms > 1


def _stride(analysis: ChannelWindows) -> int:
    """Return how far apart the elements are that neighbouring columns read."""
    if analysis.columns is None:
        return 1
    variable = analysis.columns.inner.variable
    return max(1, *(linear_coefficient(position, variable) or 1 for position in analysis.data.indices))


def _tile_sizes(extent: int, size: int) -> list[tuple[int, int]]:
    """Return the sizes of the tiles of an extent, whole ones and what is left, and how many there are of each."""
    return [(size, extent // size), (extent % size, 1)] if extent % size else [(size, extent // size)]


def _step_cycles(blocks: int, columns: int, broadcast: float, weights: tuple[float, float]) -> float:
    """Return the cycles of a step; `weights` says how many loads one of weights counts for, and its cycles at least."""
    cost, line = weights
    loading = (broadcast * columns + blocks / THROUGHPUT) if broadcast else 0
    return max(blocks * columns / THROUGHPUT, LATENCY, loading, line * blocks) + (cost * blocks + columns) / 4


def _word_cycles(blocks: int, columns: int) -> float:
    """Return the cycles of a step that multiplies and adds pairs, widens weights and loads elements."""
    return (2 * blocks * columns + 2 * blocks + columns) / WORD_INSTRUCTIONS
