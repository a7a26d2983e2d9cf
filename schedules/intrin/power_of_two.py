"""Powers of two of whole vectors of fp32 by instructions of x86 that take a number apart at its floor.

With 2**x = 2**(x - floor(x)) 2**floor(x), a polynomial is the power of the first exponent. Minus infinity and results
below the smallest normal number come out as 0, and NaN as NaN, without the shifts of `vector_math`.

AVX-512 has vreduceps for the first exponent, and vscalefps multiplies by the second power. Intel's cores take a hundred
cycles for a vector in which a result is subnormal, as exponentials of what a mask takes 100 from are: the mask of the
last instruction leaves them out.

AVX2 has vroundps for the floor, which added to the exponent of the polynomial's bits multiplies by the second power.
With half as many instructions as by the shifts, twice as many vectors are under way: a core has places for results
(Zen 3: 160) for the steps of a few vectors, each of which waits for the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import attributes, imported
from schedules.intrin.vector_math import SCALED_LANES, polynomial, scales
from targets.base import Target

# 2**r on 0 <= r <= 1, to 2**-23.7, and to 2**-13.7 for powers that are rounded to bfloat16
EXP2 = (9.999999251e-01, 6.931530732e-01, 2.401536171e-01, 5.582631800e-02, 8.989340159e-03, 1.877576647e-03)
EXP2_TO_ROUND = (9.999252186e-01, 6.958335405e-01, 2.260671555e-01, 7.802452261e-02)

_ABOVE_FLOOR, _TIMES_POWER = "optimizer_above_floor", "optimizer_times_power"
# To the floor, without exceptions; all lanes; rounding as it is.
_AVX512_SOURCE = """
declare <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float>, i32, <16 x float>, i16, i32)
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, i16, i32)
define weak_odr <16 x float> @{above_floor}(<16 x float> %x) #0 {{
  %r = call <16 x float>
    @llvm.x86.avx512.mask.reduce.ps.512(<16 x float> %x, i32 9, <16 x float> zeroinitializer, i16 -1, i32 4)
  ret <16 x float> %r
}}
define weak_odr <16 x float> @{times_power}(<16 x float> %value, <16 x float> %x) #0 {{
  %is.normal = fcmp uge <16 x float> %x, splat (float -126.0)
  %normal = bitcast <16 x i1> %is.normal to i16
  %scaled = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(
    <16 x float> %value, <16 x float> %x, <16 x float> zeroinitializer, i16 %normal, i32 4)
  ret <16 x float> %scaled
}}
attributes #0 = {{ {attributes} }}
"""
_AVX2_LANES = 8
# The polynomial's power is from 1 to 2, so that its exponent and the floor make that of a normal number.
_AVX2_SOURCE = """
declare <8 x float> @llvm.floor.v8f32(<8 x float>)
declare <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float>)
define weak_odr <8 x float> @{above_floor}(<8 x float> %x) #0 {{
  %floor = call <8 x float> @llvm.floor.v8f32(<8 x float> %x)
  %r = fsub <8 x float> %x, %floor
  ret <8 x float> %r
}}
define weak_odr <8 x float> @{times_power}(<8 x float> %value, <8 x float> %x) #0 {{
  %floor = call <8 x float> @llvm.floor.v8f32(<8 x float> %x)
  %n = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %floor)
  %exponent = shl <8 x i32> %n, splat (i32 23)
  %bits = bitcast <8 x float> %value to <8 x i32>
  %scaled = add <8 x i32> %bits, %exponent
  %is.normal = fcmp uge <8 x float> %x, splat (float -126.0)
  %mask = sext <8 x i1> %is.normal to <8 x i32>
  %kept = and <8 x i32> %scaled, %mask
  %result = bitcast <8 x i32> %kept to <8 x float>
  ret <8 x float> %result
}}
attributes #0 = {{ {attributes} }}
"""


@dataclass(frozen=True)
class PowersOfTwo:
    """The functions of one target on vectors of `lanes` numbers."""

    lanes: int
    source: str

    def of(self, x: Expr, coefficients: Sequence[float]) -> Expr:
        """Return 2**x of a vector of fp32, less than 128; `coefficients` are EXP2 or EXP2_TO_ROUND."""
        dtype = f"float32x{self.lanes}"
        power = Var("power", x.ty)
        above = tirx.call_extern(dtype, _ABOVE_FLOOR, power)
        part = Var("part", above.ty)
        scaled = tirx.call_extern(dtype, _TIMES_POWER, polynomial(part, coefficients), power)
        return tirx.Let(power, x, tirx.Let(part, above, scaled))

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the functions, with the functions."""
        return imported(statement, self.source)


def powers_of_two(target: Target) -> PowersOfTwo | None:
    """Return the functions of a CPU target, None where it has no such instructions."""
    if scales(target):
        lanes, source = SCALED_LANES, _AVX512_SOURCE
    elif target.architecture == "x86_64" and target.vector_lanes(32) == _AVX2_LANES:
        lanes, source = _AVX2_LANES, _AVX2_SOURCE
    else:
        return None
    named = source.format(above_floor=_ABOVE_FLOOR, times_power=_TIMES_POWER, attributes=attributes(target))
    return PowersOfTwo(lanes, named)
