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
_CALL = "optimizer_dot_bf16"
# `weak_odr` lets every kernel of a module bring its own copy and survives linking before the first call.
_SOURCE = """
declare <{lanes} x float> @{intrinsic}(<{lanes} x float>, <{elements} x bfloat>, <{elements} x bfloat>)
define weak_odr <{lanes} x float> @{call}(<{lanes} x float> %sum, ptr %weights, ptr %activations) #0 {{
  %w = load <{elements} x bfloat>, ptr %weights, align {alignment}
  %pair = load i32, ptr %activations, align 4
  %first = insertelement <{lanes} x i32> poison, i32 %pair, i32 0
  %every = shufflevector <{lanes} x i32> %first, <{lanes} x i32> poison, <{lanes} x i32> zeroinitializer
  %x = bitcast <{lanes} x i32> %every to <{elements} x bfloat>
  %result = call <{lanes} x float>
    @{intrinsic}(<{lanes} x float> %sum, <{elements} x bfloat> %w, <{elements} x bfloat> %x)
  ret <{lanes} x float> %result
}}
attributes #0 = {{ {attributes} }}
"""


@dataclass(frozen=True)
class Bf16Dot:
    """The instruction of one target, for `lanes` outputs at a time."""

    lanes: int
    intrinsic: str
    source: str
    terms: int = PAIR

    def accumulate(self, sums: Expr, weights: Expr, activations: Expr, terms: int = PAIR) -> Expr:
        """Return sums[l] + w[l][0] * x[0] + w[l][1] * x[1].

        `weights` and `activations` are the reads of the first of `lanes` pairs, aligned to a vector, and of one pair.
        """
        assert terms == PAIR
        addresses = [tirx.address_of(read) for read in (weights, activations)]
        return tirx.call_extern(f"float32x{self.lanes}", _CALL, sums, *addresses)

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the function, with the function."""
        return imported(statement, self.source)


def bf16_dot(target: Target) -> Bf16Dot | None:
    """Return the dot product of a CPU target, None where it has none."""
    if "avx512_bf16" in target.features:
        return _dot("llvm.x86.avx512bf16.dpbf16ps.512", 16, target)
    if target.architecture == "aarch64" and "bf16" in target.features:
        return _dot("llvm.aarch64.neon.bfdot.v4f32.v8bf16", 4, target)
    return None


def _dot(intrinsic: str, lanes: int, target: Target) -> Bf16Dot:
    source = _SOURCE.format(
        intrinsic=intrinsic,
        call=_CALL,
        lanes=lanes,
        elements=PAIR * lanes,
        alignment=4 * lanes,
        attributes=attributes(target),
    )
    return Bf16Dot(lanes, intrinsic, source)
