"""Attention in one kernel: two products with a softmax between them, without storing the scores.

A task holds a block of queries of one head in the lanes of its vectors and walks over blocks of keys with a running
maximum and sum (Dao et al., FlashAttention, 2022, algorithm 1). With queries in lanes the softmax's maximum and sum
need no steps across lanes, and keys and values are read in place, one element at a time for a whole vector of queries:
nothing but the block of queries is ever copied to another layout. Few queries, as in decoding, are taken one by one,
with all heads that share keys and values together.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules import attention_rows, attention_tiles
from schedules.attention_structure import AttentionAnalysis, analyse
from schedules.family import Choice, Kernel, Parameters, Space
from targets.base import Target

LARGEST_KEY_BLOCK = 256
SYMBOLIC_KEY_BLOCK = 192
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
        rows, vectors = _register_tile(target)
        lanes = target.vector_lanes(32)
        if analysis.lane is not None and isinstance(analysis.lane.extent, int):
            vectors = max(1, min(vectors, analysis.lane.extent // lanes))
        return (
            Choice("rows", rows, (4, 6, 8, 12)),
            Choice("vectors", vectors, (1, 2, 4)),
            Choice("key_block", _key_block(analysis.key.extent), (64, 128, 192, 256)),
            Choice("least_queries", min(LEAST_QUERIES, lanes), (2, 4, 8, 16)),
        )

    def apply(self, analysis: AttentionAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the loop nest; two of them, and a choice at run time, where the number of queries is symbolic."""
        lanes, block, least = target.vector_lanes(32), parameters["key_block"], parameters["least_queries"]
        lane = analysis.lane
        if lane is None or (isinstance(lane.extent, int) and lane.extent < least):
            return attention_rows.emit(analysis, lanes, block)
        many = attention_tiles.emit(analysis, lane, lanes, (parameters["rows"], parameters["vectors"]), block)
        if isinstance(lane.extent, int):
            return many
        return tirx.IfThenElse(lane.extent >= least, many, attention_rows.emit(analysis, lanes, block))


def _register_tile(target: Target) -> tuple[int, int]:
    if target.architecture == "x86_64" and target.vector_bits < 512:
        return 6, 2  # 12 of 16 registers
    return 12, 2  # 24 of 32 registers


def _key_block(extent: int | Expr) -> int:
    if not isinstance(extent, int):
        return SYMBOLIC_KEY_BLOCK
    blocks = -(-extent // LARGEST_KEY_BLOCK)
    return -(-extent // blocks)
