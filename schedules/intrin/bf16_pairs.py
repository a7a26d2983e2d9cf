"""Pairs of bfloat16 in lanes of 32 bits: rounded from fp32, and multiplied by vdpbf16ps of AVX512-BF16 or bfdot of Arm.

As in `bf16_dot`, which has weights in memory that were packed at compile time, the instructions come in as functions in
LLVM's language. What is made of fp32 inside a kernel is a vector of int32 to TVM here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.bf16_dot import PAIR, bf16_dot, bf16_intrinsic
from schedules.intrin.grouped_call import GroupedDot
from schedules.intrin.llvm_functions import attributes, imported
from targets.base import Target

_DOT, _ALTERNATING, _ADJACENT = "optimizer_dot_pairs_bf16", "optimizer_alternate_bf16", "optimizer_join_bf16"
_NEIGHBOURS = "optimizer_neighbours_bf16"
_READ_ADJACENT, _READ_ALTERNATING = "optimizer_read_adjacent_bf16", "optimizer_read_alternate_bf16"
_WRITE = "optimizer_write_adjacent_bf16"
# With AVX512-BF16 one instruction rounds two vectors, and one more puts them in order.
_ROUND_BOTH = """
declare <{elements} x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<{lanes} x float>, <{lanes} x float>)
"""
_ROUND_AT_ONCE = """
define weak_odr <{lanes} x i32> @{call}(<{lanes} x float> %first, <{lanes} x float> %second) #0 {{
  %both = call <{elements} x bfloat>
    @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<{lanes} x float> %second, <{lanes} x float> %first)
  %ordered = shufflevector <{elements} x bfloat> %both, <{elements} x bfloat> poison, <{elements} x i32> <{order}>
  %pairs = bitcast <{elements} x bfloat> %ordered to <{lanes} x i32>
  ret <{lanes} x i32> %pairs
}}
"""
_ROUND = """
define weak_odr <{lanes} x i32> @{call}(<{lanes} x float> %first, <{lanes} x float> %second) #0 {{
  %a = fptrunc <{lanes} x float> %first to <{lanes} x bfloat>
  %b = fptrunc <{lanes} x float> %second to <{lanes} x bfloat>
  %both = shufflevector <{lanes} x bfloat> %a, <{lanes} x bfloat> %b, <{elements} x i32> <{order}>
  %pairs = bitcast <{elements} x bfloat> %both to <{lanes} x i32>
  ret <{lanes} x i32> %pairs
}}
"""
_NEIGHBOURS_SOURCE = """
define weak_odr <{half} x i32> @{call}(<{lanes} x float> %values) #0 {{
  %rounded = fptrunc <{lanes} x float> %values to <{lanes} x bfloat>
  %pairs = bitcast <{lanes} x bfloat> %rounded to <{half} x i32>
  ret <{half} x i32> %pairs
}}
"""
_IN_MEMORY = """
define weak_odr <{lanes} x i32> @{read_adjacent}(ptr %from) #0 {{
  %pairs = load <{lanes} x i32>, ptr %from, align 2
  ret <{lanes} x i32> %pairs
}}
define weak_odr <{lanes} x i32> @{read_alternating}(ptr %first, ptr %second) #0 {{
  %a = load <{lanes} x i16>, ptr %first, align 2
  %b = load <{lanes} x i16>, ptr %second, align 2
  %both = shufflevector <{lanes} x i16> %a, <{lanes} x i16> %b, <{elements} x i32> <{order}>
  %pairs = bitcast <{elements} x i16> %both to <{lanes} x i32>
  ret <{lanes} x i32> %pairs
}}
define weak_odr i32 @{write}(ptr %to, <{lanes} x i32> %pairs) #0 {{
  store <{lanes} x i32> %pairs, ptr %to, align 2
  ret i32 0
}}
"""
_SOURCE = """
declare <{lanes} x float> @{intrinsic}(<{lanes} x float>, <{elements} x bfloat>, <{elements} x bfloat>)
define weak_odr <{lanes} x float> @{call}(<{lanes} x float> %sum, <{lanes} x i32> %pairs, i32 %pair) #0 {{
  %w = bitcast <{lanes} x i32> %pairs to <{elements} x bfloat>
  %first = insertelement <{lanes} x i32> poison, i32 %pair, i32 0
  %every = shufflevector <{lanes} x i32> %first, <{lanes} x i32> poison, <{lanes} x i32> zeroinitializer
  %x = bitcast <{lanes} x i32> %every to <{elements} x bfloat>
  %result = call <{lanes} x float>
    @{intrinsic}(<{lanes} x float> %sum, <{elements} x bfloat> %w, <{elements} x bfloat> %x)
  ret <{lanes} x float> %result
}}
{alternating}{adjacent}{neighbours}{in_memory}
attributes #0 = {{ {attributes} }}
"""


@dataclass(frozen=True)
class Bf16Pairs:
    """The functions of one target on vectors of `lanes` pairs; `dot` reads single ones that they are multiplied by."""

    lanes: int
    source: str
    dot: GroupedDot

    def accumulate(self, sums: Expr, pairs: Expr, pair: Expr) -> Expr:
        """Return sums[l] + pairs[l][0] * pair[0] + pairs[l][1] * pair[1]."""
        return tirx.call_extern(f"float32x{self.lanes}", _DOT, sums, pairs, pair)

    def alternating(self, first: Expr, second: Expr) -> Expr:
        """Return the pairs first[l], second[l] of two vectors of fp32, rounded."""
        return tirx.call_extern(f"int32x{self.lanes}", _ALTERNATING, first, second)

    def adjacent(self, first: Expr, second: Expr) -> Expr:
        """Return the pairs of neighbours in one vector of fp32 and the one that follows it, rounded."""
        return tirx.call_extern(f"int32x{self.lanes}", _ADJACENT, first, second)

    def neighbours(self, values: Expr) -> Expr:
        """Return the pairs of neighbours in one vector of fp32, half as many as it has lanes, rounded."""
        return tirx.call_extern(f"int32x{self.lanes // PAIR}", _NEIGHBOURS, values)

    def read_adjacent(self, read: Expr) -> Expr:
        """Return the pairs of neighbours in memory from the element of bfloat16 on that `read` loads."""
        return tirx.call_extern(f"int32x{self.lanes}", _READ_ADJACENT, tirx.address_of(read))

    def read_alternating(self, first: Expr, second: Expr) -> Expr:
        """Return the pairs of the elements of bfloat16 in memory from those on that two reads load."""
        return tirx.call_extern(
            f"int32x{self.lanes}", _READ_ALTERNATING, tirx.address_of(first), tirx.address_of(second)
        )

    def write_adjacent(self, place: Expr, pairs: Expr) -> Stmt:
        """Return the store of pairs as neighbours in memory, from the element of bfloat16 on that `place` loads."""
        return tirx.Evaluate(tirx.call_extern("int32", _WRITE, tirx.address_of(place), pairs))

    @property
    def words(self) -> Callable[[Expr, int], Expr] | None:
        """How several pairs are read for an instruction that takes one of them by itself; None without such."""
        return self.dot.groups if self.dot.at_once > 1 else None

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the functions, with the functions."""
        return self.dot.imported(imported(statement, self.source))


