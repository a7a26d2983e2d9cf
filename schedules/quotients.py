"""Quotients and remainders by symbolic sizes as the machine's own, which truncate, and none where they make up a whole.

For numbers that are not negative truncation is the floor. TVM cannot see that loop variables divided by symbols are
such numbers, and makes every quotient and remainder a chain of comparisons; where one stands in the other, as in a
reshape between symbolic shapes, the chains nest, and generating their code takes minutes.

A quotient times its divisor and the remainder are the number that was divided: what a row's position is where rows are
counted along two symbolic dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var


@dataclass(frozen=True)
class _Naturals:
    """What cannot be negative: sizes and counters, and the expressions that are dimensions of parameters."""

    variables: frozenset[Var]
    dimensions: Sequence[Expr]


_MONOTONE = (tirx.Add, tirx.Mul, tirx.FloorDiv, tirx.Div, tirx.Mod, tirx.Min)


def truncate_quotients(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return `function` with floordiv and floormod by symbolic sizes truncating, where no operand can be negative."""
    sizes = _sizes(function)
    variables = frozenset(size for size in sizes if isinstance(size, Var)) | _counters(function)
    known = _Naturals(variables, [size for size in sizes if not isinstance(size, Var | tirx.IntImm)])

    def visit(expression: tirx.FloorDiv | tirx.FloorMod, mutator: tvm_ffi.StructuralMutator) -> Expr:
        rewritten = mutator.default_mutate(expression)
        if not isinstance(rewritten, tirx.FloorDiv | tirx.FloorMod) or not _truncates(rewritten, known):
            return rewritten
        truncating = tirx.truncdiv if isinstance(rewritten, tirx.FloorDiv) else tirx.truncmod
        return truncating(rewritten.a, rewritten.b)

    def join(expression: tirx.Add, mutator: tvm_ffi.StructuralMutator) -> Expr:
        rewritten = mutator.default_mutate(expression)
        whole = _divided(rewritten.a, rewritten.b) if isinstance(rewritten, tirx.Add) else None
        return rewritten if whole is None else whole

    callbacks = [(tirx.FloorDiv, visit), (tirx.FloorMod, visit), (tirx.Add, join)]
    body = tvm_ffi.structural_mutate(function.body, callbacks)
    return function.with_body(body)


def _divided(left: Expr, right: Expr) -> Expr | None:
    """Return the number whose quotient times its divisor is `left`, and whose remainder `right`; None if none is."""
    for quotient, remainder in ((tirx.FloorDiv, tirx.FloorMod), (tirx.Div, tirx.Mod)):
        if isinstance(left, tirx.Mul) and isinstance(left.a, quotient) and isinstance(right, remainder):
            pairs = ((left.a.b, left.b), (left.a.a, right.a), (left.b, right.b))
            if all(tvm_ffi.structural_equal(*pair) for pair in pairs):
                return right.a
    return None


def _truncates(expression: tirx.FloorDiv | tirx.FloorMod, known: _Naturals) -> bool:
    """Return whether a quotient or remainder is by a symbol, and of numbers that are not negative."""
    if isinstance(expression.b, tirx.IntImm):
        return False
    return _is_natural(expression.a, known) and _is_natural(expression.b, known)


def _sizes(function: tirx.PrimFunc) -> list[Expr]:
    """Return the dimensions of parameters, and of those that are products their factors, which are dimensions, too."""
    buffers = [parameter for parameter in function.params if tirx.is_buffer_var(parameter)]
    sizes = [extent for buffer in buffers for extent in buffer.shape]
    for size in sizes:  # grows as it goes
        factors = [size.a, size.b] if isinstance(size, tirx.Mul) else []
        if not any(isinstance(each, tirx.IntImm) and int(each) < 0 for each in factors):
            sizes += factors
    return sizes


def _counters(function: tirx.PrimFunc) -> set[Var]:
    """Return the variables of loops that begin at zero."""
    loops: list[tirx.For] = []
    tvm_ffi.structural_walk(function.body, (tirx.For, loops.append))
    return {loop.loop_var for loop in loops if isinstance(loop.min, tirx.IntImm) and int(loop.min) == 0}


def _is_natural(expression: Expr, known: _Naturals) -> bool:
    """Return whether an index expression cannot be negative where what is `known` is not."""
    if isinstance(expression, tirx.IntImm):
        return int(expression) >= 0
    if isinstance(expression, Var):
        return expression in known.variables
    if any(tvm_ffi.structural_equal(expression, dimension) for dimension in known.dimensions):
        return True
    if isinstance(expression, tirx.Max):
        return _is_natural(expression.a, known) or _is_natural(expression.b, known)
    if isinstance(expression, tirx.FloorMod):
        return _is_natural(expression.b, known)
    return isinstance(expression, _MONOTONE) and all(_is_natural(part, known) for part in (expression.a, expression.b))
