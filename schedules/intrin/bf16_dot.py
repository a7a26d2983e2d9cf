"""Dot products of pairs of bfloat16 that add to fp32 lanes: vdpbf16ps of AVX512-BF16, bfdot of Armv8.6.

TVM turns bfloat16 values into fp32 before code is generated, so that its types cannot express the instructions: they
come in as a small function in LLVM's language, which takes addresses and is inlined.
"""

from __future__ import annotations

from schedules.intrin.grouped_call import GroupedDot
from schedules.intrin.llvm_functions import attributes
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
# Rows of an odd number of elements begin at any of them, and end with half a pair.
PAIR_READER = """define weak_odr i32 @{call}_1(ptr %from) #0 {{
  %last = load i16, ptr %from, align 2
  %pair = zext i16 %last to i32
  ret i32 %pair
}}
define weak_odr i32 @{call}_2(ptr %from) #0 {{
  %pair = load i32, ptr %from, align 2
  ret i32 %pair
}}
"""
# LLVM 21 and 22 find the element that the instruction takes out of a vector by itself only where that vector is known
# as one of bfloat16 (llvm/llvm-project#170883): the fence, no instruction, keeps it from being loaded as another one.
_VECTOR_READER = """define weak_odr <{count} x i32> @{call}_vector_{count}(ptr %from) #0 {{
  %some = load <{elements} x bfloat>, ptr %from, align 2
  %widened = shufflevector <{elements} x bfloat> %some, <{elements} x bfloat> poison, <8 x i32> <{whole}>
  %known = call <8 x bfloat> @llvm.arithmetic.fence.v8bf16(<8 x bfloat> %widened)
  %words = bitcast <8 x bfloat> %known to <4 x i32>
  %pairs = shufflevector <4 x i32> %words, <4 x i32> poison, <{count} x i32> <{own}>
  ret <{count} x i32> %pairs
}}
"""
_FENCE = "declare <8 x bfloat> @llvm.arithmetic.fence.v8bf16(<8 x bfloat>)\n"


def bf16_intrinsic(target: Target) -> str | None:
    """Return LLVM's name of a CPU target's dot product, None where it has none."""
    if "avx512_bf16" in target.features:
        return "llvm.x86.avx512bf16.dpbf16ps.512"
    is_arm = target.architecture == "aarch64" and "bf16" in target.features
    return "llvm.aarch64.neon.bfdot.v4f32.v8bf16" if is_arm else None


def bf16_dot(target: Target) -> GroupedDot | None:
    """Return the dot product of a CPU target, None where it has none."""
    intrinsic = bf16_intrinsic(target)
    if intrinsic is None:
        return None
    lanes, at_once = (4, 4) if target.architecture == "aarch64" else (16, 1)
    source = _SOURCE.format(
        intrinsic=intrinsic,
        call=_CALL,
        lanes=lanes,
        elements=PAIR * lanes,
        alignment=4 * lanes,
        readers=_readers(at_once),
        attributes=attributes(target),
    )
    return GroupedDot(lanes, PAIR, "float32", _CALL, _READ, source, at_once)


def _readers(most: int) -> str:
    """Return the functions that read one pair, or half of one, and vectors of up to `most`."""

    def vector(count: int) -> str:
        elements = PAIR * count
        whole = ", ".join(f"i32 {place}" if place < elements else "i32 poison" for place in range(8))
        own = ", ".join(f"i32 {place}" for place in range(count))
        return _VECTOR_READER.format(call=_READ, count=count, elements=elements, whole=whole, own=own)

    vectors = [vector(count) for count in range(2, most + 1)]
    return "".join([PAIR_READER.format(call=_READ), *([_FENCE] if vectors else []), *vectors])