def bf16_pairs(target: Target) -> Bf16Pairs | None:
    """Return the functions of a CPU target, None where it has no dot product of bfloat16."""
    dot = bf16_dot(target)
    if dot is None:
        return None
    lanes = dot.lanes
    width = {"lanes": lanes, "elements": PAIR * lanes}

    at_once = target.architecture == "x86_64"

    def rounding(call: str, order: list[int]) -> str:
        source = _ROUND_AT_ONCE if at_once else _ROUND
        return source.format(call=call, order=", ".join(f"i32 {place}" for place in order), **width)

    alternate = [place for lane in range(lanes) for place in (lane, lanes + lane)]
    source = (_ROUND_BOTH.format(**width) if at_once else "") + _SOURCE.format(
        intrinsic=bf16_intrinsic(target),
        call=_DOT,
        alternating=rounding(_ALTERNATING, alternate),
        adjacent=rounding(_ADJACENT, list(range(PAIR * lanes))),
        neighbours=_NEIGHBOURS_SOURCE.format(call=_NEIGHBOURS, lanes=lanes, half=lanes // PAIR),
        in_memory=_IN_MEMORY.format(
            read_adjacent=_READ_ADJACENT,
            read_alternating=_READ_ALTERNATING,
            write=_WRITE,
            order=", ".join(f"i32 {place}" for place in alternate),
            **width,
        ),
        attributes=attributes(target),
        **width,
    )
    return Bf16Pairs(lanes, source, dot)
