"""Rows of fp32 that a product in tile registers takes, rounded to bfloat16 where they are multiplied.

Tiles take numbers below the normal ones for zero: so may the instruction that rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad
from tvm.tirx.stmt import Stmt

from schedules.elementwise import overlapping_tiles
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.bf16_rounding import LANES, rounds_in_vectors, store_rounded
from schedules.loops import Extent, index, load, loop, store, unflatten, vector
from schedules.stages import Stage, as_extent, bind
from targets.base import Target

_MATRIX = 2


def is_rounding(stage: Stage) -> bool:
    """Return whether a stage does nothing but round elements of rows from fp32 to bfloat16, each at its own place.

    The rows that it writes may be longer than what it writes of them.
    """
    cast = stage.value
    if stage.is_reduction or not isinstance(cast, tirx.Cast) or str(stage.output.dtype) != BFLOAT16:
        return False
    read = cast.value
    if not isinstance(read, TensorLoad) or str(read.source.dtype) != "float32" or len(stage.axes) < _MATRIX:
        return False
    outer = [tuple(buffer.shape[:-1]) for buffer in (read.source, stage.output)]
    places = (tuple(read.indices), outer[0]), (stage.indices, outer[1])
    return len(read.indices) == len(stage.indices) and all(
        tvm_ffi.structural_equal(own, other)
        for left, right in zip(*places, strict=True)
        for own, other in zip(left, right, strict=True)
    )


def leading_of(stage: Stage) -> int:
    """Return how many axes a rounding's rows have before their own."""
    return len(stage.indices) - 1


def rounded_rows(stage: Stage, start: Expr, extent: Extent, target: Target) -> Stmt:
    """Return code that rounds rows [start, start + extent) of the flattened leading axes."""
    assert isinstance(stage.value, tirx.Cast)
    assert isinstance(stage.value.value, TensorLoad)
    source = stage.value.value.source
    *outer, length = [as_extent(size) for size in source.shape]
    in_vectors = rounds_in_vectors(target)

    def row(number: Expr) -> Stmt:
        position = unflatten(start + number, outer)

        def piece(base: Expr, width: int) -> Stmt:
            if width == LANES and in_vectors:
                lanes = tirx.Ramp(base, index(1), LANES)
                first, last = (load(stage.output, [*position, place]) for place in (base, base + (LANES - 1)))
                return store_rounded(first, last, load(source, [*position, lanes]))

            def element(v: Expr) -> Stmt:
                indices, value = stage.at(bind(stage.indices, [*position, base + v]))
                return store(stage.output, value, indices)

            return vector(width, element)

        return overlapping_tiles(length, LANES, piece)

    return loop(extent, row)


def only_rounds(stages: Sequence[object]) -> bool:
    """Return whether stages are one rounding."""
    return len(stages) == 1 and isinstance(stages[0], Stage) and is_rounding(stages[0])
