"""Blocks of keys that attention need not look at: those that a mask hides from every query of a task.

A hidden key has a logit so low that, next to any key that is not hidden, its exponential is zero: the mask puts a large
negative number in the place of the score or adds it. So a block may be left out once every query has met a key that it
sees. What is hidden is not read, then: infinities among hidden values do not turn the result into NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import tvm_ffi
from tvm import ir, sym, tirx
from tvm.ir import Expr, Var

from schedules.access import occurs
from schedules.attention_structure import AttentionAnalysis, scale_of_score
from schedules.loops import index, load
from schedules.stages import CONDITIONAL

FLOAT = "float32"
# What a mask adds or puts in, at most. No logit of a key that is seen comes near it.
HIDDEN = -1e30
# A query whose largest logit is greater has met a key that it sees.
SEEN = -1e29
# What is kept of a score that a mask hides: any multiple of it is exact, so that a query which sees no key weighs all
# the same.
HIDDEN_SCORE = -(2.0**100)
# Scales of scores, or one by them, with which HIDDEN_SCORE becomes a number that weighs nothing beside any other.
LEAST_SCALE = 2.0**-20


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a score until its exponential is taken: `value`, and `visible` where no mask hides the key.

    Both are in terms of the analysis's score. `visible` is None where a mask hides other keys than those from
    `end_of_seen` on. `scale` is what makes a logit of what is kept, None where that is the logit itself.
    """

    value: Expr
    visible: Expr | None
    scale: float | None


def kept(analysis: AttentionAnalysis) -> Kept:
    """Return what is kept of scores: themselves where a positive scale, alone or beside a mask, makes them logits."""
    scale, seen = scale_of_score(analysis, analysis.logit), seen_logit(analysis)
    if scale is not None:
        return Kept(analysis.score, None, scale)
    scale, low = (None, None) if seen is None else (scale_of_score(analysis, seen), _hidden_score(analysis))
    if scale is None or low is None or not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:
        return Kept(analysis.logit, seen, None)
    hidden = hides(analysis)
    assert hidden is not None
    return Kept(tirx.Select(hidden, low, analysis.score), analysis.score, scale)


def _hidden_score(analysis: AttentionAnalysis) -> Expr | None:
    """Return what stands for a score that a mask hides, whose logits all are minus infinity or all are numbers."""
    lows: list[bool] = []

    def note(number: tirx.FloatImm) -> None:
        if _is_low(number):
            lows.append(math.isinf(number.value))

    tvm_ffi.structural_walk(analysis.logit, [(tirx.FloatImm, note)])
    if len(set(lows)) != 1:
        return None
    return tirx.const(-math.inf if lows[0] else HIDDEN_SCORE, FLOAT)


def hides(analysis: AttentionAnalysis) -> Expr | None:
    """Return the condition that the mask hides a key from a query; None where there is no mask, or no such form."""
    condition = _hidden(analysis.logit, analysis.score)
    if condition is None or not occurs(condition, analysis.key.variable):
        return None
    return condition


def end_of_seen(analysis: AttentionAnalysis) -> Expr | None:
    """Return the key from which on the mask hides all keys from a query, as where it is causal; None if none is known.

    The later the query (on `lane`), the later that key.
    """
    condition = hides(analysis)
    return None if condition is None else _end(condition, analysis)


def hides_only_ends(analysis: AttentionAnalysis) -> bool:
    """Return whether the mask hides no other keys than those from `end_of_seen` on.

    Its end may be the least of several, such as that of a causal mask and that of the keys there are.
    """
    condition = hides(analysis)
    return condition is not None and all(_end(part, analysis) is not None for part in _alternatives(condition))


def _alternatives(hidden: Expr) -> list[Expr]:
    """Return the conditions of which each hides a key."""
    if isinstance(hidden, tirx.Or):
        return [*_alternatives(hidden.a), *_alternatives(hidden.b)]
    if isinstance(hidden, tirx.Not) and isinstance(hidden.a, tirx.And):
        return [*_alternatives(tirx.Not(hidden.a.a)), *_alternatives(tirx.Not(hidden.a.b))]
    return [hidden]


def seen_logit(analysis: AttentionAnalysis) -> Expr | None:
    """Return the logit of a key that a mask which hides only ends does not hide; None for any other mask."""
    condition = hides(analysis)
    if condition is None or not hides_only_ends(analysis):
        return None
    negated = isinstance(condition, tirx.Not)
    comparison = condition.a if negated else condition

    def chosen(choice: Expr, mutator: tvm_ffi.StructuralMutator) -> Expr:
        parts = choice_of(choice)
        if parts is None or not tvm_ffi.structural_equal(parts[0], comparison):
            return mutator.default_mutate(choice)
        return parts[1] if negated else parts[2]

    def added(total: tirx.Add, mutator: tvm_ffi.StructuralMutator) -> Expr:
        value = mutator.default_mutate(total)
        is_zero = isinstance(value, tirx.Add) and isinstance(value.b, tirx.FloatImm) and value.b.value == 0
        return value.a if is_zero else value

    return tvm_ffi.structural_mutate(analysis.logit, [(tirx.Select, chosen), (ir.Call, chosen), (tirx.Add, added)])


