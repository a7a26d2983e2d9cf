"""Attention in one kernel: two products with a softmax between them, without storing the scores.

A task holds a block of queries of one head in the lanes of its vectors and walks over blocks of keys with a running
maximum and sum (Dao et al., FlashAttention, 2022, algorithm 1). With queries in lanes the softmax's maximum and sum
need no steps across lanes, and keys and values are read in place, one element at a time for a whole vector of queries:
nothing but the block of queries is ever copied to another layout. (Where products are of pairs of bfloat16, keys and
values are packed before.) Few queries, as in decoding, are taken one by one,
with all heads that share keys and values together.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt import Stmt

from schedules import attention_rows, attention_tiles
from schedules.attention_groups import groups_of
from schedules.attention_mask import end_of_seen
from schedules.attention_structure import AttentionAnalysis, analyse
from schedules.by_element import terms_at_once
from schedules.family import Choice, Kernel, Parameters, Space
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.bf16_pairs import PAIR, bf16_pairs
from schedules.intrin.matrix_tiles import BLOCK, TILE, MatrixTiles, matrix_tiles
from schedules.intrin.power_of_two import powers_of_two
from targets.base import Target

# So many keys are one block, whose sums need no factors. More are taken in blocks whose exponentials stay, with keys
# and values, in the first two caches.
LARGEST_KEY_BLOCK = 256
KEY_BLOCK = 128
SYMBOLIC_KEY_BLOCK = 192
# Each of a causal mask's blocks of queries sees another number of keys, most of them no multiple of a block.
CAUSAL_KEY_BLOCK = 96
# Products in tile registers read operands from the first cache that others only pass through it (with 128 instead,
# 1500 keys take 15 % longer on Granite Rapids, 512 keys 14 %).
TILES_KEY_BLOCK = 96
# A core that begins two multiply-adds a cycle may ask the first-level cache for two vectors meanwhile: 24 products of
# 6 rows by 4 vectors take 10 of them, of 12 by 2 14. The weights of twice the queries fill the cache by fewer keys.
# 1500 keys took 11.3 ms so, 13.3 by 13 and 2 (Granite Rapids).
WIDE_TILE = 6, 4
NARROW_TILE = 13, 2  # 26 of 32 registers, and what they are computed of
WIDE_KEY_BLOCK = 64
# With fewer queries most lanes would be idle; each alone costs as much as about an eighth of a block.
LEAST_QUERIES = 8


class Attention:
    """Blocks of queries in lanes, keys and values read in place."""

    name = "attention"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> AttentionAnalysis | None:
        """Return the analysis of a kernel that is one attention."""
        return analyse(kernel.stages)

    def space(self, target: Target, analysis: AttentionAnalysis) -> Space:
        """Return the register tile, the keys whose exponentials are kept at a time, and the queries that fill lanes."""
        lanes = target.vector_lanes(32)
        queries = 1 if analysis.lane is None else analysis.lane.extent
        tiles = _tiles(target, analysis)
        rows, vectors = _register_tile(target, analysis) if tiles is None else NARROW_TILE
        least = min(LEAST_QUERIES, lanes)
        if isinstance(queries, int):
            vectors = max(1, min(vectors, queries // lanes))
        few = isinstance(queries, int) and queries < least
        return (
            Choice("rows", rows, (4, 6, 8, 12, 13)),
            Choice("vectors", vectors, (1, 2, 4)),
            Choice("key_block", _key_block(analysis, few, tiles, vectors), (64, 96, 128, 192, 256)),
            Choice("least_queries", least, (2, 4, 8, 16)),
        )

    def apply(self, analysis: AttentionAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest; two of them, and a choice at run time, where the number of queries is symbolic."""
        lanes, block, least = target.vector_lanes(32), parameters["key_block"], parameters["least_queries"]
        lane = analysis.lane
        if lane is None or (isinstance(lane.extent, int) and lane.extent < least):
            return attention_rows.emit(analysis, target, block)
        dot = bf16_pairs(target) if analysis.rounded else None
        rows, vectors, tiles = parameters["rows"], parameters["vectors"], _tiles(target, analysis)
        if tiles is None:
            block += block % PAIR
        else:
            block, vectors = -(-block // BLOCK) * BLOCK, min(vectors, BLOCK // TILE)
        powers = powers_of_two(target)
        # Cores with few registers begin two multiply-adds a cycle as well, and requests at once make them wait as long:
        # spread, they save 11 % of the time of 1500 keys (Zen 3).
        spreads = target.multiply_adds > 1 or target.has_few_registers
        # With AVX-512 512 queries of 9 heads behind 3584 tokens in fp16 took 78.8 ms and take 60.5, alone 3.8 and 3.2
        # (Emerald Rapids, one thread).
        together = target.architecture == "x86_64" and dot is None
        groups = groups_of(analysis, lane.extent, lanes * vectors, target) if together else None
        blocks = attention_tiles.Blocks(
            lanes, rows, vectors, block, terms_at_once(target), powers, tiles, spreads, groups
        )
        many = attention_tiles.emit(analysis, lane, blocks, dot, target)
        if isinstance(lane.extent, int):
            return many
        return tirx.IfThenElse(lane.extent >= least, many, attention_rows.emit(analysis, target, block))


def _tiles(target: Target, analysis: AttentionAnalysis) -> MatrixTiles | None:
    return matrix_tiles(target, BFLOAT16, BFLOAT16) if analysis.rounded else None


def _register_tile(target: Target, analysis: AttentionAnalysis) -> tuple[int, int]:
    """Return rows of keys and vectors of queries whose scores are in registers at a time."""
    if target.has_few_registers:
        return 6, 2  # 12 of 16 registers
    queries = 1 if analysis.lane is None else analysis.lane.extent
    many = isinstance(queries, int) and queries >= WIDE_TILE[1] * target.vector_lanes(32)
    # Fewer queries together read fewer keys that a causal mask hides from some of them.
    if target.multiply_adds > 1 and many and end_of_seen(analysis) is None:
        return WIDE_TILE
    if target.architecture == "x86_64":
        return NARROW_TILE
    return 8, 2  # 16 of 32 registers, and as many for a block's elements as there are rows


def _key_block(analysis: AttentionAnalysis, few: bool, in_tiles: MatrixTiles | None, vectors: int) -> int:
    extent = analysis.key.extent
    if not isinstance(extent, int):
        return SYMBOLIC_KEY_BLOCK if in_tiles is None else TILES_KEY_BLOCK
    most = LARGEST_KEY_BLOCK
    if not few and end_of_seen(analysis) is not None:
        most = CAUSAL_KEY_BLOCK
    elif not few and extent > LARGEST_KEY_BLOCK:
        most = KEY_BLOCK if in_tiles is None else TILES_KEY_BLOCK
        most = most if vectors < WIDE_TILE[1] else WIDE_KEY_BLOCK
    return -(-extent // -(-extent // most))
