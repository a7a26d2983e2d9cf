"""Sine and cosine as arithmetic that stays in vector registers, of vectors without large arguments.

x = n pi / 2 + r with |r| <= pi / 4, by parts of pi / 2 (W. J. Cody and W. Waite, Software Manual for the Elementary
Functions, 1980), whose products with n a fused multiply-add does not round: the first difference is exact, and up to
`LIMIT` the last part leaves no error that counts. A vector with a larger argument goes to the C library, one lane after
the other. Largest errors against float64, as the tests measure them: 2 units in the last
place, around multiples of pi, too.
"""

from __future__ import annotations

import functools
import math

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import as_int
from schedules.intrin.llvm_call import intrinsic
from schedules.intrin.vector_math import ROUNDING_SHIFT, let, polynomial
from schedules.loops import index, load, local, store, vector, with_local
from schedules.stages import CONDITIONAL, substitute

LIMIT = 8192.0
# (sin(r) - r) / r**3 and (cos(r) - 1 + r**2 / 2) / r**4 as polynomials in r**2 on |r| <= pi / 4, to 2**-28 of sin(r)
# and 2**-33 of cos(r): least-maximum fits like those of `vector_math`
_SINE = (-1.666665459e-01, 8.332159594e-03, -1.951512140e-04)
_COSINE = (4.166664565e-02, -1.388731466e-03, 2.443297110e-05)
# How many quarters of a turn each function is ahead of the sine.
_QUARTERS = {"tirx.sin": 0, "tirx.cos": 1}
# pi / 2 in three parts: fp32's 24 bits of it, of what is left, and of what is left then. None is negative, so that -0
# stays what it is.
_HALF_PI = (1.570796251296997, 7.549789415861596e-08, 5.390302529957765e-15)


def guarded(vectors: tirx.For) -> Stmt | None:
    """Return a loop of vectors with its sines and cosines of fp32 in vectors, unless an argument is large.

    None without any, and where one is in another's argument. Calls on which a condition decides are left alone.
    """
    extent = as_int(vectors.extent)
    if vectors.kind != tirx.ForKind.VECTORIZED or not extent or not isinstance(vectors.body, tirx.BufferStore):
        return None
    written = vectors.body
    arguments: list[Expr] = []
    nested = False

    def computed(call: ir.Call, mutator: tvm_ffi.StructuralMutator) -> Expr:
        nonlocal nested
        name = call.op.name if isinstance(call.op, ir.Op) else ""
        if name == CONDITIONAL:
            return call
        if name not in _QUARTERS or str(call.ty.dtype) != "float32":
            return mutator.default_mutate(call)
        outer = len(arguments)
        mutator.default_mutate(call)
        nested = nested or len(arguments) > outer
        arguments.append(call.args[0])
        return _circular(call.args[0], _QUARTERS[name])

    value = tvm_ffi.structural_mutate(written.value, (ir.Call, computed))
    if nested or not arguments:
        return None
    in_vectors = vector(extent, lambda v: _placed(written, value, vectors.loop_var, v))
    one_by_one = tirx.For(vectors.loop_var, index(0), index(extent), tirx.ForKind.SERIAL, written)
    magnitudes = [local([extent], "int32", "magnitudes") for _ in arguments]
    filled = [
        vector(extent, lambda v, b=b, a=a: store(b, substitute(_magnitude(a), {vectors.loop_var: v}), [v]))
        for b, a in zip(magnitudes, arguments, strict=True)
    ]
    whole = [tirx.Ramp(index(0), index(1), extent)]
    largest = [intrinsic("int32", "llvm.vector.reduce.smax", load(buffer, whole)) for buffer in magnitudes]
    small = functools.reduce(tirx.And, [each <= _magnitude(tirx.const(LIMIT, "float32")) for each in largest])
    return with_local(magnitudes, [*filled, tirx.IfThenElse(small, in_vectors, one_by_one)])


def _magnitude(x: Expr) -> Expr:
    """Return integers in the order of magnitudes, NaN above infinity: their largest, unlike fp32's, takes no branch."""
    return tirx.reinterpret("int32", x) & _i32(0x7FFFFFFF)


def _placed(written: tirx.BufferStore, value: Expr, variable: Var, place: Expr) -> Stmt:
    indices = [substitute(position, {variable: place}) for position in written.indices]
    return store(written.buffer, substitute(value, {variable: place}), indices)


def _circular(x: Expr, quarters: int) -> Expr:
    """Return the sine of x and a number of quarters of a turn, for |x| <= `LIMIT`."""
    shift = tirx.const(ROUNDING_SHIFT, "float32")

    def of_parts(r: Expr, quarter: Expr) -> Expr:
        one, half = tirx.const(1.0, "float32"), tirx.const(0.5, "float32")
        z = r * r
        sine = r * (z * polynomial(z, _SINE) + one)
        cosine = one - (z * half - z * z * polynomial(z, _COSINE))
        value = tirx.Select((quarter & _i32(1)).equal(_i32(0)), sine, cosine)
        sign = (quarter & _i32(2)) << _i32(30)
        return tirx.reinterpret("float32", tirx.reinterpret("int32", value) ^ sign)

    def reduced(x: Expr, n: Expr) -> Expr:
        for part in _HALF_PI:
            x = intrinsic("float32", "llvm.fma", n, tirx.const(-part, "float32"), x)
        return x

    def of_shifted(x: Expr, shifted: Expr) -> Expr:
        quarter = tirx.reinterpret("int32", shifted) + _i32(quarters)
        r = let("n", shifted - shift, lambda n: reduced(x, n))
        return let("r", r, lambda r: let("quarter", quarter, lambda quarter: of_parts(r, quarter)))

    def of_argument(x: Expr) -> Expr:
        return let("shifted", x * tirx.const(2 / math.pi, "float32") + shift, lambda s: of_shifted(x, s))

    return let("x", x, of_argument)


def _i32(value: int) -> Expr:
    return tirx.const(value, "int32")