_COMPARISONS = (tirx.LT, tirx.LE, tirx.GT, tirx.GE)


def _end(hidden: Expr, analysis: AttentionAnalysis) -> Expr | None:
    """Return the key from which on a condition holds."""
    if isinstance(hidden, tirx.Or):
        ends = [end for end in (_end(hidden.a, analysis), _end(hidden.b, analysis)) if end is not None]
        return reduce(tirx.min, ends) if ends else None
    if not isinstance(hidden, tirx.Not):
        return _beyond(hidden, analysis, seen=False)
    seen = hidden.a
    if isinstance(seen, tirx.And):
        return _end(tirx.Or(tirx.Not(seen.a), tirx.Not(seen.b)), analysis)
    return _beyond(seen, analysis, seen=True)


def _beyond(comparison: Expr, analysis: AttentionAnalysis, *, seen: bool) -> Expr | None:
    """Return the key from which on a comparison of keys holds, or with `seen` does not hold any more."""
    if not isinstance(comparison, _COMPARISONS):
        return None
    descending = isinstance(comparison, tirx.GT | tirx.GE)
    key, other = (comparison.b, comparison.a) if descending == seen else (comparison.a, comparison.b)
    if not key.same_as(analysis.key.variable) or not _grows(other, analysis):
        return None
    # Seen while key < other: the end is `other`. Seen while key <= other: the one behind.
    is_strict = isinstance(comparison, tirx.LT | tirx.GT)
    return other if is_strict == seen else other + 1


def _grows(bound: Expr, analysis: AttentionAnalysis) -> bool:
    """Return whether a bound of keys does not depend on the key and never falls from one query to the next."""
    if analysis.lane is None or occurs(bound, analysis.key.variable):
        return False
    slope = sym.detect_linear_equation(bound, [analysis.lane.variable])
    return len(slope) > 0 and isinstance(slope[0], tirx.IntImm) and int(slope[0]) >= 0


def _hidden(logit: Expr, score: Var) -> Expr | None:
    """Return the condition that `logit` is below HIDDEN whatever the score is."""
    choice = choice_of(logit)
    if choice is not None:
        condition, chosen, other = choice
        if _is_low(other):
            return _or(tirx.Not(condition), _hidden(chosen, score))
        return _or(condition, _hidden(other, score)) if _is_low(chosen) else None
    if isinstance(logit, tirx.Add):
        for term, rest in ((logit.a, logit.b), (logit.b, logit.a)):
            if not occurs(term, score):
                return _or(_is_below(term), _hidden(rest, score))
    return None


def choice_of(expression: Expr) -> tuple[Expr, Expr, Expr] | None:
    """Return condition and alternatives of an expression that is a choice."""
    if isinstance(expression, tirx.Select):
        return expression.condition, expression.true_value, expression.false_value
    if isinstance(expression, ir.Call) and isinstance(expression.op, ir.Op) and expression.op.name == CONDITIONAL:
        return expression.args[0], expression.args[1], expression.args[2]
    return None


def _is_low(expression: Expr) -> bool:
    return isinstance(expression, tirx.FloatImm) and expression.value <= HIDDEN


def _is_below(term: Expr) -> Expr | None:
    """Return the condition that a term is below HIDDEN, None where it never is."""
    if isinstance(term, tirx.FloatImm):
        return tirx.const(True, "bool") if _is_low(term) else None
    choice = choice_of(term)
    if choice is not None:
        condition, chosen, other = choice
        if _is_low(other):
            return _or(tirx.Not(condition), _is_below(chosen))
        if _is_low(chosen):
            return _or(condition, _is_below(other))
    return term <= tirx.const(HIDDEN, str(term.ty.dtype))


def _or(left: Expr | None, right: Expr | None) -> Expr | None:
    if left is None or right is None:
        return right if left is None else left
    return tirx.Or(left, right)


def any_seen(seen: Var, lanes: int, largest: Var, queries: int) -> Expr:
    """Return the condition that one of the lanes of `seen` is not 0, or a query has met no key that it sees."""
    most = reduce(tirx.max, [load(seen, [index(lane)]) for lane in range(lanes)])
    return tirx.Or(most > tirx.const(0.0, FLOAT), tirx.Not(all_seen(largest, queries)))


def all_seen(largest: Var, queries: int) -> Expr:
    """Return the condition that every query has met a key that it sees."""
    return reduce(tirx.min, [load(largest, [index(query)]) for query in range(queries)]) > tirx.const(SEEN, FLOAT)
