"""Elementary functions of whole AVX-512 vectors, of which a part is looked up in tables that lie in registers.

vpermi2ps takes 16 elements of the 32 in two registers, by the low bits of 16 integers: those of a number to which one
was added that leaves no bits below 1/32 or 1/8. A table takes the place of most of a polynomial, and of the bounds that
keep its argument in range: vscalefps multiplies by 2**n for any n, infinite ones included. Errors are those that
`vector_math` states. TVM vectorizes no call of this instruction, so arguments go through buffers of a vector each,
which LLVM keeps in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int
from schedules.intrin.llvm_call import intrinsic
from schedules.intrin.vector_math import (
    LN2,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    ROUNDING_SHIFT,
    SCALED_LANES,
    SMALLEST_EXPONENT,
    Function,
    let,
    scales,
)
from schedules.loops import index, load, local, store, vector, with_local
from schedules.stages import CONDITIONAL, sequence, substitute
from targets.base import Target

LANES = SCALED_LANES
VECTOR = f"float32x{LANES}"
INTEGERS = f"int32x{LANES}"
ENTRIES = 2 * LANES
_POWERS = tuple(2.0 ** (entry / ENTRIES) for entry in range(ENTRIES))
# (exp(r) - 1) / r on |r| <= ln(2) / 64, to 0.9 * 2**-24 of exp(r)
_EXP = (1.00001464, 0.50000005)
# What clears the highest bit of an exponent: numbers below 2 stay, all others, infinities and NaN become such numbers.
_BELOW_2 = -0x40000001
_ABSOLUTE, _SIGN = 0x7FFFFFFF, -0x80000000
# erf in intervals of 1 / 8, whose middles are its multiples; where the last one ends it rounds to 1.
_ERF_STEP = 1 / 8
_ERF_LIMIT = (ENTRIES - 0.51) * _ERF_STEP
# max(x, 0) - gelu(x) in intervals around multiples of this step. The last one is 0: it begins at 5.24.
_GELU_STEP = 11 / 64


def has_tables(target: Target) -> bool:
    """Return whether the target has the instructions."""
    return scales(target)


def looked_up(vectors: tirx.For, function_of: Callable[[ir.Call], Function | None]) -> Stmt | None:
    """Return a loop of vectors with its calls, those that `function_of` knows, computed by tables; None without any.

    `function_of` gives the function of a vector for a call of the last of its arguments. Calls on which a condition
    decides are left alone, and so are vectors narrower than a register: their lanes are of the same accuracy.
    """
    extent, written = as_int(vectors.extent), vectors.body
    if vectors.kind != tirx.ForKind.VECTORIZED or not extent or extent % LANES:
        return None
    if not isinstance(written, tirx.BufferStore):
        return None
    parts: list[Stmt] = []
    for start in range(0, extent, LANES):
        lane = Var("lane", vectors.loop_var.ty)
        place = {vectors.loop_var: index(start) + lane}
        calls = _Calls(lane, function_of)
        value = calls.computed(substitute(written.value, place))
        if not calls.statements:
            return None
        indices = [substitute(position, place) for position in written.indices]
        parts.append(with_local(calls.buffers, [*calls.statements, _each(lane, written.buffer, value, indices)]))
    return sequence(parts)


class _Calls:
    """The calls in a vector's value, each computed ahead of it into a buffer."""

    def __init__(self, lane: Var, function_of: Callable[[ir.Call], Function | None]) -> None:
        self._lane, self._function_of = lane, function_of
        self.statements: list[Stmt] = []
        self.buffers: list[Var] = []

    def computed(self, value: Expr) -> Expr:
        """Return the value that reads the buffers."""
        return tvm_ffi.structural_mutate(value, (ir.Call, self._call))

    def _call(self, call: ir.Call, mutator: tvm_ffi.StructuralMutator) -> Expr:
        if isinstance(call.op, ir.Op) and call.op.name == CONDITIONAL:
            return call
        inner = mutator.default_mutate(call)
        function = self._function_of(inner) if isinstance(inner, ir.Call) else None
        if function is None:
            return inner
        argument, result = (local([LANES], "float32", name) for name in ("argument", "result"))
        whole = [tirx.Ramp(index(0), index(1), LANES)]
        self.buffers += [argument, result]
        self.statements.append(_each(self._lane, argument, inner.args[-1], [self._lane]))
        self.statements.append(store(result, function(load(argument, whole)), whole))
        return load(result, [self._lane])


