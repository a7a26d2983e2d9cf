"""Dot products of pairs of bfloat16 that add to fp32 lanes: vdpbf16ps of AVX512-BF16, bfdot of Armv8.6.

TVM turns bfloat16 values into fp32 before code is generated, so that its types cannot express the instructions: they
come in as a small function in LLVM's language, which takes addresses and is inlined.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import attributes, imported
from targets.base import Target

# Neighbours of K that one lane consumes.
PAIR = 2
_CALL, _READ = "optimizer_dot_bf16", "optimizer_read_pairs_bf16"
# `weak_odr` lets every kernel of a module bring its own copy and survives linking before the first call.
_SOURCE = """
declare <{lanes} x float> @{intrinsic}(<{lanes} x float>, <{elements} x bfloat>, <{elements} x bfloat>)
define weak_odr <{lanes} x float> @{call}(<{lanes} x float> %sum, ptr %weights, i32 %pair) #0 {{
  %w = load <{elements} x bfloat>, ptr %weights, align {alignment}
  %first = insertelement <{lanes} x i32> poison, i32 %pair, i32 0
  %every = shufflevector <{lanes} x i32> %first, <{lanes} x i32> poison, <{lanes} x i32> zeroinitializer
  %x = bitcast <{lanes} x i32> %every to <{elements} x bfloat>
  %result = call <{lanes} x float>
    @{intrinsic}(<{lanes} x float> %sum, <{elements} x bfloat> %w, <{elements} x bfloat> %x)
  ret <{lanes} x float> %result
}}
{readers}attributes #0 = {{ {attributes} }}
"""
_READER = """define weak_odr i32 @{call}_1(ptr %from) #0 {{
  %pair = load i32, ptr %from, align 4
  ret i32 %pair
}}
"""
# LLVM 21 and 22 find the element that the instruction takes out of a vector by itself only where that vector is known
# as one of bfloat16 (llvm/llvm-project#170883): the fence, no instruction, keeps it from being loaded as another one.
_VECTOR_READER = """define weak_odr <{count} x i32> @{call}_{count}(ptr %from) #0 {{
  %some = load <{elements} x bfloat>, ptr %from, align 4
  %widened = shufflevector <{elements} x bfloat> %some, <{elements} x bfloat> poison, <8 x i32> <{whole}>
  %known = call <8 x bfloat> @llvm.arithmetic.fence.v8bf16(<8 x bfloat> %widened)
  %words = bitcast <8 x bfloat> %known to <4 x i32>
  %pairs = shufflevector <4 x i32> %words, <4 x i32> poison, <{count} x i32> <{own}>
  ret <{count} x i32> %pairs
}}
"""
_FENCE = "declare <8 x bfloat> @llvm.arithmetic.fence.v8bf16(<8 x bfloat>)\n"


@dataclass(frozen=True)
class Bf16Dot:
    """The instruction of one target, for `lanes` outputs at a time."""

    lanes: int
    intrinsic: str
    source: str
    at_once: int
    terms: int = PAIR

    def accumulate(self, sums: Expr, weights: Expr, activations: Expr, terms: int = PAIR) -> Expr:
        """Return sums[l] + w[l][0] * x[0] + w[l][1] * x[1].

        `weights` and `activations` are the reads of the first of `lanes` pairs, aligned to a vector, and of one pair.
        """
        assert terms == PAIR
        return self.accumulate_group(sums, weights, self.groups(activations, 1))

    def accumulate_group(self, sums: Expr, weights: Expr, group: Expr) -> Expr:
        """Return the same with an x that `groups` gave."""
        return tirx.call_extern(f"float32x{self.lanes}", _CALL, sums, tirx.address_of(weights), group)

    def groups(self, activations: Expr, count: int) -> Expr:
        """Return one pair or a vector of at most `at_once`, from the one on that begins at a read."""
        dtype = "int32" if count == 1 else f"int32x{count}"
        return tirx.call_extern(dtype, f"{_READ}_{count}", tirx.address_of(activations))

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the function, with the function."""
        return imported(statement, self.source)


def bf16_dot(target: Target) -> Bf16Dot | None:
    """Return the dot product of a CPU target, None where it has none."""
    if "avx512_bf16" in target.features:
        return _dot("llvm.x86.avx512bf16.dpbf16ps.512", 16, 1, target)
    if target.architecture == "aarch64" and "bf16" in target.features:
        return _dot("llvm.aarch64.neon.bfdot.v4f32.v8bf16", 4, 4, target)
    return None


def _dot(intrinsic: str, lanes: int, at_once: int, target: Target) -> Bf16Dot:
    source = _SOURCE.format(
        intrinsic=intrinsic,
        call=_CALL,
        lanes=lanes,
        elements=PAIR * lanes,
        alignment=4 * lanes,
        readers=_readers(at_once),
        attributes=attributes(target),
    )
    return Bf16Dot(lanes, intrinsic, source, at_once)


def _readers(most: int) -> str:
    """Return the functions that read one pair and vectors of up to `most`."""

    def vector(count: int) -> str:
        elements = PAIR * count
        whole = ", ".join(f"i32 {place}" if place < elements else "i32 poison" for place in range(8))
        own = ", ".join(f"i32 {place}" for place in range(count))
        return _VECTOR_READER.format(call=_READ, count=count, elements=elements, whole=whole, own=own)

    vectors = [vector(count) for count in range(2, most + 1)]
    return "".join([_READER.format(call=_READ), *([_FENCE] if vectors else []), *vectors])
