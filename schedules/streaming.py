"""Stores past the caches, for outputs that no cache holds.

A store to a line that is in no cache reads it first, to write it back later: a copy moves three bytes for every two.
Non-temporal stores of whole lines only write. What reads such an output finds little of it in a cache either way.
Only x86 is told so: Arm's cores see for themselves when whole lines are written. Statements of less than a line are
stored as ever, because a line that is written in parts may leave the buffer that joins them too early.
(AMD64 Architecture Programmer's Manual, volume 1, section 5.6.4, "Using Streaming Loads and Stores".)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import linear_coefficient
from schedules.intrin.llvm_functions import attributes, imported
from schedules.loops import LINE_BITS, flatten, index, load, local, product, region, store, vector, with_local
from schedules.stages import Stage, StagedFunction, as_extent, contains, loads_of, substitute
from targets.base import Target

# The last cache of most machines, all cores' together, is no larger: 32 MiB of a Zen 4's eight.
LAST_CACHE_BYTES = 32 * 1024 * 1024
# What one store has to cover whole; TVM aligns buffers to as much.
LINE_BYTES = LINE_BITS // 8
ELEMENT = "float32"
LANES = LINE_BYTES // 4
_STORE, _FENCE = "optimizer_stream_line", "optimizer_order_streams"
# `weak_odr` lets every kernel of a module bring its own copy and survives linking before the first call.
_SOURCE = """
declare void @llvm.x86.sse.sfence()
define weak_odr i32 @{store}(ptr %line, <{lanes} x float> %value) #0 {{
  store <{lanes} x float> %value, ptr %line, align {bytes}, !nontemporal !0
  ret i32 0
}}
define weak_odr i32 @{fence}() #0 {{
  call void @llvm.x86.sse.sfence()
  ret i32 0
}}
attributes #0 = {{ {attributes} }}
!0 = !{{i32 1}}
"""


def streamed(statements: Sequence[Stmt], staged: StagedFunction, target: Target) -> list[Stmt]:
    """Return the statements of a scheduled function, with whole lines of outputs beyond the caches stored past them.

    Outputs that the statements also read are left alone, and so are vectors that do not provably cover whole lines.
    """
    if target.architecture != "x86_64":
        return list(statements)
    read = [each.source for statement in statements for each in loads_of(statement)]
    outputs = [output for output in _large_outputs(staged) if not contains(read, output)]
    return [_Streams(tuple(outputs), target).of(statement) for statement in statements] if outputs else list(statements)


def _large_outputs(staged: StagedFunction) -> list[Var]:
    """Return the outputs of which a stage writes more than the last cache holds."""
    outputs = []
    for stage in staged.stages:
        if not isinstance(stage, Stage) or contains(staged.intermediate, stage.output):
            continue
        elements = product([axis.extent for axis in stage.spatial])
        large = isinstance(elements, int) and elements * LINE_BYTES // LANES >= LAST_CACHE_BYTES
        if large and str(stage.output.dtype) == ELEMENT:
            outputs.append(stage.output)
    return outputs


@dataclass(frozen=True)
class _Streams:
    """The rewriting of stores to `outputs`."""

    outputs: tuple[Var, ...]
    target: Target

    def of(self, statement: Stmt) -> Stmt:
        """Return a kernel's statement rewritten: its parallel loop, and an order of its stores before what follows."""
        if not isinstance(statement, tirx.For) or statement.kind != tirx.ForKind.PARALLEL:
            return statement
        rewritten = tvm_ffi.structural_mutate(statement, (tirx.For, self._loop))
        if tvm_ffi.structural_equal(rewritten, statement):
            return statement
        fence = tirx.Evaluate(tirx.call_extern("int32", _FENCE))
        body = region([rewritten, fence])
        return imported(body, self._source())

    def _loop(self, loop: tirx.For, mutator: tvm_ffi.StructuralMutator) -> Stmt:
        width = as_extent(loop.extent)
        if loop.kind != tirx.ForKind.VECTORIZED or not isinstance(width, int) or width % LANES:
            return mutator.default_mutate(loop)
        body = loop.body
        if not isinstance(body, tirx.BufferStore) or not contains(self.outputs, body.buffer):
            return loop
        return self._lines(loop.loop_var, width, body) if _covers_lines(body, loop.loop_var) else loop

    def _lines(self, lane: Var, width: int, written: tirx.BufferStore) -> Stmt:
        """Return the store of a vector of `width` elements in lines."""
        values = local([width], ELEMENT, "lines")

        def line(first: int) -> Stmt:
            place = [substitute(each, {lane: index(first)}) for each in written.indices]
            value = load(values, [tirx.Ramp(index(first), index(1), LANES)])
            address = tirx.address_of(load(written.buffer, place))
            return tirx.Evaluate(tirx.call_extern("int32", _STORE, address, value))

        computed = vector(width, lambda v: store(values, substitute(written.value, {lane: v}), [v]))
        return with_local([values], [computed, *(line(first) for first in range(0, width, LANES))])

    def _source(self) -> str:
        return _SOURCE.format(
            store=_STORE,
            fence=_FENCE,
            lanes=LANES,
            bytes=LINE_BYTES,
            attributes=attributes(self.target),
        )


def _covers_lines(written: tirx.BufferStore, lane: Var) -> bool:
    """Return whether neighbouring lanes store to neighbouring places, the first of them at the start of a line."""
    analyzer = sym.Analyzer()
    extents = [as_extent(extent) for extent in written.buffer.shape]
    place: Expr = analyzer.simplify(flatten(written.indices, extents))
    if linear_coefficient(place, lane) != 1:
        return False
    first = analyzer.modular_set(analyzer.simplify(substitute(place, {lane: index(0)})))
    return first.coeff % LANES == 0 and first.base % LANES == 0