def _each(lane: Var, buffer: Var, value: Expr, indices: Sequence[Expr]) -> Stmt:
    def element(v: Expr) -> Stmt:
        return store(buffer, substitute(value, {lane: v}), [substitute(position, {lane: v}) for position in indices])

    return vector(LANES, element)


def exp(x: Expr) -> Expr:
    """Return the exponentials of a vector: x = n ln 2 + r for a multiple n of 1/32, and 2**(n - floor(n)) is known.

    Where n is so large that r is no more what it should be, r is some number below 2, for which the rest is positive.
    """
    return _scaled(x, lambda n: (x - n * _number(LN2_HIGH)) - n * _number(LN2_LOW))


def exp_of_nonpositive(x: Expr) -> Expr:
    """Return the same of numbers that are at most 0, with one part of ln 2: `vector_math` says what that costs.

    It is 0 where that is no normal number. LLVM makes one operation with a mask of the choice and what precedes it, so
    that no subnormal number is computed, which takes Intel's cores a hundred cycles.
    """
    result = _scaled(x, lambda n: x - n * _number(LN2))
    return tirx.Select(x < _number(SMALLEST_EXPONENT), _number(0.0), result)


def _scaled(x: Expr, reduced: Function) -> Expr:
    """Return 2**n times exp(r), where `reduced` gives r of n."""
    shift = _number(ROUNDING_SHIFT / ENTRIES)  # which rounds to a multiple of 1 / ENTRIES

    def times_exp(power: Expr, r: Expr) -> Expr:
        first, second = (_number(coefficient) for coefficient in _EXP)
        return power * (r * (r * second + first)) + power

    def value(shifted: Expr, n: Expr) -> Expr:
        bits = tirx.reinterpret(INTEGERS, reduced(n)) & _integer(_BELOW_2)
        power = _entry(_POWERS, tirx.reinterpret(INTEGERS, shifted))
        result = let(
            "r", tirx.reinterpret(VECTOR, bits), lambda r: let("power", power, lambda power: times_exp(power, r))
        )
        return _times_power(result, n)

    return let("shifted", x * _number(LOG2_E) + shift, lambda s: let("n", s - shift, lambda n: value(s, n)))


def erf(x: Expr) -> Expr:
    """Return the error functions of a vector, by the polynomial of the interval in which |x| lies."""
    bits = tirx.reinterpret(INTEGERS, x)
    magnitude = tirx.reinterpret(VECTOR, bits & _integer(_ABSOLUTE))
    shift = _number(ROUNDING_SHIFT * _ERF_STEP)

    def value(a: Expr, shifted: Expr) -> Expr:
        interval = tirx.reinterpret(INTEGERS, shifted)
        return let("d", a - (shifted - shift), lambda d: _of_interval(d, interval))

    def of_magnitude(a: Expr) -> Expr:
        return let("shifted", a + shift, lambda shifted: value(a, shifted))

    result = let("a", tirx.min(_number(_ERF_LIMIT), magnitude), of_magnitude)  # NaN passes as the second operand
    return tirx.reinterpret(
        VECTOR, (tirx.reinterpret(INTEGERS, result) & _integer(_ABSOLUTE)) | (bits & _integer(_SIGN))
    )


def gelu_to_round(x: Expr) -> Expr:
    """Return x (1 + erf(x / sqrt(2))) / 2 of a vector, to be rounded to bfloat16.

    It is max(x, 0) - h(|x|) with h(a) = a (1 - erf(a / sqrt(2))) / 2, by the polynomial of degree 2 of the interval in
    which |x| lies. The relative error is at most 2**-12.5 from -2 on, 2**-11.1 from -3 on, where results are -0.004.
    Down to -4, to results of -1e-4, it is a third of a unit in bfloat16's last place at most, and 4.2e-7 below that.
    """
    magnitude = tirx.reinterpret(VECTOR, tirx.reinterpret(INTEGERS, x) & _integer(_ABSOLUTE))
    shift = _number(ROUNDING_SHIFT)

    def of_interval(d: Expr, interval: Expr) -> Expr:
        constant, first, second = (_entry(table, interval) for table in zip(*_GELU, strict=True))
        return (tirx.max(_number(0.0), x) - constant) - d * (second * d + first)

    def value(steps: Expr, shifted: Expr) -> Expr:
        interval = tirx.reinterpret(INTEGERS, shifted)
        return let("d", steps - (shifted - shift), lambda d: of_interval(d, interval))

    # NaN passes as the second operand, and as that of the maximum.
    steps = tirx.min(_number(ENTRIES - 1.0), magnitude * _number(1 / _GELU_STEP))
    return let("steps", steps, lambda steps: let("shifted", steps + shift, lambda shifted: value(steps, shifted)))


