"""Elementary functions as arithmetic that stays in vector registers.

LLVM turns a vector exp, log, tanh or erf into one call of the C library for each lane. Here each is a polynomial with
an exact argument reduction, written as a TIR expression. All compute in fp32 (fp16 is widened around them),
propagate NaN, and give the limits at infinities. Largest errors against float64 over all of fp32's range, as the tests
measure them: exp 2, log 0.9, log1p 2.5 (1.7 from 0 to 1, in pairs 1.9), tanh 2.5, erf 2.9, sigmoid 2.4 units in the
last place; sigmoid below exp(-88) becomes 0. None takes a branch: an exponential less 1 that is exact around 0, too,
serves tanh and erf over their whole range. Where vectors are whole registers of AVX-512, `register_tables` has
exponentials and erf in half the arithmetic; `elementary_calls` chooses. Sines and cosines are in `circular_functions`.

The coefficients are weighted least-maximum fits (Lawson's algorithm on Chebyshev nodes) made for this file over the
intervals given with them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr, Var

from schedules.intrin.llvm_call import intrinsic
from targets.base import Target

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
# ln 2 in two parts; the first has few enough bits that its product with an integer below 2**9 is exact in fp32.
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
# Adding this rounds |x| < 2**22 to an integer, which then stands in the low bits of the sum.
ROUNDING_SHIFT = 12582912.0
MANTISSA_BITS = 23
EXPONENT_BIAS = 127
SCALED_LANES = 16
# The logarithm of the smallest normal number, rounded up.
SMALLEST_EXPONENT = -87.33654

# (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2
EXP = (4.999999343e-01, 1.666652040e-01, 4.166839083e-02, 8.368745320e-03, 1.381453790e-03)
# (exp(r) - 1) / r on |r| <= ln(2) / 2, to 0.8 units in the last place of exp(r)
EXP_SHORT = (9.999997063e-01, 4.999914783e-01, 1.666763816e-01, 4.189816062e-02, 8.290270044e-03)
# The same to 2**-13 of exp(r), for exponentials that are rounded to bfloat16
EXP_TO_ROUND = (1.000195840e00, 5.041303800e-01, 1.651797700e-01)
# (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2, to 0.2 units in the last place of exp(r) - 1
EXPM1 = (4.999999814e-01, 1.666654318e-01, 4.166720182e-02, 8.366580475e-03, 1.388250758e-03)
# (log(1 + f) - f + f**2 / 2) / f**3 on sqrt(1/2) - 1 <= f <= sqrt(2) - 1
LOG = (
    3.333333171e-01,
    -2.500082106e-01,
    2.000122667e-01,
    -1.662335648e-01,
    1.420176247e-01,
    -1.316019507e-01,
    1.276155034e-01,
    -7.634429836e-02,
)
# log(1 + t) / t on 0 <= t <= 1
LOG1P_OF_UNIT = (
    1.0,
    -4.999990165e-01,
    3.332996368e-01,
    -2.495413423e-01,
    1.967593879e-01,
    -1.530559212e-01,
    1.060365364e-01,
    -5.695951730e-02,
    1.985145360e-02,
    -3.244023304e-03,
)
# Beyond this tanh rounds to 1.
TANH_LIMIT = 10.0
# -log(1 - erf(x)) / x on 0 <= x <= 3.95, beyond which erf rounds to 1
ERF_LIMIT = 3.95
ERF = (
    1.128379172e00,
    6.366193820e-01,
    1.027778304e-01,
    -1.915306326e-02,
    -1.603973646e-04,
    1.667028857e-03,
    -6.328376690e-04,
    1.176415130e-04,
    -9.256293674e-06,
)
# What `exp_of_nonpositive` calls, until a target is known.
NONPOSITIVE, TO_ROUND = "optimizer_exp_of_nonpositive", "optimizer_exp_to_round"
OF_UNIT = "optimizer_log1p_of_unit"

Function = Callable[[Expr], Expr]


def _f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def _i32(value: int) -> Expr:
    return tirx.const(value, "int32")


def let(name: str, value: Expr, body: Function) -> Expr:
    """Return `body` of `value`, which is computed once."""
    variable = Var(name, value.ty)
    return tirx.Let(variable, value, body(variable))


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Return the polynomial with `coefficients`, lowest power first, by Horner's rule."""
    result: Expr = _f32(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _f32(coefficient)
    return result


def polynomial_in_pairs(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Return the same by G. Estrin's scheme (1960): pairs of terms, then pairs of pairs by the square of `x`, ..."""

    def paired(terms: Sequence[Expr], power: Expr) -> Expr:
        pairs = [terms[i] if i + 1 == len(terms) else terms[i + 1] * power + terms[i] for i in range(0, len(terms), 2)]
        return pairs[0] if len(pairs) == 1 else let("power", power * power, lambda power: paired(pairs, power))

    return paired([_f32(coefficient) for coefficient in coefficients], x)


def _clamp(x: Expr, low: float, high: float) -> Expr:
    """Return x between the bounds; NaN passes, because a comparison with it is false and x is the second operand."""
    return tirx.min(_f32(high), tirx.max(_f32(low), x))


def _power_of_two(biased: Expr) -> Expr:
    """Return 2**(n - 127) of the integer n below 2**9 in the low bits of `biased`; the others drop out."""
    return tirx.reinterpret("float32", biased << _i32(MANTISSA_BITS))


def scales(target: Target) -> bool:
    """Return whether vectors are multiplied by powers of two, given as integers, with one instruction (AVX-512's)."""
    return target.architecture == "x86_64" and target.vector_lanes(32) == SCALED_LANES


def _times_power(value: Expr, bits: Expr, shift: float) -> Expr:
    """Return `value` times 2**n, rounded once and not clamped, from the bits of n + `shift`."""
    (offset,) = struct.unpack("<i", struct.pack("<f", shift))
    return intrinsic("float32", "llvm.ldexp", value, bits - _i32(offset))


def _bits(x: Expr) -> Expr:
    return tirx.reinterpret("int32", x)


def exp(x: Expr) -> Expr:
    """Return the exponential of an fp32 expression: x = n ln 2 + r, a polynomial in r, times 2**n in two steps."""

    def in_two_steps(value: Expr, bits: Expr) -> Expr:
        half = bits >> _i32(1)
        return let("half", half, lambda half: value * _power_of_two(half) * _power_of_two(bits - half))

    # Both steps are biased, so their sum is twice.
    return _exp(x, ROUNDING_SHIFT + 2 * EXPONENT_BIAS, in_two_steps)


def exp_with_scaling(x: Expr) -> Expr:
    """Return the same with one instruction that multiplies by 2**n, for processors that have one (`scales`)."""
    return _exp(x, ROUNDING_SHIFT, lambda value, bits: _times_power(value, bits, ROUNDING_SHIFT))


def _exp(x: Expr, shift: float, scaled: Callable[[Expr, Expr], Expr]) -> Expr:
    """Return the exponential; `scaled` multiplies by 2**n, from the bits of n + `shift`."""

    def reduced(x: Expr, shifted: Expr) -> Expr:
        n = shifted - _f32(shift)
        return let("n", n, lambda n: (x - n * _f32(LN2_HIGH)) - n * _f32(LN2_LOW))

    def of_reduced(r: Expr, bits: Expr) -> Expr:
        return scaled(polynomial(r, EXP_SHORT) * r + _f32(1.0), bits)

    def value(x: Expr, shifted: Expr) -> Expr:
        return let("r", reduced(x, shifted), lambda r: let("bits", _bits(shifted), lambda bits: of_reduced(r, bits)))

    def of_clamped(x: Expr) -> Expr:
        return let("shifted", x * _f32(LOG2_E) + _f32(shift), lambda shifted: value(x, shifted))

    return let("clamped", _clamp(x, -104.0, 89.0), of_clamped)


def exp_of_nonpositive(x: Expr, *, to_round: bool = False) -> Expr:
    """Return the exponential of an fp32 expression that is at most 0, as in a softmax: half the arithmetic of `exp`.

    Below -87.3, where results are no longer normal numbers, it is at most 2**-126. One part of ln 2 suffices: the
    relative error, 2 units in the last place near 0, grows by 2e-9 for each factor of 2 that the result is below 1.
    `to_round`: it is to be rounded to bfloat16, and need only be right to 2**-13. `elementary_calls` says how.
    """
    return tirx.call_pure_extern("float32", TO_ROUND if to_round else NONPOSITIVE, x)


def nonpositive_by_polynomial(x: Expr, coefficients: Sequence[float], *, scaled: bool) -> Expr:
    """Return what `exp_of_nonpositive` says, and 0 where that is no normal number.

    `coefficients` are those of (exp(r) - 1) / r: EXP_SHORT or EXP_TO_ROUND. `scaled` is for what `scales` names.
    """
    shift = ROUNDING_SHIFT if scaled else ROUNDING_SHIFT + EXPONENT_BIAS

    def times_power(value: Expr, bits: Expr) -> Expr:
        return _times_power(value, bits, shift) if scaled else value * _power_of_two(bits)

    def value(x: Expr) -> Expr:
        result = _reduced(x, lambda r, bits: times_power(polynomial(r, coefficients) * r + _f32(1.0), bits), shift)
        return tirx.Select(x < _f32(SMALLEST_EXPONENT), _f32(0.0), result)

    return let("x", x, value)


def _reduced(x: Expr, body: Callable[[Expr, Expr], Expr], shift: float) -> Expr:
    """Return `body` of r and the bits of n + `shift`, where x = n ln 2 + r with |r| <= ln(2) / 2."""

    def parts(shifted: Expr) -> Expr:
        r = x - (shifted - _f32(shift)) * _f32(LN2)
        return let("r", r, lambda r: let("bits", _bits(shifted), lambda bits: body(r, bits)))

    return let("shifted", x * _f32(LOG2_E) + _f32(shift), parts)


def _expm1(x: Expr) -> Expr:
    """Return exp(x) - 1 of an fp32 variable with |x| < 30, exact to a unit in the last place around 0, too."""

    def value(r: Expr, bits: Expr) -> Expr:
        def of_power(power: Expr) -> Expr:
            return ((polynomial(r, EXPM1) * r) * r + r) * power + (power - _f32(1.0))

        return let("power", _power_of_two(bits), of_power)

    return _reduced(x, value, ROUNDING_SHIFT + EXPONENT_BIAS)


def log(x: Expr) -> Expr:
    """Return the natural logarithm of an fp32 expression: x = 2**e m with m around 1, a polynomial in m - 1."""

    def normal(original: Expr) -> Expr:
        tiny = original < _f32(2.0**-126)
        scaled = tirx.Select(tiny, original * _f32(2.0**MANTISSA_BITS), original)
        correction = tirx.Select(tiny, _f32(-float(MANTISSA_BITS)), _f32(0.0))
        return let("scaled", scaled, lambda s: _special_log(original, _log_normal(s, correction)))

    return let("original", x, normal)


def log1p(x: Expr) -> Expr:
    """Return log(1 + x) of an fp32 expression: with u = 1 + x rounded, log(u) x / (u - 1), where errors of u cancel.

    The formula is W. Kahan's (HP-15C Advanced Functions Handbook, 1982, appendix). No u but 0 is below 2**-24.
    """

    def value(x: Expr, u: Expr) -> Expr:
        quotient = x / (u - _f32(1.0))
        logarithm = _special_log(u, _log_normal(u, _f32(0.0)) * quotient)
        return tirx.Select(u.equal(_f32(1.0)), x, logarithm)

    return let("x", x, lambda x: let("u", x + _f32(1.0), lambda u: value(x, u)))


def log1p_of_unit(t: Expr) -> Expr:
    """Return log(1 + t) of an fp32 expression from 0 to 1, to 1.7 units in the last place, without a division."""
    return let("t", t, lambda t: polynomial(t, LOG1P_OF_UNIT) * t)


def log1p_of_unit_in_pairs(t: Expr) -> Expr:
    """Return the same to 1.9 units, in half as many steps after each other: softplus takes a third less (Zen 3)."""
    one, *rest = LOG1P_OF_UNIT
    return let("t", t, lambda t: (polynomial_in_pairs(t, rest) * t + _f32(one)) * t)


def _log_normal(x: Expr, correction: Expr) -> Expr:
    # Subtracting sqrt(1/2)'s bits makes the exponent field count from there: m lies in [sqrt(1/2), sqrt(2)).
    root_half = 0x3F3504F3

    def parts(bits: Expr) -> Expr:
        exponent = (bits - _i32(root_half)) >> _i32(MANTISSA_BITS)
        mantissa = tirx.reinterpret("float32", bits - (exponent << _i32(MANTISSA_BITS)))
        e = exponent.astype("float32") + correction
        return let("e", e, lambda e: let("f", mantissa - _f32(1.0), lambda f: series(e, f)))

    def series(e: Expr, f: Expr) -> Expr:
        tail = polynomial(f, LOG) * f * f * f + e * _f32(LN2_LOW)
        return ((tail - f * f * _f32(0.5)) + f) + e * _f32(LN2_HIGH)

    return let("bits", _bits(x), parts)


def _special_log(x: Expr, value: Expr) -> Expr:
    infinity, nan = _f32(float("inf")), _f32(float("nan"))
    finite = tirx.Select(x > _f32(3.4028234663852886e38), infinity, value)
    non_negative = tirx.Select(x.equal(_f32(0.0)), -infinity, finite)
    # Not `x < 0`: NaN must come out as NaN too.
    return tirx.Select(x >= _f32(0.0), non_negative, nan)


def _absolute(x: Expr) -> Expr:
    return tirx.reinterpret("float32", _bits(x) & _i32(0x7FFFFFFF))


def _with_sign_of(magnitude: Expr, x: Expr) -> Expr:
    sign = _bits(x) & _i32(-0x80000000)
    return tirx.reinterpret("float32", (_bits(magnitude) & _i32(0x7FFFFFFF)) | sign)


def tanh(x: Expr) -> Expr:
    """Return the hyperbolic tangent of an fp32 expression: with e = exp(2 x) - 1, e / (e + 2)."""

    def value(x: Expr) -> Expr:
        return let("e", _expm1(x), lambda e: e / (e + _f32(2.0)))

    return let("twice", _clamp(x, -TANH_LIMIT, TANH_LIMIT) * _f32(2.0), value)


def erf(x: Expr) -> Expr:
    """Return the error function of an fp32 expression: 1 - exp(-p(|x|)) with a polynomial p without constant term."""

    def value(x: Expr) -> Expr:
        exponent = let("a", tirx.min(_f32(ERF_LIMIT), _absolute(x)), lambda a: _f32(0.0) - a * polynomial(a, ERF))
        return _with_sign_of(let("exponent", exponent, _expm1), x)

    return let("x", x, value)


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + exp(-x)) of an fp32 expression."""
    return _f32(1.0) / sigmoid_divisor(x)


def sigmoid_divisor(x: Expr) -> Expr:
    """Return 1 + exp(-x) of an fp32 expression: what of the exponential is no normal number is 0 or infinite."""
    shift = ROUNDING_SHIFT + EXPONENT_BIAS

    def divisor(q: Expr, bits: Expr) -> Expr:
        # exp(-q) = 1 - q + q**2 times a polynomial, whose odd powers have other signs than those of exp.
        signed = [-coefficient if power % 2 else coefficient for power, coefficient in enumerate(EXP)]
        value = (polynomial(q, signed) * q - _f32(1.0)) * q + _f32(1.0)
        return value * _power_of_two(bits) + _f32(1.0)

    def reduced(x: Expr, shifted: Expr) -> Expr:
        n = shifted - _f32(shift)
        q = let("n", n, lambda n: (x + n * _f32(LN2_HIGH)) + n * _f32(LN2_LOW))
        return let("q", q, lambda q: let("bits", _bits(shifted), lambda bits: divisor(q, bits)))

    def of_clamped(x: Expr) -> Expr:
        return let("shifted", x * _f32(-LOG2_E) + _f32(shift), lambda shifted: reduced(x, shifted))

    # The powers at both ends are 2**128, whose bits are those of infinity, and 2**-127, whose bits are those of 0.
    return let("clamped", _clamp(x, -89.0, 88.0), of_clamped)


def power(base: Expr, exponent: int) -> Expr:
    """Return `base` raised to a whole number from 1 on, as products."""

    def multiply(x: Expr) -> Expr:
        result = x
        for _ in range(exponent - 1):
            result = result * x
        return result

    return let("base", base, multiply)
