"""Blocks of keys that attention need not look at: those that a mask hides from every query of a task.

A hidden key has a logit so low that, next to any key that is not hidden, its exponential is zero: the mask puts a large
negative number in the place of the score or adds it. So a block may be left out once every query has met a key that it
sees. What is hidden is not read, then: infinities among hidden values do not turn the result into NaN.
"""

from __future__ import annotations

from functools import reduce

from tvm import ir, tirx
from tvm.ir import Expr, Var

from schedules.access import occurs
from schedules.attention_structure import AttentionAnalysis
from schedules.loops import index, load
from schedules.stages import CONDITIONAL

FLOAT = "float32"
# What a mask adds or puts in, at most. No logit of a key that is seen comes near it.
HIDDEN = -1e30
# A query whose largest logit is greater has met a key that it sees.
SEEN = -1e29


def hides(analysis: AttentionAnalysis) -> Expr | None:
    """Return the condition that the mask hides a key from a query; None where there is no mask, or no such form."""
    condition = _hidden(analysis.logit, analysis.score)
    if condition is None or not occurs(condition, analysis.key.variable):
        return None
    return condition


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
    least = reduce(tirx.min, [load(largest, [index(query)]) for query in range(queries)])
    return tirx.Or(most > tirx.const(0.0, FLOAT), least <= tirx.const(SEEN, FLOAT))