def _gelu_around(entry: int) -> tuple[float, float, float]:
    """Return the coefficients of h(s (entry + d)) for |d| <= 1 / 2 and the step s, economized as those of erf are.

    Around 0, where the relative error counts, only d >= 0 occurs: there h(a) / a loses the term in a**3, for the line
    that differs from it least on 0 <= d <= 1 / 2.
    """
    s, a, h = _GELU_STEP, entry * _GELU_STEP, 1 / 2
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    if entry == 0:
        third = density / 6 * s**4
        return 0.0, s / 2 - third * h**3 / math.sqrt(27), third * h**2 - density * s**2
    if entry == ENTRIES - 1:
        return 0.0, 0.0, 0.0
    tail = math.erfc(a / math.sqrt(2)) / 2
    second = (a * a - 2) * density / 2 * s**2
    third = (4 - a * a) * a * density / 6 * s**3
    fourth = (4 - 7 * a * a + a**4) * density / 24 * s**4
    return a * tail - fourth * h**4 / 8, (tail - a * density) * s + third * h**2 * 3 / 4, second + fourth * h**2


_GELU = tuple(map(_gelu_around, range(ENTRIES)))


def _of_interval(d: Expr, interval: Expr) -> Expr:
    *others, result = [_entry(table, interval) for table in zip(*map(_erf_around, range(ENTRIES)), strict=True)]
    for coefficient in reversed(others):
        result = result * d + coefficient
    return result


def _erf_around(entry: int) -> tuple[float, ...]:
    """Return the coefficients of erf(entry / 8 + d) as a polynomial of degree 4 in d, for |d| <= 1 / 16.

    It is the Taylor series with the terms of degree 5 and 6 replaced by lower ones that differ from them by multiples
    of Chebyshev polynomials (economization: C. Lanczos, Applied Analysis, 1956). Around 0, where the relative error
    counts, only d >= 0 occurs: there the term of degree 5 is d times what d**4 is by the polynomial of [0, 1 / 16].
    """
    x, h = entry * _ERF_STEP, _ERF_STEP / 2
    slope = 2 / math.sqrt(math.pi) * math.exp(-x * x)
    if entry == 0:
        fifth = slope / 10
        return (0.0, slope - fifth * h**4 / 128, fifth * h**3 / 4, -slope / 3 - fifth * 1.25 * h**2, fifth * 2 * h)
    # The derivatives of exp(-x**2) are Hermite polynomials times it.
    second, third = -x, (2 * x * x - 1) / 3
    fourth = -(2 * x**3 - 3 * x) / 6
    fifth = (4 * x**4 - 12 * x * x + 3) / 30
    sixth = -(4 * x**5 - 20 * x**3 + 15 * x) / 90
    return (
        math.erf(x) + slope * sixth * h**6 / 32,
        slope * (1 - fifth * h**4 * 5 / 16),
        slope * (second - sixth * h**4 * 9 / 16),
        slope * (third + fifth * h**2 * 5 / 4),
        slope * (fourth + sixth * h**2 * 3 / 2),
    )


def _entry(table: Sequence[float], positions: Expr) -> Expr:
    """Return the elements of a table of 32 at the low five bits of each position."""
    low, high = (_constants(table[start : start + LANES]) for start in (0, LANES))
    return intrinsic(VECTOR, "llvm.x86.avx512.vpermi2var.ps.512", low, positions, high)


def _times_power(value: Expr, exponent: Expr) -> Expr:
    """Return `value` times 2 to the floor of `exponent`, rounded once."""
    all_lanes, as_set = tirx.const(-1, "int16"), tirx.const(4, "int32")
    return intrinsic(VECTOR, "llvm.x86.avx512.mask.scalef.ps.512", value, exponent, value, all_lanes, as_set)


def _constants(values: Sequence[float]) -> Expr:
    numbers = [tirx.const(value, "float32") for value in values]
    return tirx.Shuffle(numbers, [tirx.IntImm("int32", lane) for lane in range(LANES)])


def _number(value: float) -> Expr:
    return tirx.Broadcast(tirx.const(value, "float32"), LANES)


def _integer(value: int) -> Expr:
    return tirx.Broadcast(tirx.const(value, "int32"), LANES)
