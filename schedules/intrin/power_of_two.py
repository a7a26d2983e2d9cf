"""Powers of two of whole vectors of fp32 by instructions of AVX-512 that take a number apart at its floor.

With 2**x = 2**(x - floor(x)) 2**floor(x), vreduceps gives the first exponent, of which a polynomial is the power, and
vscalefps multiplies by the second power. Minus infinity and results below the smallest normal number come out as 0, and
NaN as NaN, without the shifts of `vector_math`. Intel's cores take a hundred cycles for a vector in which a result is
subnormal, as exponentials of what a mask takes 100 from are: the mask of the last instruction leaves them out.
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
_SOURCE = """
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


@dataclass(frozen=True)
class PowersOfTwo:
    """The functions of one target on vectors of `lanes` numbers."""

    lanes: int
    source: str

    def of(self, x: Expr, coefficients: Sequence[float]) -> Expr:
        """Return 2**x of a vector of fp32; `coefficients` are EXP2 or EXP2_TO_ROUND."""
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
    if not scales(target):
        return None
    source = _SOURCE.format(above_floor=_ABOVE_FLOOR, times_power=_TIMES_POWER, attributes=attributes(target))
    return PowersOfTwo(SCALED_LANES, source)
