"""What a pooling reads, and what is known of it where a window is inside of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Expr, Range, Var

from schedules.channel_windows import ChannelWindow
from schedules.epilogue import Epilogue
from schedules.loops import index, load
from schedules.reducer import Reducer, term_at
from schedules.stages import Axis, Stage, replace_loads

# The most rows, or columns, of a window whose combination is written out.
MOST_WRITTEN = 16


@dataclass(frozen=True, eq=False)
class PoolingAnalysis:
    """A reduction over `windows`, of which the last moves along the row; `outer` are the output's other axes."""

    stage: Stage
    epilogue: Epilogue
    reducer: Reducer
    outer: tuple[Axis, ...]
    windows: tuple[ChannelWindow, ...]


def term_of(analysis: PoolingAnalysis, point: Mapping[Var, Expr], taps: Sequence[Expr], column: Expr) -> Expr:
    """Return the term of the image's element at `taps` of the windows over other axes than the row, in `column`."""
    *above, window = analysis.windows
    assert window.axis is not None
    first = {window.axis.variable: index(0), window.tap.variable: index(0)}
    values = {each.tap.variable: tap for each, tap in zip(above, taps, strict=True)}
    term = term_at(analysis.stage, analysis.reducer, {**point, **first, **values})
    return replace_loads(term, lambda read: load(read.source, [*list(read.indices)[:-1], column]))


def inside(window: ChannelWindow) -> tuple[int, int]:
    """Return the positions [begin, end) of the output whose windows are all inside the image."""
    taps = range(int(window.tap.extent))
    assert window.axis is not None
    positions = range(int(window.axis.extent))
    inside = [position for position in positions if all(window.reads_inside(position, tap) for tap in taps)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def narrowed(epilogue: Epilogue, ranges: Mapping[Var, tuple[int, int]]) -> Epilogue:
    """Return an epilogue with the integers in it, such as how many elements a window has, simplified for `ranges`."""
    analyzer = sym.Analyzer()
    for variable, (begin, end) in ranges.items():
        analyzer.bind(variable, Range(tirx.const(begin, variable.ty), tirx.const(end, variable.ty)))

    def simplify(cast: tirx.Cast, mutator: tvm_ffi.StructuralMutator) -> Expr:
        if "int" in str(cast.value.ty.dtype):
            return tirx.Cast(cast.ty.dtype, analyzer.simplify(cast.value))
        return mutator.default_mutate(cast)

    return replace(epilogue, value=tvm_ffi.structural_mutate(epilogue.value, (tirx.Cast, simplify)))
